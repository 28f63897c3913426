"""Jobs run by a Slurm cluster: one batch job for each attempt, in it our own supervisor.

The agent is on a machine that may submit; the work directory is on a file system that the nodes
share with it. In an attempt's directory lie, beside what every executor has:

    slurm-name    a link whose text is the batch job's name   (it may have been submitted)
    slurm-id      a link whose text is its number             (it was submitted)
    order, slurm-claim, nothing-left                          see on_node.py

*Not listed is not ended.* What ends a job is its exit record. Without one, its end is unknown until
Slurm has confirmed it in so many words and the file system has had time to show the record.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from agent import plain_files
from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Command, Execution, Executor
from agent.executors.records import supervisor_errors, usage_record
from agent.executors.slurm_commands import (
    SlurmCommands,
    SlurmJob,
    SlurmRecord,
    SlurmSilent,
    Standing,
    SubmissionRefused,
)
from agent.executors.slurm_records import SlurmRecords, name_in
from agent.executors.slurm_submission import Request, batch_script
from agent.executors.slurm_watch import SlurmWatch
from agent.outcomes import Exit, ExitKind, JobLost
from jobs import MAX_CPUS, MAX_GPUS, MAX_MEMORY_BYTES, Resources, Usage
from runtime import PASSED_PREFIXES, PASSED_VARIABLES
from telemetry.logs import event

log = logging.getLogger("orchestrator.slurm")

_ON_NODE = Path(__file__).parents[1] / "supervision" / "on_node.py"
_SUBMISSIONS_AT_A_TIME = 4
_SETTLE_SECONDS = 5.0  # for a submission whose answer was lost to be seen by squeue
_FIRST_RETRY_SECONDS = 5.0
_LAST_RETRY_SECONDS = 120.0
_FORGOTTEN_SECONDS = 60.0  # as long must Slurm not know a job
_CONFIRM_SECONDS = 10.0  # between two questions for one job
_LOOK_SECONDS = 1.0
_MESSAGE_CHARACTERS = 300
_CANCEL_AGAIN_SECONDS = 30.0
_CANCEL_LOOK_SECONDS = 2.0
_ABANDONED_SECONDS = 120.0
_KILL_MARGIN_SECONDS = 10.0

_FINAL_WORDS = {
    "CANCELLED": "cancelled in Slurm",
    "TIMEOUT": "ended by Slurm at its time limit",
    "DEADLINE": "ended by Slurm at its deadline",
    "OUT_OF_MEMORY": "ended by Slurm for the memory it used",
}
"""Ends that somebody wanted, or that would come again if the job were run once more."""

_PASSED_ON_NODE = (*PASSED_VARIABLES, "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_PASSED_PREFIXES_ON_NODE = (*PASSED_PREFIXES, "SLURM_")


FILE_SYSTEM_SECONDS = 60.0
"""An NFS client asks again after that long at the latest (nfs(5), acdirmax)."""


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How jobs are submitted: the operator's options for all, and for a service in addition."""

    options: tuple[str, ...] = ()
    service_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    python: str = sys.executable
    """The Python that runs the supervisor, by its path on the nodes."""
    file_system_seconds: float = FILE_SYSTEM_SECONDS
    """How long the file system may take to show here what a node wrote."""

    def options_for(self, service: str) -> tuple[str, ...]:
        """Return the options for a job of a service; of two alike the last counts."""
        return (*self.options, *self.service_options.get(service, ()))


