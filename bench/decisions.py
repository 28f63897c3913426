"""The scheduling policy alone, as a process: ``python -m bench.decisions N USERS COUNT``.

Fills :class:`scheduler.FairQueue` with N jobs of so many users and of twenty shapes of resources,
at least one of each shape for each user (their number is what a decision costs), then prints a
JSON line: for each of COUNT batches the seconds that one decision took, the largest shape fitting
nowhere. Each decision is taken back, so that the queue stays as long as it was.
"""

from __future__ import annotations

import gc
import json
import sys
import time

from config import ServiceLimits
from fleet.placement import Capacity, Placement
from jobs import Demand, Resources
from records import UserQueue
from scheduler import FairQueue

_SERVICE = "example"
_BATCH = 100
_DEMANDS = tuple(Demand(Resources(cpus)) for cpus in range(1, 21))


def _measure(jobs: int, users: int, count: int) -> list[float]:
    queue = FairQueue({_SERVICE: ServiceLimits(runs_per_user=1_000_000, max_runs=1_000_000)})
    for user in range(users):
        for shape, demand in enumerate(_DEMANDS):
            waiting = len(range(user + shape * users, jobs, users * len(_DEMANDS)))
            queue.count_queued(UserQueue(_SERVICE, user), demand, max(1, waiting))
    placement = _fleet()
    gc.collect()
    gc.freeze()  # the benchmark is about the policy, not about how Python looks for garbage
    return [_time_batch(queue, placement) for _ in range(count)]


def _time_batch(queue: FairQueue, placement: Placement) -> float:
    started = time.perf_counter()
    for _ in range(_BATCH):
        decision = queue.next_for(placement)
        if decision is not None:
            queue.take_back(decision)
    return (time.perf_counter() - started) / _BATCH


def _fleet() -> Placement:
    """Make a hundred agents, of which the largest jobs fit into none as long as others run."""
    placement = Placement()
    total, free = Resources(20, 0, 4), Resources(len(_DEMANDS) - 1, 0, 4)
    for number in range(100):
        placement.put(f"agent{number}", Capacity(None, total, free, 10, number / 1000))
    return placement


if __name__ == "__main__":
    samples = _measure(*map(int, sys.argv[1:4]))
    sys.stdout.write(json.dumps({"seconds": samples}) + "\n")
