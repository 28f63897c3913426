"""The scheduling policy: who is next. Pure and synchronous, without I/O."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from config import ServiceLimits
from store import QueuedJob


@dataclass(slots=True)
class _UserQueue:
    """Jobs of one user for one service, by priority, then first come first served."""

    waiting: list[tuple[int, int, QueuedJob]] = field(default_factory=list)
    active: int = 0


@dataclass(slots=True)
class _ServiceQueue:
    limits: ServiceLimits
    users: dict[int, _UserQueue] = field(default_factory=dict)
    turns: OrderedDict[int, None] = field(default_factory=OrderedDict)
    active: int = 0

    def may_run(self) -> bool:
        return bool(self.turns) and self.active < self.limits.max_runs

    def update_turn(self, user_id: int) -> None:
        """Give the user a place in the rotation if a job of theirs could run, else none."""
        user = self.users[user_id]
        if user.waiting and user.active < self.limits.runs_per_user:
            self.turns.setdefault(user_id)
        else:
            self.turns.pop(user_id, None)
        if not user.waiting and not user.active:
            del self.users[user_id]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs wait, and how many are active."""

    waiting: int = 0
    active: int = 0


class FairQueue:
    """The scheduling policy: who is next.

    Users of a service take turns, and so do services; within a user the highest
    priority goes first, then the lowest job id, so that a job that was queued again
    keeps its place. Every operation costs O(log n) of one user's queue at most.
    """

    def __init__(self, limits: Mapping[str, ServiceLimits]) -> None:
        self._limits = limits
        self._services: OrderedDict[str, _ServiceQueue] = OrderedDict()

    def set_limits(self, limits: Mapping[str, ServiceLimits]) -> None:
        """Apply other limits from the next decision on; what is active stays active."""
        self._limits = limits
        for name, service in self._services.items():
            service.limits = limits.get(name, ServiceLimits())
            for user_id in list(service.users):
                service.update_turn(user_id)

    def add(self, job: QueuedJob) -> None:
        """Put a job in line."""
        service, user = self._user(job)
        heapq.heappush(user.waiting, (-job.priority, job.id, job))
        service.update_turn(job.user_id)

    def next_for(self, offered: Collection[str] | None) -> QueuedJob | None:
        """Take the next job of the services ``offered`` (None: all); it counts as active.

        Returns None when no job may run now.
        """
        for name, service in self._services.items():
            if service.may_run() and (offered is None or name in offered):
                self._services.move_to_end(name)
                return self._take(service)
        return None

    def count_active(self, job: QueuedJob) -> None:
        """Count a job as active that did not come from :meth:`next_for` (after a restart)."""
        service, user = self._user(job)
        user.active += 1
        service.active += 1
        service.update_turn(job.user_id)

    def release(self, job: QueuedJob) -> None:
        """An active job is active no more."""
        service, user = self._user(job)
        user.active -= 1
        service.active -= 1
        service.update_turn(job.user_id)

    def remove(self, job: QueuedJob) -> bool:
        """Take a job out of the line; returns whether it was in it. O(n) of the user's queue."""
        service, user = self._user(job)
        left = [entry for entry in user.waiting if entry[1] != job.id]
        was_waiting = len(left) < len(user.waiting)
        heapq.heapify(left)
        user.waiting = left
        service.update_turn(job.user_id)
        return was_waiting

    def services(self) -> list[str]:
        """Return the services that have, or had, jobs."""
        return list(self._services)

    def counts_of_service(self, name: str) -> Counts:
        """Return the counts over all users of a service."""
        service = self._services.get(name)
        if service is None:
            return Counts()
        return Counts(sum(len(user.waiting) for user in service.users.values()), service.active)

    def _take(self, service: _ServiceQueue) -> QueuedJob:
        user_id, _ = service.turns.popitem(last=False)
        user = service.users[user_id]
        _, _, job = heapq.heappop(user.waiting)
        user.active += 1
        service.active += 1
        service.update_turn(user_id)
        return job

    def _user(self, job: QueuedJob) -> tuple[_ServiceQueue, _UserQueue]:
        service = self._services.get(job.service)
        if service is None:
            # a job of a service that is configured no more waits, it is not lost
            limits = self._limits.get(job.service, ServiceLimits())
            service = self._services[job.service] = _ServiceQueue(limits)
        return service, service.users.setdefault(job.user_id, _UserQueue())
