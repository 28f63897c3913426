"""Who runs what when: which agent gets which job, leases, termination.

:class:`Dispatcher` applies the policy of ``scheduler.py`` whenever something happened (an
upload, an agent, a freed slot) and owns the leases. What an agent says comes from its
:class:`session.Session`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import config
import jobs
from config import Settings, SettingsInForce
from events import AgentChangeKind, Event, Transition
from fleet.session import Agent, AgentSocket, AgentStatus, Attempt, Session
from fleet.snapshot_relay import IncomingSnapshot, SnapshotUnavailable
from records import (
    Assignment,
    IllegalTransition,
    JobRequest,
    JobStatus,
    KnownAgent,
    Loss,
    StoreFull,
    StoreUnavailable,
    Submission,
    Superseded,
    UserQueue,
)
from scheduler import Counts, FairQueue, FreeSlots
from store import Store, Upload
from wire import messages

log = logging.getLogger("orchestrator.dispatch")

T = TypeVar("T")

_SETTLE_SECONDS = 0.05
_STORE_RETRY_SECONDS = 1.0
_TERMINATED = "Job terminated"


class AlreadyFinal(Exception):
    """The job has ended, so it can't be terminated; ``state`` says how."""

    def __init__(self, state: jobs.JobState) -> None:
        super().__init__(f"the job is {state} already")
        self.state = state


