"""The scheduling policy alone, as a process: ``python -m bench.decisions N USERS COUNT``.

Fills :class:`scheduler.FairQueue` with N jobs of so many users, then prints a JSON line: for each
of COUNT batches the seconds that one decision took. A decision is: take the next job, and release
its place again. The line stays as long as it was, by new jobs that are put in between the batches.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator

from config import ServiceLimits
from scheduler import FairQueue
from store import QueuedJob

_SERVICE = "example"
_BATCH = 100


def _measure(jobs: int, users: int, count: int) -> list[float]:
    queue = FairQueue({_SERVICE: ServiceLimits(runs_per_user=1_000_000, max_runs=1_000_000)})
    numbers = itertools.count(1)
    for number in itertools.islice(numbers, jobs):
        queue.add(QueuedJob(number, number % users, _SERVICE))
    gc.collect()
    gc.freeze()  # the benchmark is about the policy, not about how Python looks for garbage
    return [_time_batch(queue, numbers) for _ in range(count)]


def _time_batch(queue: FairQueue, numbers: Iterator[int]) -> float:
    taken: list[QueuedJob] = []
    started = time.perf_counter()
    for _ in range(_BATCH):
        job = queue.next_for(None)
        if job is None:
            break
        queue.release(job)
        taken.append(job)
    elapsed = time.perf_counter() - started
    for job in taken:
        queue.add(QueuedJob(next(numbers), job.user_id, _SERVICE))
    return elapsed / len(taken)


if __name__ == "__main__":
    samples = _measure(*map(int, sys.argv[1:4]))
    sys.stdout.write(json.dumps({"seconds": samples}) + "\n")
