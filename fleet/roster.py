"""The agents as the server knows them: who is connected, who is away, and what each holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from config import Settings, SettingsInForce
from events import AgentChangeKind
from fleet.attempt import Attempt
from fleet.connection import Connection
from fleet.greeting import hello_problem
from fleet.health import Health
from fleet.placement import Capacity
from fleet.storing import until_stored
from jobs import NO_RESOURCES, Isolation, IsolationKind, IsolationOffer, JobState, Resources
from records import JobIdentity, KnownAgent, Loss, Superseded
from store import Store
from telemetry.logs import event
from wire import messages

log = logging.getLogger("orchestrator.fleet")


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent as an operator sees it.

    ``services`` is None for all; ``busy`` is the number of slots in use, of ``slots``, which
    are 0 while it stops by itself. ``resources`` is all it has, ``used`` what its jobs have of
    it. ``heartbeat_age``: seconds since it was heard, None if not since the server started.
    ``load``: the load average of its machine. ``problem``: what keeps it from starting any job
    at all. ``lease_left``: seconds
    until the jobs of an agent that is away go to others. ``set_aside``: why it gets no jobs but
    one on trial now and then, since it lost the last ones; None if it is trusted.
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
    reserved: int = 0  # slots for jobs that are on their way
    in_use: Resources = NO_RESOURCES  # by jobs that it holds, or that are on their way
    attempts: dict[int, Attempt] = field(default_factory=dict)
    version: str | None = None
    is_drained: bool = False
    heard_at: float | None = None
    default_isolation: IsolationKind = IsolationKind.NONE
    isolation: tuple[IsolationOffer, ...] = ()
    answers: dict[str, tuple[Isolation, str | None]] = field(default_factory=dict)
    unable: dict[str, str] = field(default_factory=dict)  # why, by service
    offered: frozenset[str] | None = None
    health: Health = field(default_factory=Health)
    away_seconds: float = 0.0  # of its lease, how much has run
    lease_left: float | None = None  # None: it does not run

    def free_slots(self) -> int:
        """Return how many more jobs it could run now."""
        if self.is_drained or self.connection is None or not self.connection.is_welcomed:
            return 0
        now = asyncio.get_running_loop().time()
        return self.health.allowed(self.slots, self.busy(), now)

    def busy(self) -> int:
        """Return how many slots are in use."""
        return self.reserved + len(self.attempts)

    def total(self) -> Resources:
        """Return what it has for jobs."""
        return self.resources or Resources(self.slots)

    def reserve(self, needed: Resources) -> None:
        """Keep a slot and some of what it has for a job that is on its way."""
        self.reserved += 1
        self.in_use += needed

    def release(self, needed: Resources) -> None:
        """The job came, as an attempt, or will not come."""
        self.reserved -= 1
        self.in_use -= needed

    def capacity(self) -> Capacity:
        """Return what it has for jobs, and has free."""
        total, used = self.total(), self.in_use
        load = max(self.busy() / self.slots, used.cpus / max(total.cpus, 1))
        return Capacity(self.offered, total, total - used, self.free_slots(), load)

    def names(self, service: str) -> bool:
        """Say whether it was told to run jobs of the service."""
        return self.services is None or service in self.services

    def offers(self, service: str) -> bool:
        """Say whether jobs of the service may run there."""
        return self.names(service) and service not in self.unable

    def judge(self, settings: Settings) -> None:
        """See which services it can offer, by what they ask for and what it said of that."""
        self.unable = {}
        for service, isolation in settings.isolations().items():
            asked, problem = self.answers.get(service, (None, None))
            if asked != isolation:
                self.unable[service] = "it has not yet said whether it can isolate jobs so"
            elif problem is not None:
                self.unable[service] = problem
        self.offered = self.services
        if self.unable:
            named = settings.services if self.services is None else self.services
            self.offered = frozenset(named) - self.unable.keys()

    def takes_nothing_new(self) -> bool:
        """Say whether it drains, by itself or since an operator wants it."""
        return self.is_drained or not self.slots

    def may_get_jobs(self) -> bool:
        """Say whether it is there and gets jobs, now or once something is free."""
        is_there = self.connection is not None and self.connection.is_welcomed
        is_trusted = self.health.set_aside() is None or self.free_slots() > 0
        return is_there and is_trusted and not self.takes_nothing_new()

    def is_needed(self) -> bool:
        """Say whether there is a reason to know it: what it does, or what was said of it."""
        is_known_for_more = self.is_drained or self.health.losses > 0
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
            set_aside=self.health.set_aside(),
        )


class Roster:
    """All agents that are connected, hold attempts or are drained. Run :meth:`run` beside it."""

    def __init__(
        self, store: Store, settings: SettingsInForce, on_change: Callable[[Agent], None]
    ) -> None:
        """``on_change`` is told of each agent that came, left, or has other free slots."""
        self.store = store
        self._settings = settings
        self._on_change = on_change
        self._agents: dict[str, Agent] = {}
        self._holders: dict[int, tuple[Agent, Attempt]] = {}  # by job id
        self._unwritten: asyncio.Queue[tuple[Agent, AgentChangeKind]] = asyncio.Queue()

    @property
    def settings(self) -> Settings:
        """The settings that hold now."""
        return self._settings.current

    async def load(self) -> None:
        """Read which agents hold attempts, and which are drained."""
        for active in await self.store.attempts.active():
            self.hold(self._known(active.agent_id, active.agent_name), Attempt.of(active))
        for agent_id, seconds in (await self.store.agents.absences()).items():
            if agent_id in self._agents:
                self._agents[agent_id].away_seconds = seconds
        for known in await self.store.agents.drained():
            self._known(known.id, known.name).is_drained = True

    async def run(self) -> None:
        """Write the history of the agents, in its order; ends by cancellation only."""
        while True:
            agent, kind = await self._unwritten.get()
            id_, name = agent.id, agent.name
            await until_stored(lambda: self.store.agents.record_change(id_, name, kind))  # noqa: B023 - awaited at once

    def __iter__(self) -> Iterator[Agent]:
        return iter(list(self._agents.values()))

    def __getitem__(self, agent_id: str) -> Agent:
        return self._agents[agent_id]

    def holder_of(self, job_id: int) -> tuple[Agent, Attempt] | None:
        """Return the agent that holds a job, and its attempt; None if no agent does."""
        return self._holders.get(job_id)

    # --- connections

    async def admit(
        self, connection: Connection, hello: messages.Hello
    ) -> Agent | messages.Refused:
        """Take an agent in, or say why not. Its lease stops while it is connected."""
        if problem := hello_problem(hello):
            return messages.Refused(problem, retry=False)
        if not await self.store.agents.is_secret_of(hello.agent_id, hello.secret):
            return _wrong_secret(hello)
        agent = self._known(hello.agent_id, hello.name)
        while (present := agent.connection) is not None:
            if present.instance != hello.instance and await present.is_alive():
                return messages.Refused(
                    f"an agent with this identity is already connected, from {present.address}",
                    retry=True,
                )
            await present.close("replaced by a newer connection")
            await present.ended.wait()
            agent = self._known(hello.agent_id, hello.name)  # it may have been forgotten meanwhile
        agent.connection = connection
        agent.name = hello.name
        agent.version = hello.version
        agent.slots = hello.slots
        agent.resources = hello.resources
        agent.services = None if hello.services is None else frozenset(hello.services)
        agent.default_isolation = hello.default_isolation
        agent.isolation = hello.isolation
        agent.answers = {}
        agent.judge(self.settings)
        self._on_change(agent)
        is_recorded = False
        try:
            is_recorded = await until_stored(
                lambda: self.store.agents.record_connection(agent.id, agent.name, hello.secret)
            )
        finally:
            if not is_recorded:
                self.detach(connection, agent)
        return agent if is_recorded else _wrong_secret(hello)

    def detach(self, connection: Connection, agent: Agent) -> None:
        """A connection ended; the agent keeps what it holds for the time of its lease."""
        if agent.connection is not connection:
            return
        agent.connection = None
        agent.heard_at = connection.heard_at
        self.write_change(agent, AgentChangeKind.DISCONNECTED)
        self.changed(agent)

    def stop_giving(self, agent: Agent) -> None:
        """The agent itself said that it takes nothing new."""
        self.write_change(agent, AgentChangeKind.DRAINING)
        agent.slots = 0
        self.changed(agent)

    def follow_settings(self) -> None:
        """Ask agents what they make of what services ask for now."""
        for agent in self:
            if agent.connection is not None and agent.connection.is_welcomed:
                agent.connection.ask_for_isolation()
            agent.judge(self.settings)
            self.changed(agent)

    def take_answer(self, agent: Agent, answer: messages.ServiceChecked) -> None:
        """The agent said whether it can isolate the jobs of a service as that asks."""
        connection = agent.connection
        if connection is None or answer.number != connection.asked_number:
            return  # the settings have changed since; it was asked again
        if (isolation := connection.asked.get(answer.service)) is not None:
            agent.answers[answer.service] = isolation, answer.problem
            agent.judge(self.settings)
            self.changed(agent)

    def write_change(self, agent: Agent, kind: AgentChangeKind) -> None:
        """Add to the history of the agents, without waiting for it."""
        self._unwritten.put_nowait((agent, kind))

    def changed(self, agent: Agent) -> None:
        """The agent's connection, slots or attempts are others than before."""
        self._on_change(agent)
        if not agent.is_needed():
            self._agents.pop(agent.id, None)

    async def set_drained(self, name: str, is_drained: bool) -> list[AgentStatus]:
        """Give nothing new to the agents of a name or id, or give them jobs again."""
        known = await self.store.agents.set_drained(name, is_drained)
        found = [self._drain(agent, is_drained) for agent in known]
        statuses = [agent.status() for agent in found]
        for agent in found:
            self.changed(agent)
        return sorted(statuses, key=lambda status: not status.is_connected)

    def _drain(self, known: KnownAgent, is_drained: bool) -> Agent:
        agent = self._known(known.id, known.name)
        agent.is_drained = is_drained
        name = "agent_drained" if is_drained else "agent_resumed"
        event(log, name, agent=agent.name, id=agent.id)
        return agent

    def _known(self, agent_id: str, name: str) -> Agent:
        return self._agents.setdefault(agent_id, Agent(agent_id, name))

    # --- what an agent holds

    def hold(self, agent: Agent, attempt: Attempt) -> None:
        """The attempt is the agent's from now on."""
        agent.attempts[attempt.id] = attempt
        agent.in_use += attempt.demand.resources
        self._holders[attempt.job.id] = agent, attempt

    def forget(self, agent: Agent, attempt: Attempt) -> None:
        """An attempt ended for good: free its slot."""
        holder = self._holders.get(attempt.job.id)
        if holder is not None and holder[1] is attempt:
            del self._holders[attempt.job.id]
        if agent.attempts.pop(attempt.id, None) is not None:
            agent.in_use -= attempt.demand.resources
            self.changed(agent)
        attempt.ended.set()

    async def fail(self, agent: Agent, attempt: Attempt, message: str) -> None:
        """A job can't go on anywhere: end it."""
        with suppress(Superseded):
            await until_stored(lambda: self.store.attempts.fail(attempt.id, message))
            event(
                log,
                "failed",
                level=logging.WARNING,
                job=attempt.job.id,
                attempt=attempt.id,
                agent=agent.name,
                message=message,
            )
        self.forget(agent, attempt)

    async def give_back(self, agent: Agent, attempt: Attempt, loss: Loss, reason: str) -> None:
        """An attempt was lost: queue its job again, unless it was the last allowed try."""
        limit = self.settings.max_attempts
        try:
            state = await until_stored(
                lambda: self.store.attempts.requeue(attempt.id, loss, reason, limit)
            )
        except Superseded:
            self.forget(agent, attempt)
            return
        event(
            log,
            "attempt_lost",
            level=logging.WARNING,
            job=attempt.job.id,
            attempt=attempt.id,
            agent=agent.name,
            state=state,
            reason=reason,
        )
        if loss is Loss.REPORTED:
            self._distrust(agent, attempt, reason)
        self.forget(agent, attempt)

    def started(self, agent: Agent) -> None:
        """An agent started the process of a job."""
        if agent.health.start():
            self._trust_again(agent)

    def delivered(self, agent: Agent) -> None:
        """An agent delivered a result."""
        if agent.health.recover():
            self._trust_again(agent)

    def _trust_again(self, agent: Agent) -> None:
        event(log, "agent_trusted_again", agent=agent.name)
        self.changed(agent)

    def _distrust(self, agent: Agent, attempt: Attempt, reason: str) -> None:
        """An agent lost an attempt for a reason of its own: give it nothing for a while."""
        loop = asyncio.get_running_loop()
        was_started = attempt.state is JobState.RUNNING
        pause = agent.health.lose(reason, loop.time(), was_started=was_started)
        event(
            log,
            "agent_set_aside" if agent.health.set_aside() else "agent_backs_off",
            level=logging.WARNING,
            agent=agent.name,
            losses=agent.health.losses,
            reason=reason,
            retry_s=pause,
        )
        loop.call_later(pause, self._end_pause, agent)

    def _end_pause(self, agent: Agent) -> None:
        """An agent may have a job on trial; one that went away meanwhile may begin anew."""
        if self._agents.get(agent.id) is agent:
            if agent.connection is None:
                agent.health.recover()
            self.changed(agent)


def _wrong_secret(hello: messages.Hello) -> messages.Refused:
    return messages.Refused(
        f"agent id {hello.agent_id!r:.80} belongs to an agent with another secret; give this agent"
        " a work directory of its own, or the secret that stands in the one of the other",
        retry=False,
    )
