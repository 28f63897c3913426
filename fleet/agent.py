"""One agent as the server knows it: what it offers and has free, and what it holds."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from config import Settings
from fleet.attempt import Attempt
from fleet.connection import Connection
from fleet.health import Trust
from fleet.placement import Capacity
from jobs import NO_RESOURCES, Isolation, IsolationKind, IsolationOffer, Resources
from records import JobIdentity


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent as an operator sees it.

    ``services`` is None for all; ``busy`` is the number of slots in use, of ``slots``, which
    are 0 while it stops by itself. ``resources`` is all it has, ``used`` what its jobs have of
    it. ``heartbeat_age``: seconds since it was heard, None if not since the server started.
    ``load``: the load average of its machine. ``problem``: what keeps it from starting any job at
    all. ``lease_left``: seconds until the jobs of an agent that is away go to others.
    ``set_aside``: why it gets no jobs but one on trial now and then, since it lost the last ones;
    None if it is trusted. ``services_set_aside`` are services of which alone that is so there,
    each with the reason.
    """

    id: str
    name: str
    version: str | None
    services: tuple[str, ...] | None
    slots: int
    busy: int
    resources: Resources
    used: Resources
    jobs: tuple[JobIdentity, ...]
    is_connected: bool
    is_drained: bool
    heartbeat_age: float | None
    load: float | None
    problem: str | None
    connected_since: float | None
    address: str | None
    lease_left: float | None
    set_aside: str | None
    services_set_aside: tuple[tuple[str, str], ...]
    default_isolation: IsolationKind
    isolation: tuple[IsolationOffer, ...]
    problems: tuple[tuple[str, str], ...]


@dataclass(eq=False, slots=True)
class Agent:
    """An agent, connected or away. Away, it keeps its attempts until the lease runs out."""

    id: str
    name: str
    slots: int = 0
    resources: Resources | None = None  # None: it did not say; a core for each slot
    services: frozenset[str] | None = None
    connection: Connection | None = None
    reserved: Counter[str] = field(default_factory=Counter)  # slots for jobs on their way
    in_use: Resources = NO_RESOURCES  # by jobs that it holds, or that are on their way
    attempts: dict[int, Attempt] = field(default_factory=dict)
    version: str | None = None
    is_drained: bool = False
    heard_at: float | None = None
    default_isolation: IsolationKind = IsolationKind.NONE
    isolation: tuple[IsolationOffer, ...] = ()
    answers: dict[str, tuple[Isolation, str | None]] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)  # why, by service
    named: frozenset[str] = frozenset()  # of the services that are configured
    trust: Trust = field(default_factory=Trust)
    away_seconds: float = 0.0  # of its lease, how much has run
    lease_left: float | None = None  # None: it does not run

    def free_slots(self) -> int:
        """Return how many more jobs it could run now."""
        if self.is_drained or self.connection is None or not self.connection.is_welcomed:
            return 0
        now = asyncio.get_running_loop().time()
        return self.trust.own.allowed(self.slots, self.busy(), now)

    def busy(self) -> int:
        """Return how many slots are in use."""
        return self.reserved.total() + len(self.attempts)

    def total(self) -> Resources:
        """Return what it has for jobs."""
        return self.resources or Resources(self.slots)

    def reserve(self, service: str, needed: Resources) -> None:
        """Keep a slot and some of what it has for a job that is on its way."""
        self.reserved[service] += 1
        self.in_use += needed

    def release(self, service: str, needed: Resources) -> None:
        """The job came, as an attempt, or will not come."""
        self.reserved[service] -= 1
        self.in_use -= needed

    def capacity(self) -> Capacity:
        """Return what it has for jobs, and has free."""
        total, used = self.total(), self.in_use
        load = max(self.busy() / self.slots, used.cpus / max(total.cpus, 1))
        return Capacity(self.offered(), total, total - used, self.free_slots(), load)

    def offered(self) -> frozenset[str] | None:
        """Return the services that it may get jobs of now; None: of all."""
        withheld = {*self.unable, *filter(self.withholds, self.trust.services)}
        if not withheld:
            return self.services
        return (self.named if self.services is None else self.services) - withheld

    def names(self, service: str) -> bool:
        """Say whether it was told to run jobs of the service."""
        return self.services is None or service in self.services

    def offers(self, service: str) -> bool:
        """Say whether jobs of the service may run there."""
        return self.names(service) and service not in self.unable

    def withholds(self, service: str) -> bool:
        """Say whether it gets no job of the service now, as it could not begin the last ones."""
        if (health := self.trust.services.get(service)) is None:
            return False
        held = sum(attempt.job.service == service for attempt in self.attempts.values())
        busy = held + self.reserved[service]
        return not health.allows_another(busy, asyncio.get_running_loop().time())

    def judge(self, settings: Settings) -> None:
        """See which services it can offer, by what they ask for and what it said of that."""
        self.unable = {}
        for service, isolation in settings.isolations().items():
            asked, problem = self.answers.get(service, (None, None))
            if asked != isolation:
                self.unable[service] = "it has not yet said whether it can isolate jobs so"
            elif problem is not None:
                self.unable[service] = problem
        self.named = frozenset(settings.services)

    def takes_nothing_new(self) -> bool:
        """Say whether it drains, by itself or since an operator wants it."""
        return self.is_drained or not self.slots

    def may_get_jobs(self) -> bool:
        """Say whether it is there and gets jobs, now or once something is free."""
        is_there = self.connection is not None and self.connection.is_welcomed
        is_trusted = self.trust.own.set_aside() is None or self.free_slots() > 0
        return is_there and is_trusted and not self.takes_nothing_new()

    def is_needed(self) -> bool:
        """Say whether there is a reason to know it: what it does, or what was said of it."""
        is_known_for_more = self.is_drained or self.trust.is_in_doubt()
        return self.connection is not None or self.busy() > 0 or is_known_for_more

    def status(self) -> AgentStatus:
        """Return what an operator sees of it."""
        now = asyncio.get_running_loop().time()
        connection = self.connection
        heard_at = self.heard_at if connection is None else connection.heard_at
        return AgentStatus(
            id=self.id,
            name=self.name,
            version=self.version,
            services=None if self.services is None else tuple(sorted(self.services)),
            slots=self.slots,
            busy=self.busy(),
            resources=self.total(),
            used=self.in_use,
            jobs=tuple(attempt.job for attempt in self.attempts.values()),
            is_connected=connection is not None,
            is_drained=self.is_drained,
            heartbeat_age=None if heard_at is None else now - heard_at,
            load=None if connection is None else connection.load,
            problem=None if connection is None else connection.problem,
            connected_since=None if connection is None else connection.connected_at,
            address=None if connection is None else connection.address,
            default_isolation=self.default_isolation,
            isolation=self.isolation,
            problems=tuple(sorted(self.unable.items())),
            lease_left=self.lease_left,
            set_aside=self.trust.own.set_aside(),
            services_set_aside=tuple(
                (service, reason)
                for service, health in sorted(self.trust.services.items())
                if (reason := health.set_aside()) is not None
            ),
        )