class SlurmExecutor(Executor):
    """Runs jobs on the nodes of a cluster."""

    name = "slurm"
    is_remote = True

    def __init__(
        self, workdir: Path, commands: SlurmCommands, settings: SlurmSettings, preparing: str
    ) -> None:
        """``preparing`` names the module whose ``prepare`` takes a command's preparation."""
        self.commands = commands
        self.settings = settings
        self.preparing = preparing
        self.notices = workdir / "notices"
        self.output = workdir / "slurm"
        self.watch = SlurmWatch(commands, self.notices)
        self.submitting = asyncio.Semaphore(_SUBMISSIONS_AT_A_TIME)

    async def run(self) -> None:
        """Ask Slurm about all jobs, and look for the notices of the nodes."""
        self.output.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self.watch.run()

    def resources(self) -> Resources:
        """Return what no job exceeds: Slurm knows what the cluster has."""
        return Resources(MAX_CPUS, MAX_MEMORY_BYTES, MAX_GPUS)

    def problem(self) -> str | None:
        """Say since when Slurm gives no answer."""
        return self.watch.problem()

    def execution(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt in Slurm."""
        return SlurmExecution(directory, self)

    async def end_abandoned(self, attempt: Path) -> None:
        """Cancel what was submitted for an attempt of which nothing else is known."""
        plain_files.mark(attempt / "kill")
        name = name_in(attempt)
        if name is None:
            return
        try:
            async with asyncio.timeout(_ABANDONED_SECONDS):
                while await self._is_listed(name):
                    await self.commands.cancel_named(name)
                    await asyncio.sleep(_CANCEL_LOOK_SECONDS)
        except SlurmSilent as error:
            raise OSError(errno.EAGAIN, f"Slurm does not answer: {error}") from None
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"Slurm has not ended the job {name}") from None

    async def _is_listed(self, name: str) -> bool:
        jobs = await self.commands.jobs()
        return any(job.name == name and job.standing is not Standing.ENDED for job in jobs)

    def close(self) -> None:
        """Do nothing: jobs in Slurm need nobody."""


class SlurmExecution(Execution):
    """One attempt as a batch job."""

    def __init__(self, directory: AttemptDirectory, executor: SlurmExecutor) -> None:
        self._directory = directory
        self._executor = executor
        self._watch = executor.watch
        self._commands = executor.commands
        self._path = directory.path
        self._records = SlurmRecords(directory)
        self._since = float("-inf")  # an older listing need not have the job
        self._asked_at = float("-inf")
        self._forgotten_at: float | None = None

    def is_started(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return self._records.is_started()

    def check_adopted(self) -> None:
        """Raise :class:`JobLost` for what had not left this machine when it went down."""
        if not self._records.was_submitted():
            self._directory.check_boot()

    # --- start

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        """Submit the job and wait until it runs; returns its end if it never will."""
        self._directory.claim(SlurmExecutor.name)
        with self._watch.watching(self._path.name) as news:
            if self._number() is None:
                await self._submit_once(command, on_reason)
            self._since = _now()
            while True:
                news.clear()
                self._records.refresh()
                if self.is_started():
                    return None
                if (ended := await self._end_without_record(news)) is not None:
                    return None if self.is_started() else ended
                on_reason(self._why_waiting())
                await self._wait_for(news)

    async def _submit_once(self, command: Command, on_reason: Callable[[str], None]) -> None:
        """Have the job in Slurm once, whatever answers get lost."""
        is_new, name = self._records.take_name()
        if not is_new and await self._is_found(name):
            return
        self._records.write_order(command)
        pause = _FIRST_RETRY_SECONDS
        while True:
            on_reason("being handed to Slurm")
            try:
                async with self._executor.submitting:
                    number = await self._commands.submit(
                        self._script(command), self._request(name, command).arguments()
                    )
            except SubmissionRefused as error:
                if not error.is_temporary:
                    raise JobLost(f"Slurm refused the job: {error}") from None
                on_reason(f"Slurm takes no more jobs for now: {error}")
            except SlurmSilent as error:
                self._log("submission_unanswered", {"error": str(error)})
                on_reason(f"not certain yet whether Slurm has the job: {error}")
                if await self._is_found(name):
                    return
            else:
                self._note_number(number)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_RETRY_SECONDS)

    async def _is_found(self, name: str) -> bool:
        """Look for the job of an earlier submission, until it is seen or settled that it is not."""
        asked = _now()
        for moment in (asked, asked + _SETTLE_SECONDS):
            listing = await self._watch.listing_after(moment)
            if jobs := listing.named(name):
                self._note_number(jobs[-1].id)
                return True
        return False

    def _script(self, command: Command) -> str:
        limit = "by-us" if command.timeout_seconds is not None else "by-slurm"
        return batch_script(
            [
                *(self._executor.settings.python, "-E", "-s", "-S", str(_ON_NODE)),
                *(str(self._path), str(self._executor.notices), limit, self._executor.preparing),
                *(",".join(_PASSED_ON_NODE), ",".join(_PASSED_PREFIXES_ON_NODE)),
            ]
        )

    def _request(self, name: str, command: Command) -> Request:
        settings, assign = self._executor.settings, self._directory.assign
        return Request(
            name=name,
            directory=self._executor.output,
            output=self._output(),
            resources=assign.resources,
            timeout_seconds=command.timeout_seconds,
            grace_seconds=command.grace_seconds,
            options=settings.options_for(assign.service),
        )

    def _why_waiting(self) -> str:
        place = f"in Slurm as {self._number()}"
        if (problem := self._watch.problem()) is not None:
            return f"{place}; {problem}"
        for job in self._jobs():
            match job.standing:
                case Standing.WAITS:
                    reason = job.reason if job.reason not in ("", "None") else "not considered yet"
                    return f"{place}: {reason}"
                case Standing.RUNS:
                    return f"{place}: starts on {job.node}"
                case _:
                    return f"{place}: {job.state}"
        return place

    # --- wait

    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended."""
        with self._watch.watching(self._path.name) as news:
            self._since = max(self._since, _now())
            while True:
                news.clear()
                self._records.refresh()
                if self._records.is_nothing_left():
                    if (record := self._records.exit()) is not None:
                        return record
                    self._watch.hurry()
                if (ended := await self._end_without_record(news)) is not None:
                    return ended
                await self._wait_for(news)

    async def _end_without_record(self, news: asyncio.Event) -> Exit | None:
        """Return the job's end once Slurm has confirmed it and the file system had its grace.

        None as long as it need not have ended. Raises :class:`JobLost` if it is lost.
        """
        ended = await self._confirmed_end()
        if ended is None:
            return None
        self._log(
            "ended_in_slurm",
            {"slurm": self._number(), "state": ended.state, "reason": ended.reason},
        )
        deadline = _now() + (
            self._executor.settings.file_system_seconds if ended.may_have_run else 0.0
        )
        self._records.refresh()
        while (record := self._records.exit()) is None and _now() < deadline:
            news.clear()
            await _within(_LOOK_SECONDS, news)
            self._records.refresh()
        return record or self._judge(ended)

    async def _confirmed_end(self) -> SlurmRecord | None:
        """Return what Slurm says of the job if that is its end; None if that is not certain."""
        if self._watch.listing.begun <= self._since:
            return None
        if any(job.standing is not Standing.ENDED for job in self._jobs()):
            self._forgotten_at = None
            return None
        if _now() < self._asked_at + _CONFIRM_SECONDS:
            return None
        return await self._ask()

    async def _ask(self) -> SlurmRecord | None:
        """Ask for the job by its number; returns what Slurm says if that is its end."""
        number, name = self._number(), self._records.name()
        self._asked_at = _now()
        if number is None or name is None:
            return None
        try:
            record = await self._commands.record(number, name)
        except SlurmSilent as error:
            self._log("end_unconfirmed", {"slurm": number, "error": str(error)})
            return None
        if record.state is not None:
            self._forgotten_at = None
            return record if record.has_ended else None
        if self._forgotten_at is None:
            self._forgotten_at = _now()
        # a slurmctld that has just been restored from an old state learns of jobs from their nodes
        return record if _now() >= self._forgotten_at + _FORGOTTEN_SECONDS else None

    def _judge(self, ended: SlurmRecord) -> Exit:
        """Say what an end without a record means. Raises :class:`JobLost` if it is no last one."""
        number = self._number()
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
        said = supervisor_errors(self._path)
        with suppress(OSError):
            said = said or " ".join(self._output().read_text(errors="replace").split())
        return f"; it said: {said[-_MESSAGE_CHARACTERS:]}" if said else ""

    # --- kill

    async def kill(self) -> Exit:
        """End the job, in the queue or on its node; returns when that is certain."""
        self._directory.mark_to_be_killed()
        name = self._records.name()
        if name is None:
            return Exit(ExitKind.KILLED)
        with self._watch.watching(self._path.name) as news:
            if self._number() is None and not await self._is_found(name):
                return Exit(ExitKind.KILLED)
            await self._end(name, news)
        return self._records.exit() or Exit(ExitKind.KILLED)

    async def _end(self, name: str, news: asyncio.Event) -> None:
        """Have it ended, by its supervisor if it has one, else by Slurm; ask until it is so."""
        grace = self._directory.assign.grace_seconds + _KILL_MARGIN_SECONDS
        is_told, next_try = False, _now()
        self._since = _now()
        while True:
            news.clear()
            self._records.refresh()
            if self._records.is_nothing_left():
                break
            if _now() >= next_try:
                if self.is_started() and not is_told:
                    is_told, pause = True, await self._tell_supervisor(name, grace)
                else:
                    pause = await self._cancel(name)
                next_try = _now() + pause
            if await self._confirmed_end() is not None:
                return
            self._watch.hurry()
            await _within(_CANCEL_LOOK_SECONDS, news)
        if self._records.exit() is None:
            await self._cancel(name)  # its keeper may wait for Slurm's last word

    async def _tell_supervisor(self, name: str, grace: float) -> float:
        """Have the supervisor end the job; returns how long that may take."""
        try:
            await self._commands.terminate_batch(name)
        except SlurmSilent as error:
            self._log("cancel_unanswered", {"slurm": self._number(), "error": str(error)})
        return grace

    async def _cancel(self, name: str) -> float:
        """Have Slurm end all that was submitted; returns when to do so again, if need be."""
        try:
            await self._commands.cancel_named(name)
        except SlurmSilent as error:
            self._log("cancel_unanswered", {"slurm": self._number(), "error": str(error)})
            return _FIRST_RETRY_SECONDS
        return _CANCEL_AGAIN_SECONDS

    def usage(self) -> Usage | None:
        """Return what the supervisor on the node says that the job has used."""
        return usage_record(self._directory.path)

    def forget(self) -> None:
        """Remove what the batch job itself has printed."""
        self._output().unlink(missing_ok=True)

    # --- helpers

    def _number(self) -> int | None:
        return self._records.number()

    def _note_number(self, number: int) -> None:
        self._log("submitted", {"slurm": number})
        self._records.note_number(number)

    def _jobs(self) -> tuple[SlurmJob, ...]:
        """Return what was listed last of the job: the one that has the attempt, if one has."""
        name, number = self._records.name(), self._records.claimed_by()
        jobs = self._watch.listing.named(name) if name is not None else ()
        return tuple(job for job in jobs if number in (None, job.id))

    def _output(self) -> Path:
        return self._executor.output / f"{self._path.name}.log"

    async def _wait_for(self, news: asyncio.Event) -> None:
        """Wait for news; not for long while the job looks as if it had ended."""
        looks_ended = self._watch.listing.begun > self._since and not any(
            job.standing in (Standing.WAITS, Standing.RUNS) for job in self._jobs()
        )
        await _within(_CONFIRM_SECONDS if looks_ended else None, news)

    def _log(self, name: str, fields: Mapping[str, object]) -> None:
        assign = self._directory.assign
        words = {"job": assign.job_id, "attempt": assign.attempt_id, **fields}
        event(log, name, **cast("dict[str, Any]", words))


async def _within(seconds: float | None, news: asyncio.Event) -> None:
    """Wait for news, so long at most."""
    with suppress(TimeoutError):
        await asyncio.wait_for(news.wait(), seconds)


def _now() -> float:
    return asyncio.get_running_loop().time()
