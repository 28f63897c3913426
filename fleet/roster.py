"""The agents as the server knows them: who is connected, who is away, and what each holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress

from config import Settings, SettingsInForce
from events import AgentChangeKind
from fleet.agent import Agent, AgentStatus
from fleet.attempt import Attempt
from fleet.connection import Connection
from fleet.greeting import hello_problem
from fleet.storing import until_stored
from jobs import JobState
from records import KnownAgent, Loss, Superseded
from store import Store
from telemetry.logs import event
from wire import messages

log = logging.getLogger("orchestrator.fleet")


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
            agent.trust.services.clear()  # what was wrong with one may be mended
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
        if loss is not Loss.AGENT_AWAY:
            self._distrust(agent, attempt, loss, reason)
        self.forget(agent, attempt)

    def began(self, agent: Agent, attempt: Attempt) -> None:
        """An agent started the process of a job, or had a cluster take it; may be repeated."""
        if attempt.is_begun:
            return  # what began long ago says nothing of what it can begin now
        attempt.is_begun = True
        if agent.trust.begin(attempt.job.service):
            self._trust_again(agent, attempt)

    def delivered(self, agent: Agent, attempt: Attempt) -> None:
        """An agent delivered a result."""
        if agent.trust.recover(attempt.job.service):
            self._trust_again(agent, attempt)

    def _trust_again(self, agent: Agent, attempt: Attempt) -> None:
        event(log, "agent_trusted_again", agent=agent.name, service=attempt.job.service)
        self.changed(agent)

    def _distrust(self, agent: Agent, attempt: Attempt, loss: Loss, reason: str) -> None:
        """Give an agent nothing for a while, or nothing of one service if that is at fault."""
        loop = asyncio.get_running_loop()
        service = attempt.job.service if loss is Loss.BY_SERVICE else None
        health = agent.trust.own if service is None else agent.trust.doubt(service)
        was_started = attempt.state is JobState.RUNNING
        pause = health.lose(reason, loop.time(), was_started=was_started)
        whose = "agent" if service is None else "service"
        event(
            log,
            f"{whose}_set_aside" if health.set_aside() else f"{whose}_backs_off",
            level=logging.WARNING,
            agent=agent.name,
            service=attempt.job.service,
            losses=health.losses,
            reason=reason,
            retry_s=pause,
        )
        loop.call_later(pause, self._end_pause, agent)

    def _end_pause(self, agent: Agent) -> None:
        """An agent may have a job on trial; one that went away meanwhile may begin anew."""
        if self._agents.get(agent.id) is agent:
            if agent.connection is None:
                agent.trust.begin_anew()
            self.changed(agent)


def _wrong_secret(hello: messages.Hello) -> messages.Refused:
    return messages.Refused(
        f"agent id {hello.agent_id!r:.80} belongs to an agent with another secret; give this agent"
        " a work directory of its own, or the secret that stands in the one of the other",
        retry=False,
    )
