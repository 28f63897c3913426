"""How long agents that are away keep their jobs: leases, and what happens at their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from events import AgentChangeKind
from fleet.agent import Agent
from fleet.roster import Roster
from records import Loss, StoreFull, StoreUnavailable
from telemetry.logs import event

log = logging.getLogger("orchestrator.fleet")

_LONGEST_STEP_SECONDS = 1.0
_STEPS_OF_A_LEASE = 20
_RETURN_SECONDS = 6.0
"""What a living agent may need to connect again after a start of the server."""


class Leases:
    """The leases of all agents that are away and hold attempts. Run :meth:`run` beside it.

    A lease is counted in short steps of time in which the server could have heard the agent. A
    server that stood still (a paused machine, a stopped process) counts none of that time, and
    reads what has come meanwhile in the steps that follow. How much has run is stored, so that
    one that starts again and again gives up dead agents all the same.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._running: dict[str, Agent] = {}
        self._wake = asyncio.Event()
        self._has_run_on = asyncio.Event()
        self._stored: dict[str, float] = {}

    def watch(self, agent: Agent) -> None:
        """An agent came, left, or holds other attempts: start or stop its lease."""
        if agent.connection is None and agent.attempts:
            if agent.lease_left is None:
                lease = self._roster.settings.lease
                least = min(lease / 2, _RETURN_SECONDS)
                agent.lease_left = max(lease - agent.away_seconds, least)
                self._running[agent.id] = agent
                self._wake.set()
        else:
            agent.lease_left = None
            agent.away_seconds = 0.0
            self._running.pop(agent.id, None)
            self._stored.pop(agent.id, None)

    async def run(self) -> None:
        """End the leases that have run out; ends by cancellation only."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_absences_stored(), name="store absences")
            while True:
                if not self._running:
                    self._wake.clear()
                    await self._wake.wait()
                step = min(_LONGEST_STEP_SECONDS, self._roster.settings.lease / _STEPS_OF_A_LEASE)
                before = loop.time()
                await asyncio.sleep(step)
                for agent in self._run_on(min(loop.time() - before, 2 * step)):
                    del self._running[agent.id]
                    tasks.create_task(self._end(agent), name=f"end lease of {agent.name}")
                self._has_run_on.set()

    def _run_on(self, seconds: float) -> Iterable[Agent]:
        """Let some time pass; returns the agents whose leases it ends."""
        ended = []
        for agent in self._running.values():
            assert agent.lease_left is not None
            agent.away_seconds += seconds
            agent.lease_left = max(0.0, agent.lease_left - seconds)
            if not agent.lease_left:
                ended.append(agent)
        return ended

    async def _keep_absences_stored(self) -> None:
        while True:
            await self._has_run_on.wait()
            self._has_run_on.clear()
            await self._store_absences()

    async def _store_absences(self) -> None:
        """Remember how much of the leases has run, about once a second."""
        absences = {
            agent.id: agent.away_seconds
            for agent in self._running.values()
            if agent.away_seconds - self._stored.get(agent.id, 0.0) >= _LONGEST_STEP_SECONDS
        }
        if not absences:
            return
        try:
            await self._roster.store.agents.record_absences(absences)
        except (StoreFull, StoreUnavailable) as error:
            event(log, "absences_not_stored", level=logging.WARNING, error=str(error))
        else:
            self._stored.update(absences)

    async def _end(self, agent: Agent) -> None:
        if agent.connection is not None:
            return
        lease = self._roster.settings.lease
        event(
            log,
            "lease_ended",
            level=logging.WARNING,
            agent=agent.name,
            attempts=len(agent.attempts),
        )
        self._roster.write_change(agent, AgentChangeKind.LOST)
        reason = f"agent {agent.name} was away for more than {lease:g} s"
        # it may come back, or get one that was on its way, while others are given back
        while agent.connection is None and agent.attempts:
            attempt = next(iter(agent.attempts.values()))
            await self._roster.give_back(agent, attempt, Loss.AGENT_AWAY, reason)
