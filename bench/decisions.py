"""The scheduling policy alone, as a process: ``python -m bench.decisions N USERS COUNT``.

Fills :class:`scheduler.FairQueue` with N jobs of so many users, then prints a JSON line: for each
of COUNT batches the seconds that one decision took. Each decision is taken back, so that the queue
stays as long as it was.
"""

from __future__ import annotations

import gc
import json
import sys
import time

from config import ServiceLimits
from records import UserQueue
from scheduler import FairQueue

_SERVICE = "example"
_BATCH = 100


def _measure(jobs: int, users: int, count: int) -> list[float]:
    queue = FairQueue({_SERVICE: ServiceLimits(runs_per_user=1_000_000, max_runs=1_000_000)})
    for user in range(users):
        queue.count(UserQueue(_SERVICE, user), waiting=len(range(user, jobs, users)), active=0)
    gc.collect()
    gc.freeze()  # the benchmark is about the policy, not about how Python looks for garbage
    return [_time_batch(queue) for _ in range(count)]


def _time_batch(queue: FairQueue) -> float:
    started = time.perf_counter()
    for _ in range(_BATCH):
        line = queue.next_for(_is_offered)
        if line is not None:
            queue.take_back(line)
    return (time.perf_counter() - started) / _BATCH


def _is_offered(service: str) -> bool:
    return service == _SERVICE


if __name__ == "__main__":
    samples = _measure(*map(int, sys.argv[1:4]))
    sys.stdout.write(json.dumps({"seconds": samples}) + "\n")
