"""How long agents that are away keep their jobs: leases, and what happens at their end."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from events import AgentChangeKind
from fleet.roster import Agent, Roster
from records import Loss
from telemetry.logs import event

log = logging.getLogger("orchestrator.fleet")


class Leases:
    """The leases of all agents that are away and hold attempts. Run :meth:`run` beside it."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._running: dict[str, Agent] = {}
        self._wake = asyncio.Event()

    def watch(self, agent: Agent) -> None:
        """An agent came, left, or holds other attempts: start or stop its lease."""
        if agent.connection is None and agent.attempts:
            if agent.lease_ends_at is None:
                now = asyncio.get_running_loop().time()
                agent.lease_ends_at = now + self._roster.settings.lease
                self._running[agent.id] = agent
                self._wake.set()
        else:
            agent.lease_ends_at = None
            self._running.pop(agent.id, None)

    async def run(self) -> None:
        """End the leases that have run out; ends by cancellation only."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._wake.clear()
                for agent in self._run_out(loop.time()):
                    del self._running[agent.id]
                    tasks.create_task(self._end(agent), name=f"end lease of {agent.name}")
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(self._next_end()):
                        await self._wake.wait()

    def _run_out(self, now: float) -> list[Agent]:
        return [agent for agent in self._running.values() if (agent.lease_ends_at or 0) <= now]

    def _next_end(self) -> float | None:
        ends = [agent.lease_ends_at for agent in self._running.values()]
        return min((end for end in ends if end is not None), default=None)

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
