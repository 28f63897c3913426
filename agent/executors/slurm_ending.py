"""When a job in Slurm has ended, and what an end without a record means.

*Not listed is not ended.* What ends a job is its exit record. Without one, its end is unknown until
Slurm has confirmed it in so many words.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from agent.executors.records import supervisor_errors
from agent.executors.slurm_commands import SlurmJob, SlurmRecord, SlurmSilent, Standing
from agent.executors.slurm_host import SubmitHost
from agent.executors.slurm_records import SlurmRecords
from agent.outcomes import Exit, ExitKind, JobLost

log = logging.getLogger("orchestrator.slurm")

_FORGOTTEN_SECONDS = 60.0  # as long must Slurm not know a job
CONFIRM_SECONDS = 10.0
"""Between two questions for one job."""

_MESSAGE_CHARACTERS = 300

_FINAL_WORDS = {
    "CANCELLED": "cancelled in Slurm",
    "TIMEOUT": "ended by Slurm at its time limit",
    "DEADLINE": "ended by Slurm at its deadline",
    "OUT_OF_MEMORY": "ended by Slurm for the memory it used",
}
"""Ends that somebody wanted, or that would come again if the job were run once more."""


class Ending:
    """Watches for the end of one job."""

    def __init__(self, records: SlurmRecords, host: SubmitHost) -> None:
        self.since = float("-inf")
        """An answer of squeue to an older question need not have the job."""
        self._records = records
        self._watch = host.watch
        self._commands = host.commands
        self._output = host.output / f"{records.path.name}.log"
        self._asked_at = float("-inf")
        self._forgotten_at: float | None = None

    def jobs(self) -> tuple[SlurmJob, ...]:
        """Return what was listed last of the job: the one that has the attempt, if one has."""
        name, number = self._records.name(), self._records.claimed_by()
        jobs = self._watch.listing.named(name) if name is not None else ()
        return tuple(job for job in jobs if number in (None, job.id))

    def seems_to_have_come(self) -> bool:
        """Whether the last answer of squeue does not show the job as one that waits or runs."""
        return self._watch.listing.begun > self.since and not any(
            job.standing in (Standing.WAITS, Standing.RUNS) for job in self.jobs()
        )

    async def confirmed(self) -> SlurmRecord | None:
        """Return what Slurm says of the job if that is its end; None if that is not certain."""
        if self._watch.listing.begun <= self.since:
            return None
        if any(job.standing is not Standing.ENDED for job in self.jobs()):
            self._forgotten_at = None
            return None
        if now() < self._asked_at + CONFIRM_SECONDS:
            return None
        return await self._ask()

    async def _ask(self) -> SlurmRecord | None:
        """Ask for the job by its number; returns what Slurm says if that is its end."""
        number, name = self._records.number(), self._records.name()
        self._asked_at = now()
        if number is None or name is None:
            return None
        try:
            record = await self._commands.record(number, name)
        except SlurmSilent as error:
            self._records.log("end_unconfirmed", {"slurm": number, "error": str(error)})
            return None
        if record.state is not None:
            self._forgotten_at = None
            return record if record.has_ended else None
        if self._forgotten_at is None:
            self._forgotten_at = now()
        # a slurmctld that has just been restored from an old state learns of jobs from their nodes
        return record if now() >= self._forgotten_at + _FORGOTTEN_SECONDS else None

    def judge(self, ended: SlurmRecord) -> Exit:
        """Say what an end without a record means. Raises :class:`JobLost` if it is no last one."""
        number = self._records.number()
        if ended.state is None:
            raise JobLost(f"Slurm no longer knows job {number}, which left no exit record")
        reason = (
            f"{ended.state}, {ended.reason}" if ended.reason not in ("", "None") else ended.state
        )
        if words := _FINAL_WORDS.get(ended.state.split(maxsplit=1)[0]):
            return Exit(ExitKind.ENDED_OUTSIDE, message=f"{words}: job {number} is {reason}")
        said = self._what_node_said()
        raise JobLost(f"Slurm job {number} ended without an exit record: {reason}{said}")

    def _what_node_said(self) -> str:
        said = supervisor_errors(self._records.path)
        with suppress(OSError):
            said = said or " ".join(self._output.read_text(errors="replace").split())
        return f"; it said: {said[-_MESSAGE_CHARACTERS:]}" if said else ""


def now() -> float:
    """Return the time of the event loop's clock."""
    return asyncio.get_running_loop().time()
