"""Who runs what when: which agent gets which job, and the end of jobs on request.

:class:`Dispatcher` applies the policy of ``scheduler.py`` whenever something happened (an
upload, an agent, a freed slot). The agents, what they hold and their leases are in ``fleet/``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager

import jobs
from config import ServiceLimits, Settings, SettingsInForce
from events import Event, Transition
from fleet.agent import Agent, AgentStatus
from fleet.attempt import Attempt
from fleet.connection import AgentSocket, Connection
from fleet.leases import Leases
from fleet.placement import Placement
from fleet.roster import Roster
from fleet.session import Session
from fleet.snapshot_relay import SnapshotRelay, SnapshotUnavailable
from fleet.storing import STORE_RETRY_SECONDS
from fleet.termination import Termination
from fleet.waiting_reasons import why_waiting
from jobs import NO_RESOURCES, Demand, Resources
from records import (
    Assignment,
    JobRequest,
    JobStatus,
    KnownAgent,
    StoreFull,
    StoreUnavailable,
    Submission,
    UserQueue,
)
from scheduler import Counts, Decision, FairQueue
from store import Store, Upload
from telemetry.logs import event

log = logging.getLogger("orchestrator.dispatch")


class Dispatcher:
    """Gives queued jobs to agents. Run :meth:`run` beside the API."""

    def __init__(self, store: Store, settings: SettingsInForce) -> None:
        self.store = store
        self._settings = settings
        self._queue = FairQueue(settings.current.services)
        self._placement = Placement()
        self._roster = Roster(store, settings, self._follow_agent)
        self._leases = Leases(self._roster)
        self._termination = Termination(self._roster)
        self._connections: set[Connection] = set()
        self._wake = asyncio.Event()
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
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._roster.run(), name="roster")
            self._tasks.create_task(self._leases.run(), name="leases")
            self._is_loaded.set()
            while True:
                self._wake.clear()
                self._schedule()
                await self._wake.wait()

    async def close(self) -> None:
        """Tell all agents that the server goes away; they keep their jobs and come back."""
        closing = (connection.close("server is stopping") for connection in self._connections)
        await asyncio.gather(*closing)

    async def wait_loaded(self) -> None:
        """Wait until :meth:`run` has read the state; no job may change before."""
        await self._is_loaded.wait()

    async def serve_agent(self, socket: AgentSocket, address: str) -> None:
        """Talk to one agent until its connection ends."""
        connection = Connection(self.store, self._settings, socket, address)
        self._connections.add(connection)
        try:
            await Session(self._roster, connection, socket).run()
        finally:
            self._connections.discard(connection)

    # --- what operators ask

    def agents(self) -> list[AgentStatus]:
        """Return the agents that are connected, hold jobs, or are drained."""
        return [agent.status() for agent in self._roster]

    def active_jobs(self) -> list[tuple[str, jobs.JobState]]:
        """Return service and state of each job that an agent holds."""
        return [
            (attempt.job.service, attempt.state)
            for agent in self._roster
            for attempt in agent.attempts.values()
        ]

    def services_with_jobs(self) -> list[str]:
        """Return the services that have jobs, configured or not."""
        return [name for name in self._queue.services() if self.counts_of_service(name) != Counts()]

    def counts_of_service(self, name: str) -> Counts:
        """Return how many jobs of a service wait and are active."""
        return self._queue.counts_of_service(name)

    def why_waiting(self, queue: UserQueue, resources: Resources) -> str:
        """Say in words what a queued job waits for."""
        return why_waiting(
            self._roster,
            queue.service,
            resources,
            self.settings.services.get(queue.service),
            self._queue.counts_of_queue(queue).active,
            self._queue.counts_of_service(queue.service).active,
        )

    async def drain(self, name: str) -> list[AgentStatus]:
        """Give nothing new to the agents of this name or id; lasts until :meth:`resume`.

        Returns all of them, connected ones first; none if there was never one. Those that
        are away are drained, too.
        """
        return await self._roster.set_drained(name, is_drained=True)

    async def resume(self, name: str) -> list[AgentStatus]:
        """Give jobs again to the agents of this name or id; returns them as :meth:`drain`."""
        return await self._roster.set_drained(name, is_drained=False)

    # --- scheduling

    def _apply_limits(self) -> None:
        self._queue.set_limits(self.settings.services)
        self._roster.follow_settings()
        self._warn_of_services_that_stand_still()
        self._wake.set()

    def _warn_of_services_that_stand_still(self) -> None:
        for service in self.services_with_jobs():
            waiting = self.counts_of_service(service).waiting
            if waiting and service not in self.settings.services:
                event(
                    log,
                    "service_not_configured",
                    level=logging.WARNING,
                    service=service,
                    jobs_waiting=waiting,
                    advice="configure it again, or terminate them",
                )

    async def _load(self) -> None:
        await self._roster.load()
        for agent in self._roster:
            for attempt in agent.attempts.values():
                self._queue.count_active(attempt.job.queue)
        for (queue, demand), waiting in (await self.store.jobs.queue_lengths()).items():
            self._queue.count_queued(queue, demand, waiting)
        self.store.feed.follow(self._follow)
        self._warn_of_services_that_stand_still()
        awaited = list(self._roster)
        for agent in awaited:
            self._roster.changed(agent)
        event(log, "dispatcher_ready", agents_awaited=len(awaited))

    def _follow(self, happened: Event) -> None:
        if isinstance(happened, Transition):
            self._queue.follow(happened)
            if happened.after not in jobs.ACTIVE_STATES:
                self._wake.set()

    def _follow_agent(self, agent: Agent) -> None:
        """An agent came, left, or has other things free than before."""
        self._leases.watch(agent)
        if agent.may_get_jobs():
            self._placement.put(agent.id, agent.capacity())
        else:
            self._placement.discard(agent.id)
        self._wake.set()

    def _schedule(self) -> None:
        while (decision := self._queue.next_for(self._placement)) is not None:
            self._carry_out(decision)

    # --- what users hand in

    async def submit(self, upload: Upload, request: JobRequest, message: str) -> Submission:
        """Store a job with its files; one that may run at once is given out along with that.

        Raises as :meth:`Upload.commit`.
        """
        request = self._with_resources(request)
        if upload.is_small():
            self._decide_ahead(request)
        return await upload.commit(request, message, self.settings.max_queued_jobs)

    async def rerun(self, source_id: int, request: JobRequest, message: str) -> Submission:
        """Store a job that has the input of another; raises as :meth:`Uploads.rerun`."""
        request = self._with_resources(request)
        self._decide_ahead(request)
        limit = self.settings.max_queued_jobs
        return await self.store.uploads.rerun(source_id, request, message, limit)

    def _with_resources(self, request: JobRequest) -> JobRequest:
        """Fill in what the service says where the submitter asked for nothing."""
        limits = self.settings.services.get(request.service, ServiceLimits())
        resources = limits.needs(request.cpus, request.memory, request.gpus)
        return dataclasses.replace(request, resources=resources)

    def _decide_ahead(self, request: JobRequest) -> None:
        """Have a job that is about to be stored given out along with that, if it may run at once.

        To be called in the turn of the event loop that hands the job to the store: what makes
        the attempt then stands right behind it, and both are one transaction. If no job comes
        after all, nothing has happened.
        """
        self._schedule()  # who waits goes first
        queue = UserQueue(request.service, request.user_id)
        demand = Demand(request.resources)
        if decision := self._queue.decide_ahead(queue, demand, self._placement):
            self._carry_out(decision)

    def _carry_out(self, decision: Decision) -> None:
        """Keep room for what is decided, and have the store say which job it is."""
        reserved: dict[str, Resources] = {}
        for demand, agent_id in decision.offers.items():
            before = reserved.get(agent_id, NO_RESOURCES)
            reserved[agent_id] = before.at_least(demand.resources)
        agents = {self._roster[agent_id]: needed for agent_id, needed in reserved.items()}
        for agent, needed in agents.items():
            agent.reserve(decision.queue.service, needed)
            self._roster.changed(agent)
        self._tasks.create_task(self._assign(decision, agents), name=f"assign {decision.queue}")

    async def _assign(self, decision: Decision, agents: Mapping[Agent, Resources]) -> None:
        assignment = await self._begin_next(decision, agents)
        for agent, needed in agents.items():
            agent.release(decision.queue.service, needed)
        if assignment is None:
            self._queue.take_back(decision)
        else:
            self._queue.carried_out(decision, assignment.demand)
            self._deliver(assignment, self._roster[assignment.agent_id])
        for agent in agents:
            self._roster.changed(agent)

    async def _begin_next(self, decision: Decision, agents: Iterable[Agent]) -> Assignment | None:
        names = {agent.id: agent.name for agent in agents}
        offers = {
            demand: KnownAgent(agent_id, names[agent_id])
            for demand, agent_id in decision.offers.items()
        }
        try:
            return await self.store.attempts.begin_next(decision.queue, offers)
        except (StoreFull, StoreUnavailable) as error:
            event(
                log,
                "assign_failed",
                level=logging.WARNING,
                service=decision.queue.service,
                user=decision.queue.user_id,
                error=str(error),
                retry_s=STORE_RETRY_SECONDS,
            )
            await asyncio.sleep(STORE_RETRY_SECONDS)
            return None

    def _deliver(self, assignment: Assignment, agent: Agent) -> None:
        attempt = Attempt(
            assignment.job,
            assignment.attempt_id,
            assignment.number,
            assignment.demand,
            may_have_result=False,
        )
        self._roster.hold(agent, attempt)
        event(
            log,
            "assigned",
            job=attempt.job.id,
            attempt=attempt.id,
            number=attempt.number,
            agent=agent.name,
        )
        if agent.connection is not None and agent.connection.is_welcomed:
            agent.connection.assign(attempt, assignment)
        # else: its lease runs, or the welcome finds that it does not hold it, and gives it back

    def why_not_running(self, job_id: int) -> str | None:
        """Say why a job that an agent has does not run yet, if the agent says so."""
        holder = self._roster.holder_of(job_id)
        return None if holder is None else holder[1].waiting_reason

    # --- files of jobs that run

    @asynccontextmanager
    async def snapshot(self, job_id: int) -> AsyncIterator[SnapshotRelay]:
        """Get the files of a job as they are now from the agent that runs it.

        Raises :class:`SnapshotUnavailable` if no agent runs it, or that agent is away.
        """
        holder = self._roster.holder_of(job_id)
        if holder is None:
            raise SnapshotUnavailable("no agent runs the job at this moment; try again")
        agent, attempt = holder
        if agent.connection is None or not agent.connection.is_welcomed:
            raise SnapshotUnavailable(f"agent {agent.name}, which runs the job, is away")
        async with agent.connection.snapshot(attempt) as relay:
            yield relay

    # --- termination

    async def terminate(self, job_id: int) -> JobStatus | None:
        """End a job; see :meth:`Termination.terminate`."""
        return await self._termination.terminate(job_id)

    async def terminate_many(self, job_ids: Sequence[int]) -> int:
        """End some jobs; see :meth:`Termination.terminate_many`."""
        return await self._termination.terminate_many(job_ids)
