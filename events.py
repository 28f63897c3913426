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
from itertools import chain
from typing import Generic, TypeAlias, TypeVar

from jobs import Demand, JobState, Usage
from wire.frames import Stream


@dataclass(frozen=True, slots=True)
class Transition:
    """One line of a job's history; ``at`` in Unix seconds, ``before`` None for the first.

    ``id`` grows with every transition of any job. ``attempt`` is the number within the job.
    ``created_at``, ``started_at`` (of its last attempt), ``message`` and ``demand`` are what the
    job has from then on; they are known to the feed only. ``usage`` is what the attempt used, once
    it has ended and as far as that is known.
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
    message: str = field(default="", compare=False)
    demand: Demand = field(default=Demand(), compare=False)
    usage: Usage | None = field(default=None, compare=False)


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


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of what an attempt of a job wrote: ``data`` stands at ``start`` of its stream.

    ``attempt`` is the number within the job.
    """

    job_id: int
    attempt: int
    stream: Stream
    start: int
    data: bytes


@dataclass(frozen=True, slots=True)
class SmallResult:
    """A job's result, whole, as it was stored; told just before the job's end.

    Only to who waits for it: to read it again would take longer than all else of the answer.
    """

    job_id: int
    blob_id: int
    sha256: str
    content: bytes


Event: TypeAlias = Transition | AgentChange

E = TypeVar("E")


class Lagged(Exception):
    """The subscriber was too slow: events were lost to it, and it gets no more."""


class FeedClosed(Exception):
    """The server is stopping: nothing more will be told."""


class _Subscription(Generic[E]):
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[E] = deque()
        self._has_lagged = False
        self._is_closed = False
        self._wake = asyncio.Event()

    def add(self, event: E) -> None:
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

    async def next(self) -> E:
        """Wait for the next event.

        Raises :class:`Lagged` once events were lost, :class:`FeedClosed` after the last one.
        """
        await self._wait()
        return self._waiting.popleft()

    async def next_all(self) -> list[E]:
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


class Subscription(_Subscription[Event]):
    """What one subscriber has not taken yet, in order and bounded."""


class OutputSubscription(_Subscription[Output | Transition]):
    """What a follower of one stream of a job has not taken yet, in order and bounded."""


class EndSubscription(_Subscription[SmallResult | Transition]):
    """What one who waits for the end of a job has not taken yet, in order and bounded."""


S = TypeVar("S", Subscription, OutputSubscription, EndSubscription)


class Feed:
    """Passes on what happens to those who subscribed; costs nothing for those who did not."""

    def __init__(self) -> None:
        self._of_all: set[Subscription] = set()
        self._of_jobs: dict[int, set[Subscription | OutputSubscription | EndSubscription]] = {}
        self._of_ends: dict[int, set[EndSubscription]] = {}
        self._of_output: dict[tuple[int, Stream], set[OutputSubscription]] = {}
        self._followers: list[Callable[[Event], None]] = []
        self._is_closed = False

    def publish(self, announcements: Sequence[Event | Output | SmallResult]) -> None:
        """Tell the subscribers what has been committed, in its order."""
        for announced in announcements:
            match announced:
                case Output(job_id=job_id, stream=stream):
                    for reader in self._of_output.get((job_id, stream), ()):
                        reader.add(announced)
                case SmallResult(job_id=job_id):
                    for waiting in self._of_ends.get(job_id, ()):
                        waiting.add(announced)
                case _:
                    self._publish_event(announced)

    def _publish_event(self, event: Event) -> None:
        for follower in self._followers:
            follower(event)
        for subscription in self._of_all:
            subscription.add(event)
        if isinstance(event, Transition):
            for waiting in self._of_jobs.get(event.job_id, ()):
                waiting.add(event)

    def follow(self, follower: Callable[[Event], None]) -> None:
        """Call ``follower`` with every event from now on.

        It misses none, and hears of an event before the one who brought it about hears that
        it is committed. It must be quick and raise nothing.
        """
        self._followers.append(follower)

    def close(self) -> None:
        """End all subscriptions, present and future: the server is stopping."""
        self._is_closed = True
        for subscription in self._of_all:
            subscription.close()
        for waiting in chain.from_iterable(self._of_jobs.values()):
            waiting.close()

    @contextmanager
    def all_events(self, limit: int) -> Iterator[Subscription]:
        """Subscribe to everything; a subscriber that is ``limit`` events behind has lagged."""
        subscription = self._begun(Subscription(limit))
        self._of_all.add(subscription)
        try:
            yield subscription
        finally:
            self._of_all.discard(subscription)

    @contextmanager
    def transitions_of(self, job_id: int, limit: int) -> Iterator[Subscription]:
        """Subscribe to one job; a subscriber that is ``limit`` events behind has lagged."""
        subscription = self._begun(Subscription(limit))
        with _member(self._of_jobs, job_id, subscription):
            yield subscription

    @contextmanager
    def output_of(self, job_id: int, stream: Stream, limit: int) -> Iterator[OutputSubscription]:
        """Subscribe to what a job writes and to its transitions, in the order of both."""
        subscription = self._begun(OutputSubscription(limit))
        with (
            _member(self._of_jobs, job_id, subscription),
            _member(self._of_output, (job_id, stream), subscription),
        ):
            yield subscription

    @contextmanager
    def end_of(self, job_id: int, limit: int) -> Iterator[EndSubscription]:
        """Subscribe to the transitions of a job, and to its result if that is small."""
        subscription = self._begun(EndSubscription(limit))
        with (
            _member(self._of_jobs, job_id, subscription),
            _member(self._of_ends, job_id, subscription),
        ):
            yield subscription

    def _begun(self, subscription: S) -> S:
        if self._is_closed:
            subscription.close()
        return subscription


K = TypeVar("K")
M = TypeVar("M")


@contextmanager
def _member(groups: dict[K, set[M]], key: K, member: M) -> Iterator[None]:
    groups.setdefault(key, set()).add(member)
    try:
        yield
    finally:
        groups[key].discard(member)
        if not groups[key]:
            del groups[key]