class Dispatcher:
    """Gives queued jobs to agents. Run :meth:`run` beside the API."""

    def __init__(self, store: Store, settings: SettingsInForce) -> None:
        self.store = store
        self._settings = settings
        self._queue = FairQueue(settings.current.services)
        self._free_slots = FreeSlots()
        self._agents: dict[str, Agent] = {}
        self._held: dict[int, tuple[Agent, Attempt]] = {}  # by job id
        self._wake = asyncio.Event()
        self._sessions: set[Session] = set()
        self._tasks: asyncio.TaskGroup
        self._is_loaded = asyncio.Event()
        settings.on_change(self._apply_limits)

    @property
    def settings(self) -> Settings:
        """The settings that hold now."""
        return self._settings.current

    async def run(self) -> None:
        """Load the state, then schedule at every event; ends by cancellation only."""
        await self._load()
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._is_loaded.set()
            while True:
                self._wake.clear()
                self._schedule()
                await self._wake.wait()

    async def close(self) -> None:
        """Tell all agents that the server goes away; they keep their jobs and come back."""
        sessions = list(self._sessions)
        await asyncio.gather(*(session.close("server is stopping") for session in sessions))

    async def wait_loaded(self) -> None:
        """Wait until :meth:`run` has read the state; no job may change before."""
        await self._is_loaded.wait()

    async def serve_agent(self, socket: AgentSocket, address: str) -> None:
        """Talk to one agent until its connection ends."""
        session = Session(self, socket, address)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)

    # --- what operators ask

    def agents(self) -> list[AgentStatus]:
        """Return the agents that are connected, hold jobs, or are drained."""
        return [agent.status() for agent in self._agents.values()]

    def active_jobs(self) -> list[tuple[str, jobs.JobState]]:
        """Return service and state of each job that an agent holds."""
        return [
            (attempt.job.service, attempt.state)
            for agent in self._agents.values()
            for attempt in agent.attempts.values()
        ]

    def services_with_jobs(self) -> list[str]:
        """Return the services that have jobs, configured or not."""
        return [name for name in self._queue.services() if self.counts_of_service(name) != Counts()]

    def counts_of_service(self, name: str) -> Counts:
        """Return how many jobs of a service wait and are active."""
        return self._queue.counts_of_service(name)

    def why_waiting(self, line: UserQueue) -> str:
        """Say in words what a job in this line waits for."""
        connected = [agent for agent in self._agents.values() if agent.session is not None]
        offering = [agent for agent in connected if agent.offers(line.service)]
        limits = self.settings.services.get(line.service)
        user = self._queue.counts_of_line(line).active
        service = self._queue.counts_of_service(line.service).active
        if limits is None:
            return "this service is not configured"
        if not connected:
            return "no agent is connected"
        if not offering:
            return "no agent offers this service"
        if all(agent.takes_nothing_new() for agent in offering):
            return "all agents that offer this service are drained"
        if user >= limits.runs_per_user:
            return f"user limit {user} of {limits.runs_per_user}"
        if service >= limits.max_runs:
            return f"service limit {service} of {limits.max_runs}"
        if all(agent.free_slots() <= 0 for agent in offering):
            return "all slots busy"
        return "next"

    async def drain(self, name: str) -> list[AgentStatus]:
        """Give nothing new to the agents of this name or id; lasts until :meth:`resume`.

        Returns all of them, connected ones first; none if there was never one. Those that
        are away are drained, too.
        """
        return self._note_drained(await self.store.agents.set_drained(name, True), True)

    async def resume(self, name: str) -> list[AgentStatus]:
        """Give jobs again to the agents of this name or id; returns them as :meth:`drain`."""
        return self._note_drained(await self.store.agents.set_drained(name, False), False)

    def _note_drained(self, known: list[KnownAgent], is_drained: bool) -> list[AgentStatus]:
        found = [self._agents.setdefault(k.id, Agent(k.id, k.name)) for k in known]
        for agent in found:
            agent.is_drained = is_drained
            self.note_slots(agent)
            event = "agent_drained" if is_drained else "agent_resumed"
            log.info("event=%s agent=%s id=%s", event, agent.name, agent.id)
        statuses = [agent.status() for agent in found]
        for agent in found:
            self._forget_if_gone(agent)
        return sorted(statuses, key=lambda status: not status.is_connected)

    # --- scheduling

    def _apply_limits(self) -> None:
        self._queue.set_limits(self.settings.services)
        self._warn_of_lines_that_stand_still()
        self._wake.set()

    def _warn_of_lines_that_stand_still(self) -> None:
        for service in self.services_with_jobs():
            waiting = self.counts_of_service(service).waiting
            if waiting and service not in self.settings.services:
                log.warning(
                    "event=service_not_configured service=%s jobs_waiting=%d"
                    " advice='configure it again, or terminate them'",
                    service,
                    waiting,
                )

    async def _load(self) -> None:
        for active in await self.store.attempts.active():
            self._queue.count(active.job.queue, waiting=0, active=1)
            agent = self._agents.setdefault(
                active.agent_id, Agent(active.agent_id, active.agent_name)
            )
            self._hold(agent, Attempt.of(active))
        for known in await self.store.agents.drained():
            agent = self._agents.setdefault(known.id, Agent(known.id, known.name))
            agent.is_drained = True
        for line, waiting in (await self.store.jobs.queue_lengths()).items():
            self._queue.count(line, waiting, active=0)
        self.store.feed.follow(self._follow)
        self._warn_of_lines_that_stand_still()
        for agent in self._agents.values():
            if agent.attempts:
                self._start_lease(agent)
        log.info("event=dispatcher_ready agents_awaited=%d", len(self._agents))

    def _follow(self, event: Event) -> None:
        if isinstance(event, Transition):
            self._queue.follow(event)
            if event.after not in jobs.ACTIVE_STATES:
                self._wake.set()

    def _schedule(self) -> None:
        while (line := self._queue.next_for(self._free_slots.offer)) is not None:
            self._give(line)

    # --- what users hand in

    async def submit(self, upload: Upload, request: JobRequest, message: str) -> Submission:
        """Store a job with its files; one that may run at once is given out along with that.

        Raises as :meth:`Upload.commit`.
        """
        if upload.is_small():
            self._decide_ahead(UserQueue(request.service, request.user_id))
        return await upload.commit(request, message, self.settings.max_queued_jobs)

    async def rerun(self, source_id: int, request: JobRequest, message: str) -> Submission:
        """Store a job that has the input of another; raises as :meth:`Uploads.rerun`."""
        self._decide_ahead(UserQueue(request.service, request.user_id))
        limit = self.settings.max_queued_jobs
        return await self.store.uploads.rerun(source_id, request, message, limit)

    def _decide_ahead(self, line: UserQueue) -> None:
        """Have a job that is about to be stored given out along with that, if it may run at once.

        Call it in the turn of the event loop that hands the job to the store: what makes the
        attempt then stands right behind it, and both are one transaction. If no job comes after
        all, nothing has happened.
        """
        self._schedule()  # who waits goes first
        if self._queue.decide_ahead(line, self._free_slots.offer):
            self._give(line)

    def _give(self, line: UserQueue) -> None:
        """Give the next job of a line to the least loaded agent that offers its service."""
        agent = self._agents[self._free_slots.least_loaded(line.service)]
        agent.reserved += 1
        self.note_slots(agent)
        self._tasks.create_task(self._assign(line, agent), name=f"assign to {agent.name}")

    async def _assign(self, line: UserQueue, agent: Agent) -> None:
        assignment = await self._begin_next(line, agent)
        agent.reserved -= 1
        if assignment is None:
            self._queue.take_back(line)
        else:
            self._deliver(assignment, agent)
        self.note_slots(agent)
        self._forget_if_gone(agent)

    async def _begin_next(self, line: UserQueue, agent: Agent) -> Assignment | None:
        try:
            return await self.store.attempts.begin_next(line, agent.id, f"to agent {agent.name}")
        except (StoreFull, StoreUnavailable) as error:
            log.warning("event=assign_failed agent=%s error=%r", agent.name, str(error))
            await asyncio.sleep(_STORE_RETRY_SECONDS)
            return None

    def _deliver(self, assignment: Assignment, agent: Agent) -> None:
        attempt = Attempt(
            assignment.job, assignment.attempt_id, assignment.number, may_have_result=False
        )
        self._hold(agent, attempt)
        log.info(
            "event=assigned job=%d attempt=%d number=%d agent=%s",
            attempt.job.id,
            attempt.id,
            attempt.number,
            agent.name,
        )
        if agent.session is None:
            if agent.lease is None:
                self._start_lease(agent)
        elif agent.session.is_welcomed:
            agent.session.assign(attempt, assignment)
        # else: the welcome finds that the agent does not hold it, and gives it back

    def _hold(self, agent: Agent, attempt: Attempt) -> None:
        agent.attempts[attempt.id] = attempt
        self._held[attempt.job.id] = agent, attempt

    def note_slots(self, agent: Agent) -> None:
        """Take note of a change of an agent's slots, attempts or connection, and schedule."""
        if agent.free_slots() > 0:
            self._free_slots.put(agent.id, agent.load(), agent.services)
            self._wake.set()
        else:
            self._free_slots.discard(agent.id)

    async def durably(self, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write of the store until there is room for it; other errors pass."""
        while True:
            try:
                return await write()
            except (StoreFull, StoreUnavailable) as error:
                log.warning(
                    "event=store_failed error=%r retry_s=%g", str(error), _STORE_RETRY_SECONDS
                )
                await asyncio.sleep(_STORE_RETRY_SECONDS)

    # --- what sessions report

    async def admit(self, session: Session, hello: messages.Hello) -> Agent | messages.Refused:
        """Take an agent in, or say why not. Its lease stops while it is connected."""
        if refusal := self._refusal(hello):
            return refusal
        agent = self._known_agent(hello)
        while (present := agent.session) is not None:
            if present.instance != hello.instance and await present.is_alive():
                return messages.Refused(
                    f"an agent with this identity is connected already, from {present.address}",
                    retry=True,
                )
            await present.close("replaced by a newer connection")
            await present.has_ended.wait()
            agent = self._known_agent(hello)  # without attempts it was forgotten meanwhile
        agent.session = session
        agent.name = hello.name
        agent.version = hello.version
        agent.slots = hello.slots
        agent.services = None if hello.services is None else frozenset(hello.services)
        if agent.lease is not None:
            agent.lease.cancel()
            agent.lease = None
        try:
            await self.durably(lambda: self.store.agents.record_connection(agent.id, agent.name))
        except BaseException:
            self.detach(session, agent)
            raise
        return agent

    def _known_agent(self, hello: messages.Hello) -> Agent:
        return self._agents.setdefault(hello.agent_id, Agent(hello.agent_id, hello.name))

    def _refusal(self, hello: messages.Hello) -> messages.Refused | None:
        if hello.protocol != messages.PROTOCOL_VERSION:
            return messages.Refused(
                f"agent speaks protocol {hello.protocol}, server {messages.PROTOCOL_VERSION}:"
                " install the same version on both",
                retry=False,
            )
        try:
            config.checked_agent_name(hello.name)
        except config.ConfigError as error:
            return messages.Refused(str(error), retry=False)
        if not 0 <= hello.slots <= 4096 or not 1 <= len(hello.agent_id) <= 64:
            return messages.Refused("slots or agent id out of range", retry=False)
        return None

    def detach(self, session: Session, agent: Agent) -> None:
        """A connection ended: the agent's lease begins to run."""
        if agent.session is not session:
            return
        agent.session = None
        agent.heard_at = session.heard_at
        self.note_slots(agent)
        self.note_change(agent, AgentChangeKind.DISCONNECTED)
        if agent.attempts:
            self._start_lease(agent)
        self._forget_if_gone(agent)

    def _forget_if_gone(self, agent: Agent) -> None:
        is_needed = agent.session is not None or agent.attempts or agent.reserved
        if not is_needed and not agent.is_drained:
            self._agents.pop(agent.id, None)

    def note_change(self, agent: Agent, kind: AgentChangeKind) -> None:
        """Write down what happened to an agent, without waiting for it."""
        write = self.durably(lambda: self.store.agents.record_change(agent.id, agent.name, kind))
        self._tasks.create_task(write, name=f"note that {agent.name} is {kind}")

    def forget(self, agent: Agent, attempt: Attempt) -> None:
        """An attempt ended for good: free its slot."""
        _, held = self._held.get(attempt.job.id, (agent, None))
        if held is attempt:
            del self._held[attempt.job.id]
        if agent.attempts.pop(attempt.id, None) is not None:
            self.note_slots(agent)
        attempt.ended.set()

    async def give_back(self, agent: Agent, attempt: Attempt, loss: Loss, reason: str) -> None:
        """An attempt was lost: queue its job again, unless it was the last allowed try."""
        limit = self.settings.max_attempts
        try:
            state = await self.durably(
                lambda: self.store.attempts.requeue(attempt.id, loss, reason, limit)
            )
        except Superseded:
            self.forget(agent, attempt)
            return
        log.warning(
            "event=attempt_lost job=%d attempt=%d agent=%s state=%s reason=%r",
            attempt.job.id,
            attempt.id,
            agent.name,
            state,
            reason,
        )
        self.forget(agent, attempt)

    # --- files of jobs that run

    @asynccontextmanager
    async def snapshot(self, job_id: int) -> AsyncIterator[IncomingSnapshot]:
        """Get the files of a job as they are now from the agent that runs it.

        Raises :class:`SnapshotUnavailable` if no agent runs it, or that agent is away.
        """
        if job_id not in self._held:
            raise SnapshotUnavailable("no agent runs the job at this moment; try again")
        agent, attempt = self._held[job_id]
        if agent.session is None or not agent.session.is_welcomed:
            raise SnapshotUnavailable(f"agent {agent.name}, which runs the job, is away")
        async with agent.session.snapshot(attempt) as incoming:
            yield incoming

    # --- termination

    async def terminate(self, job_id: int) -> JobStatus | None:
        """End a job; returns once it can neither run nor deliver a result any more.

        Returns None for an unknown job, raises :class:`AlreadyFinal` for one that has ended.
        """
        was_asked = False
        while True:
            status = await self.store.jobs.status(job_id)
            if status is None:
                return None
            if was_asked and status.state is jobs.JobState.KILLED:
                return status
            if jobs.has_ended(status.state):
                raise AlreadyFinal(status.state)
            was_asked = True
            if job_id in self._held:
                await self._terminate_active(*self._held[job_id])
            elif await self.durably(lambda: self.store.jobs.withdraw(job_id, _TERMINATED)):
                log.info("event=killed job=%d", job_id)
            else:
                # it has just been given to an agent, or left it: look again, without spinning
                await asyncio.sleep(_SETTLE_SECONDS)

    async def _terminate_active(self, agent: Agent, attempt: Attempt) -> None:
        """Let the agent end the job; if it does not, see to it that the attempt counts no more."""
        if agent.session is not None and await agent.session.kill(attempt):
            return
        # if it has just ended by itself, the caller finds that out
        with suppress(IllegalTransition):
            await self.durably(lambda: self.store.jobs.kill(attempt.job.id, _TERMINATED))
            log.info("event=killed job=%d", attempt.job.id)
        if agent.session is not None:
            agent.session.expect_remains(attempt)
        self.forget(agent, attempt)

    # --- leases

    def _start_lease(self, agent: Agent) -> None:
        loop = asyncio.get_running_loop()
        agent.lease = loop.call_later(self.settings.lease, self._on_lease_end, agent)

    def _on_lease_end(self, agent: Agent) -> None:
        agent.lease = None
        self._tasks.create_task(self._end_lease(agent), name=f"end lease of {agent.name}")

    async def _end_lease(self, agent: Agent) -> None:
        log.warning("event=lease_ended agent=%s attempts=%d", agent.name, len(agent.attempts))
        if agent.session is None:
            self.note_change(agent, AgentChangeKind.LOST)
        reason = f"agent {agent.name} was away for more than {self.settings.lease:g} s"
        for attempt in list(agent.attempts.values()):
            if agent.session is not None:
                return  # it came back while the attempts before were given back
            await self.give_back(agent, attempt, Loss.AGENT_AWAY, reason)
        self._forget_if_gone(agent)
