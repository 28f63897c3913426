"""The end of jobs on request: queued ones at once, others through their agents."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress

from fleet.agent import Agent
from fleet.attempt import Attempt
from fleet.roster import Roster
from fleet.storing import until_stored
from jobs import JobState, has_ended
from records import IllegalTransition, JobStatus
from telemetry.logs import event

log = logging.getLogger("orchestrator.fleet")

_LOOK_AGAIN_SECONDS = 0.05
_TERMINATED = "Job terminated"


class AlreadyFinal(Exception):
    """The job has ended, so it can't be terminated; ``state`` says how."""

    def __init__(self, state: JobState) -> None:
        super().__init__(f"the job is already {state}")
        self.state = state


class Termination:
    """Ends jobs, whoever has them."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._store = roster.store

    async def terminate(self, job_id: int) -> JobStatus | None:
        """End a job; returns once it can no longer run or deliver a result.

        Returns None for an unknown job, raises :class:`AlreadyFinal` for one that has ended.
        """
        was_asked = False
        while True:
            status = await self._store.jobs.status(job_id)
            if status is None:
                return None
            if was_asked and status.state is JobState.KILLED:
                return status
            if has_ended(status.state):
                raise AlreadyFinal(status.state)
            was_asked = True
            if (holder := self._roster.holder_of(job_id)) is not None:
                await self._terminate_active(*holder)
            elif await until_stored(lambda: self._store.jobs.withdraw(job_id, _TERMINATED)):
                event(log, "killed", job=job_id)
            else:
                # it has just been given to an agent, or left it: look again, without spinning
                await asyncio.sleep(_LOOK_AGAIN_SECONDS)

    async def terminate_many(self, job_ids: Sequence[int]) -> int:
        """End those of some jobs that have not ended; returns how many it ended.

        Returns once none of them can any longer run or deliver a result.
        """
        withdrawn = await until_stored(lambda: self._store.jobs.withdraw_many(job_ids, _TERMINATED))
        if withdrawn:
            event(log, "killed_many", jobs=len(withdrawn), first=min(withdrawn))
        others = sorted(set(job_ids) - set(withdrawn))
        return len(withdrawn) + sum(await asyncio.gather(*map(self._has_terminated, others)))

    async def _has_terminated(self, job_id: int) -> bool:
        try:
            return await self.terminate(job_id) is not None
        except AlreadyFinal:
            return False

    async def _terminate_active(self, agent: Agent, attempt: Attempt) -> None:
        """Let the agent end the job; if it does not, see to it that the attempt counts no more."""
        if agent.connection is not None and await agent.connection.kill(attempt):
            return
        # if it has just ended by itself, the caller finds that out
        with suppress(IllegalTransition):
            await until_stored(lambda: self._store.jobs.kill(attempt.job.id, _TERMINATED))
            event(log, "killed", job=attempt.job.id, attempt=attempt.id, agent=agent.name)
        if agent.connection is not None:
            agent.connection.remains[attempt.id] = attempt
        self._roster.forget(agent, attempt)
