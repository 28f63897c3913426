"""What happened: transitions of jobs and changes of agents, and the feed that tells of them.

The store publishes here what it has committed, never before; whoever waits for
something (a request with ``?wait``, a stream of events) subscribes.
"""

from __future__ import annotations

import asyncio
import enum
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from protocol import JobState


@dataclass(frozen=True, slots=True)
class Transition:
    """One line of a job's history; ``at`` in Unix seconds, ``before`` None for the first.

    ``id`` grows with every transition of any job. ``attempt`` is the number within the job.
    ``created_at`` and ``started_at`` (of its last attempt) are the job's, known to the feed only.
    """

    id: int
    job_id: int
    user_id: int
    service: str
    attempt: int
    at: float
    before: JobState | None
    after: JobState
    reason: str
    created_at: float | None = field(default=None, compare=False)
    started_at: float | None = field(default=None, compare=False)


class AgentChangeKind(enum.StrEnum):
    """What happened to an agent."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    LOST = "lost"
    DRAINING = "draining"
    RESUMED = "resumed"


@dataclass(frozen=True, slots=True)
class AgentChange:
    """One line of the agents' history; ``id`` grows with every change of any agent."""

    id: int
    agent_id: str
    name: str
    at: float
    kind: AgentChangeKind


Event: TypeAlias = Transition | AgentChange


class Lagged(Exception):
    """The subscriber was too slow: events were lost to it, and it gets no more."""


class FeedClosed(Exception):
    """The server is stopping: nothing more will be told."""


class Subscription:
    """What one subscriber has not taken yet, in order and bounded."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[Event] = deque()
        self._has_lagged = False
        self._is_closed = False
        self._wake = asyncio.Event()

    def add(self, event: Event) -> None:
        """For :class:`Feed`: one more event, or the end if there are too many."""
        if len(self._waiting) >= self._limit:
            self._has_lagged = True
        else:
            self._waiting.append(event)
        self._wake.set()

    def close(self) -> None:
        """For :class:`Feed`: no more events will come."""
        self._is_closed = True
        self._wake.set()

    async def next(self) -> Event:
        """Wait for the next event.

        Raises :class:`Lagged` once events were lost, :class:`FeedClosed` after the last one.
        """
        await self._wait()
        return self._waiting.popleft()

    async def next_all(self) -> list[Event]:
        """Wait until there is an event and take all that are there; raises as :meth:`next`."""
        await self._wait()
        events = list(self._waiting)
        self._waiting.clear()
        return events

    async def _wait(self) -> None:
        while not self._waiting:
            if self._has_lagged:
                raise Lagged
            if self._is_closed:
                raise FeedClosed
            self._wake.clear()
            await self._wake.wait()


class Feed:
    """Passes on what happens to those who subscribed; costs nothing for those who did not."""

    def __init__(self) -> None:
        self._of_all: set[Subscription] = set()
        self._of_jobs: dict[int, set[Subscription]] = {}
        self._followers: list[Callable[[Event], None]] = []
        self._is_closed = False

    def publish(self, events: Sequence[Event]) -> None:
        """Tell the subscribers what has been committed, in its order."""
        for event in events:
            for follower in self._followers:
                follower(event)
            for subscription in self._of_all:
                subscription.add(event)
            if isinstance(event, Transition) and event.job_id in self._of_jobs:
                for subscription in self._of_jobs[event.job_id]:
                    subscription.add(event)

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Call ``follower`` with every event from now on.

        It misses none, and hears of an event before the one who brought it about hears that
        it is committed. It must be quick and raise nothing.
        """
        self._followers.append(follower)

    def close(self) -> None:
        """End all subscriptions, present and future: the server is stopping."""
        self._is_closed = True
        for subscriptions in (self._of_all, *self._of_jobs.values()):
            for subscription in subscriptions:
                subscription.close()

    @contextmanager
    def all_events(self, limit: int) -> Iterator[Subscription]:
        """Subscribe to everything; a subscriber that is ``limit`` events behind has lagged."""
        subscription = self._new_subscription(limit)
        self._of_all.add(subscription)
        try:
            yield subscription
        finally:
            self._of_all.discard(subscription)

    @contextmanager
    def transitions_of(self, job_id: int, limit: int) -> Iterator[Subscription]:
        """Subscribe to one job; a subscriber that is ``limit`` events behind has lagged."""
        subscription = self._new_subscription(limit)
        self._of_jobs.setdefault(job_id, set()).add(subscription)
        try:
            yield subscription
        finally:
            self._of_jobs[job_id].discard(subscription)
            if not self._of_jobs[job_id]:
                del self._of_jobs[job_id]

    def _new_subscription(self, limit: int) -> Subscription:
        subscription = Subscription(limit)
        if self._is_closed:
            subscription.close()
        return subscription
