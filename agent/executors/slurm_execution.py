"""One attempt as a batch job of Slurm.

In the attempt's directory lie, beside what every executor has:

    slurm-name    a link whose text is the batch job's name   (it may have been submitted)
    slurm-id      a link whose text is its number             (it was submitted)
    order, slurm-claim, nothing-left                          see on_node.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Command, Execution
from agent.executors.records import usage_of
from agent.executors.slurm_commands import Refusal, SlurmSilent, Standing, SubmissionRefused
from agent.executors.slurm_ending import CONFIRM_SECONDS, Ending, now
from agent.executors.slurm_host import SubmitHost
from agent.executors.slurm_records import SlurmRecords
from agent.executors.slurm_submission import Request, batch_script, checked_words
from agent.isolation.base import PREPARING_MODULE
from agent.outcomes import Exit, ExitKind, JobLost, LostByService
from config import ConfigError
from jobs import Usage
from runtime import PASSED_PREFIXES, PASSED_VARIABLES

_SETTLE_SECONDS = 5.0  # for a submission whose answer was lost to be seen by squeue
_FIRST_RETRY_SECONDS = 5.0
_LAST_RETRY_SECONDS = 120.0
_LOOK_SECONDS = 1.0
_CANCEL_AGAIN_SECONDS = 30.0
_CANCEL_LOOK_SECONDS = 2.0
_KILL_MARGIN_SECONDS = 10.0

_PASSED_ON_NODE = (*PASSED_VARIABLES, "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_PASSED_PREFIXES_ON_NODE = (*PASSED_PREFIXES, "SLURM_")


class SlurmExecution(Execution):
    """One attempt as a batch job."""

    def __init__(self, directory: AttemptDirectory, host: SubmitHost) -> None:
        self._directory = directory
        self._host = host
        self._watch = host.watch
        self._commands = host.commands
        self._path = directory.path
        self._records = SlurmRecords(directory)
        self._ending = Ending(self._records, host)

    def is_started(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return self._records.is_started()

    def is_handed_on(self) -> bool:
        """Whether Slurm has taken the job."""
        return self._records.number() is not None

    def check_adopted(self) -> None:
        """Raise :class:`JobLost` for what had not left this machine when it went down."""
        if not self._records.was_submitted():
            self._directory.check_boot()

    # --- start

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        """Submit the job and wait until it runs; returns its end if it never will."""
        with self._watch.watching(self._path.name) as news:
            if self._records.number() is None:
                refused = await self._submit_once(command, on_reason)
                if refused is not None:
                    return refused
            self._ending.since = now()
            while True:
                news.clear()
                self._records.refresh()
                if self.is_started():
                    return None
                if (ended := await self._end_without_record(news)) is not None:
                    return None if self.is_started() else ended
                on_reason(self._why_waiting())
                await self._wait_for(news)

    async def _submit_once(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        """Have the job in Slurm once, whatever answers get lost; returns its end if refused."""
        is_new, name = self._records.take_name()
        if not is_new and await self._is_found(name):
            return None
        self._records.write_order(self._host.enclosed(self._directory, command))
        pause = _FIRST_RETRY_SECONDS
        while True:
            on_reason("being handed to Slurm")
            try:
                async with self._host.submitting:
                    number = await self._commands.submit(
                        self._script(command), self._request(name, command).arguments()
                    )
            except SubmissionRefused as error:
                if error.refusal is Refusal.HOW_WE_ASK:
                    raise self._refused_as_asked(error) from None
                if error.refusal is Refusal.WHAT_THE_JOB_ASKS:
                    # of the job's own: no fault of this agent, and no better the next time
                    message = f"Slurm refused the job: {error}"
                    return Exit(ExitKind.ENDED_OUTSIDE, message=message)
                on_reason(f"Slurm takes no more jobs for now: {error}")
            except SlurmSilent as error:
                self._records.log("submission_unanswered", {"error": str(error)})
                on_reason(f"not certain yet whether Slurm has the job: {error}")
                if await self._is_found(name):
                    return None
            else:
                self._note_number(number)
                return None
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LAST_RETRY_SECONDS)

    async def _is_found(self, name: str) -> bool:
        """Look for the job of an earlier submission, until it is seen or settled that it is not."""
        asked = now()
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
                *(self._host.settings.python, "-E", "-s", "-S", str(self._host.on_node)),
                *(str(self._path), str(self._host.notices), limit, PREPARING_MODULE),
                *(",".join(_PASSED_ON_NODE), ",".join(_PASSED_PREFIXES_ON_NODE)),
            ]
        )

    def _request(self, name: str, command: Command) -> Request:
        settings, assign = self._host.settings, self._directory.assign
        return Request(
            name=name,
            directory=self._host.output,
            output=self._output(),
            resources=assign.resources,
            timeout_seconds=command.timeout_seconds,
            grace_seconds=command.grace_seconds,
            options=(*settings.options, *self._service_options()),
        )

    def _service_options(self) -> tuple[str, ...]:
        options = self._directory.assign.slurm_options
        try:
            return checked_words(options)
        except ConfigError as error:
            raise LostByService(f"the service's SLURM_OPTIONS can't be used: {error}") from None

    def _refused_as_asked(self, error: SubmissionRefused) -> JobLost:
        """Say whose fault a refusal is that another job would meet, too."""
        refused = f"Slurm refused the job: {error}"
        if self._directory.assign.slurm_options:
            # its own options are what jobs of other services are submitted without
            return LostByService(f"{refused} (with the service's SLURM_OPTIONS)")
        return JobLost(refused)

    def _why_waiting(self) -> str:
        place = f"in Slurm as {self._records.number()}"
        if (problem := self._watch.problem()) is not None:
            return f"{place}; {problem}"
        for job in self._ending.jobs():
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
            self._ending.since = max(self._ending.since, now())
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
        ended = await self._ending.confirmed()
        if ended is None:
            return None
        self._records.log(
            "ended_in_slurm",
            {"slurm": self._records.number(), "state": ended.state, "reason": ended.reason},
        )
        deadline = now() + (self._host.settings.file_system_seconds if ended.may_have_run else 0.0)
        self._records.refresh()
        while (record := self._records.exit()) is None and now() < deadline:
            news.clear()
            await _within(_LOOK_SECONDS, news)
            self._records.refresh()
        return record or self._ending.judge(ended)

    # --- kill

    async def kill(self) -> Exit:
        """End the job, in the queue or on its node; returns when that is certain."""
        self._directory.mark_to_be_killed()
        name = self._records.name()
        if name is None:
            return Exit(ExitKind.KILLED)
        with self._watch.watching(self._path.name) as news:
            if self._records.number() is None and not await self._is_found(name):
                return Exit(ExitKind.KILLED)
            await self._end(name, news)
        return self._records.exit() or Exit(ExitKind.KILLED)

    async def _end(self, name: str, news: asyncio.Event) -> None:
        """Have it ended, by its supervisor if it has one, else by Slurm; ask until it is so."""
        grace = self._directory.assign.grace_seconds + _KILL_MARGIN_SECONDS
        is_told, next_try = False, now()
        self._ending.since = now()
        while True:
            news.clear()
            self._records.refresh()
            if self._records.is_nothing_left():
                break
            if now() >= next_try:
                if self.is_started() and not is_told:
                    is_told, pause = True, await self._tell_supervisor(name, grace)
                else:
                    pause = await self._cancel(name)
                next_try = now() + pause
            if await self._ending.confirmed() is not None:
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
            self._records.log(
                "cancel_unanswered", {"slurm": self._records.number(), "error": str(error)}
            )
        return grace

    async def _cancel(self, name: str) -> float:
        """Have Slurm end all that was submitted; returns when to do so again, if need be."""
        try:
            await self._commands.cancel_named(name)
        except SlurmSilent as error:
            self._records.log(
                "cancel_unanswered", {"slurm": self._records.number(), "error": str(error)}
            )
            return _FIRST_RETRY_SECONDS
        return _CANCEL_AGAIN_SECONDS

    def _note_silence(self, error: SlurmSilent) -> None:
        number = self._records.number()
        self._records.log("cancel_unanswered", {"slurm": number, "error": str(error)})

    def usage(self, ended: Exit) -> Usage | None:
        """Return what the supervisor on the node says that the job has used."""
        return usage_of(self._path, ended)

    def forget(self) -> None:
        """Remove what the batch job itself has printed."""
        self._output().unlink(missing_ok=True)

    # --- helpers

    def _note_number(self, number: int) -> None:
        self._records.log("submitted", {"slurm": number})
        self._records.note_number(number)

    def _output(self) -> Path:
        return self._host.output / f"{self._path.name}.log"

    async def _wait_for(self, news: asyncio.Event) -> None:
        """Wait for news; not for long while the job looks as if it had ended."""
        await _within(CONFIRM_SECONDS if self._ending.seems_to_have_come() else None, news)


async def _within(seconds: float | None, news: asyncio.Event) -> None:
    """Wait for news, so long at most."""
    with suppress(TimeoutError):
        await asyncio.wait_for(news.wait(), seconds)
