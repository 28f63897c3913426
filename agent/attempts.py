"""One attempt's life: from receiving its input to the server's word that its result is stored.

An attempt is driven by a task of its own, whether or not there is a connection. A connection,
when there is one, carries what the attempt has to say; a new one begins with a report of how
far it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from agent.attempt_directory import AttemptDirectory
from agent.connection import Channel
from agent.executors.base import Command, Execution
from agent.inotify import WriteWatch
from agent.job_environment import variables_of
from agent.outcomes import Exit, JobInvalid, JobLost, LostByService
from agent.output_follower import Follower
from agent.results import Result
from jobs import RUN_SCRIPT
from telemetry.logs import event
from wire import messages
from wire.frames import Frame, Stream, transfer_id
from wire.messages import AttemptPhase

log = logging.getLogger("orchestrator.agent")


class Attempt:
    """An attempt that this agent holds."""

    def __init__(
        self,
        directory: AttemptDirectory,
        execution: Execution,
        phase: AttemptPhase,
        channel: Channel,
        watch: WriteWatch,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.directory = directory
        self.execution = execution
        self.id, self.job_id = directory.assign.attempt_id, directory.assign.job_id
        self.phase = phase
        self._channel = channel
        self._follower = Follower(self.id, directory.logs(), watch)
        self._result = Result(directory)
        self._input: asyncio.Queue[Frame] = asyncio.Queue()
        self._finished: messages.Finished | None = None
        self._failure: messages.Rejected | messages.Lost | None = None
        self._is_ending = directory.is_to_be_killed() and self.phase is not AttemptPhase.FINISHED
        self._is_dropped = False
        self._waiting_reason: str | None = None
        self._released = asyncio.Event()
        self._tasks = tasks
        self._task: asyncio.Task[None] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the server no longer wants it."""
        return self._is_dropped or self._released.is_set()

    def begin(self, on_end: Callable[[Attempt], None]) -> None:
        """Drive it from where it is to its end; ``on_end`` is called when nothing is left of it."""
        self._on_end = on_end
        self._task = self._tasks.create_task(self._drive(), name=f"attempt {self.id}")

    async def wait(self) -> None:
        """Wait until it has ended, or is driven by another task."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # --- what the server says

    def connect(self, kept: messages.KeptAttempt) -> None:
        """Tell a new connection how far it is; what the server knows already does no harm."""
        if self._channel.outbox is None:
            return
        self._follower.connect(self._channel.outbox, (kept.stdout_offset, kept.stderr_offset))
        if self._failure is not None:
            self._channel.put(self._failure)
            return
        if self.phase is not AttemptPhase.RECEIVING:
            self._channel.put(messages.Accepted(self.id))
        if self.phase is AttemptPhase.ACCEPTED and self._waiting_reason is not None:
            self._channel.put(self._waiting(self._waiting_reason))
        if self.phase in (AttemptPhase.RUNNING, AttemptPhase.FINISHED):
            self._channel.put(messages.Started(self.id))
        if self.phase is AttemptPhase.FINISHED and self._finished is not None:
            self._follower.send_rest(lambda: self._report_result(kept.result_offset))

    def disconnect(self) -> None:
        """The connection is over, and what came by it may have a gap."""
        self._follower.disconnect()
        while not self._input.empty():
            self._input.get_nowait()

    def take_input(self, frame: Frame) -> None:
        """Take a piece of the input."""
        self._input.put_nowait(frame)

    def release(self) -> None:
        """The server has the result: nothing is left to do but to tidy up."""
        self._close_transfers()
        self._released.set()

    def kill(self) -> None:
        """End the job and report what it left; does nothing if it has ended."""
        if self._task is None or self._is_ending:
            return
        if self.phase is AttemptPhase.FINISHED or self._failure is not None:
            return
        self._log("killing")
        self._is_ending = True
        before = self._task
        before.cancel()
        self._task = self._tasks.create_task(self._drive(before), name=f"kill attempt {self.id}")

    def drop(self, reason: str) -> None:
        """End whatever runs and remove the attempt: the server does not want it."""
        if self._task is None or self._is_dropped:
            return
        event(log, "dropped", job=self.job_id, attempt=self.id, reason=reason)
        self._is_dropped = True
        with suppress(OSError):  # there may be no directory yet
            self.directory.mark_dropped()
        self._close_transfers()
        before = self._task
        before.cancel()
        self._task = self._tasks.create_task(self._discard(before), name=f"discard {self.id}")

    # --- its life

    async def _drive(self, before: asyncio.Task[None] | None = None) -> None:
        """Bring it from where it is to its end, once the task ``before`` is over."""
        try:
            if before is not None:
                await asyncio.wait([before])
            if self._is_ending:
                await self._end_job()
            else:
                await self._run_job()
            await self._released.wait()
        except JobInvalid as error:
            self._failure = messages.Rejected(self.id, str(error))
        except JobLost as error:
            by_service = isinstance(error, LostByService)
            self._failure = messages.Lost(self.id, str(error), by_service)
        except OSError as error:
            self._log_failure("attempt_failed", error)
            self._failure = messages.Lost(self.id, _reason(error))
        except Exception as error:  # noqa: BLE001 a defect here must not end the other jobs
            self._log_failure("attempt_failed", error)
            self._failure = messages.Lost(self.id, f"defect in the agent: {error!r}")
        if self._failure is not None:
            self._give_up(self._failure)
            await self._released.wait()  # in vain: the server answers with a drop, which cancels
        await self._remove()

    def _give_up(self, failure: messages.Rejected | messages.Lost) -> None:
        """Say that it can't go on; the server answers with a drop."""
        self._failure = failure
        name = "attempt_lost" if isinstance(failure, messages.Lost) else "attempt_rejected"
        event(
            log,
            name,
            level=logging.WARNING,
            job=self.job_id,
            attempt=self.id,
            reason=failure.reason,
        )
        self._channel.put(failure)

    def _lose_result(self, error: Exception) -> None:
        """The result can't be read, or only a part of it: all other attempts go on."""
        self._close_transfers()
        self._give_up(messages.Lost(self.id, f"the result can't be read: {_reason(error)}"))

    async def _discard(self, before: asyncio.Task[None]) -> None:
        """Kill what runs of it and remove it."""
        await asyncio.wait([before])
        try:
            if self.directory.exists():
                await self.execution.kill()
        except (OSError, JobLost) as error:
            self._log_failure("kill_failed", error)
        await self._remove()

    async def _remove(self) -> None:
        try:
            self.execution.forget()
            if self._result.is_small:
                self.directory.remove()
            else:
                await asyncio.to_thread(self.directory.remove)
        except OSError as error:
            # the next start of the agent tries again
            self._log_failure("remove_failed", error)
        self._on_end(self)

    async def _run_job(self) -> None:
        ended: Exit | None = None
        if self.phase is not AttemptPhase.FINISHED:
            self.execution.check_adopted()
        if self.phase is AttemptPhase.RECEIVING:
            await self._receive_input()
            self._enter(AttemptPhase.ACCEPTED)
        if self.phase is AttemptPhase.ACCEPTED:
            ended = await self.execution.start(self._command(), self._tell_reason)
            if ended is None:
                self._enter(AttemptPhase.RUNNING)
        if self.phase is AttemptPhase.RUNNING:
            ended = await self._end_of_job()
        if ended is not None:
            self._is_ending = True  # from here on there is nothing to kill
            self._finished = await self._result.make(ended, self.execution.usage(ended))
        else:
            self._finished = await asyncio.to_thread(self._result.report)
        self._enter(AttemptPhase.FINISHED)

    async def _end_job(self) -> None:
        await self._make_directory()
        ended = await self.execution.kill()
        if self.phase is AttemptPhase.ACCEPTED and self.execution.is_started():
            self._enter(AttemptPhase.RUNNING)  # it was started before the kill came
        self._finished = await self._result.make(ended, self.execution.usage(ended))
        self._enter(AttemptPhase.FINISHED)

    async def _receive_input(self) -> None:
        directory = self.directory
        await self._make_directory()
        transfer = transfer_id(self.id, Stream.INPUT)
        while directory.input_offset < directory.input_size:
            frame = await self._input.get()
            if frame.offset < directory.input_offset:
                continue  # repeated
            if frame.offset > directory.input_offset:
                raise messages.ProtocolError(f"attempt {self.id}: a gap in the input")
            await directory.write_input(frame.data)
            if directory.input_offset < directory.input_size:  # else Accepted says it
                self._channel.put(messages.Acknowledge(transfer, directory.input_offset))
        await directory.accept_input()

    async def _make_directory(self) -> None:
        if not self.directory.exists():
            await self.directory.create()

    def _command(self) -> Command:
        assign = self.directory.assign
        return Command(
            argv=("bash", RUN_SCRIPT),
            variables=variables_of(assign, self.directory.path / "job"),
            timeout_seconds=assign.timeout_seconds,
            grace_seconds=assign.grace_seconds,
            resources=assign.resources,
        )

    async def _end_of_job(self) -> Exit:
        """Wait for the end of the job; meanwhile its output is followed."""
        following = asyncio.create_task(self._follower.run(), name=f"follow attempt {self.id}")
        try:
            return await self.execution.wait()
        finally:
            following.cancel()

    # --- what it says

    def _enter(self, phase: AttemptPhase) -> None:
        self.phase = phase
        self._log(phase)
        match phase:
            case AttemptPhase.ACCEPTED:
                # most jobs are started at once, and some have ended a moment later: the server
                # then stores all of it at once
                self._channel.put_along(messages.Accepted(self.id))
            case AttemptPhase.RUNNING:
                self._channel.put_along(messages.Started(self.id))
            case AttemptPhase.FINISHED:
                self._follower.send_rest(lambda: self._report_result(0))

    def _report_result(self, offset: int) -> None:
        outbox = self._channel.outbox
        if outbox is None or self._finished is None:
            return
        outbox.put(self._finished)
        if offset < self._finished.result_size:
            transfer = transfer_id(self.id, Stream.RESULT)
            size = self._finished.result_size
            outbox.open(transfer, self._result.read, offset, size, self._lose_result)

    def _close_transfers(self) -> None:
        self._follower.close()
        if self._channel.outbox is not None:
            self._channel.outbox.close(transfer_id(self.id, Stream.RESULT))

    def _tell_reason(self, reason: str) -> None:
        """The executor says why the job does not run yet."""
        if reason == self._waiting_reason:
            return
        self._waiting_reason = reason
        event(log, "waiting", job=self.job_id, attempt=self.id, reason=reason)
        self._channel.put(self._waiting(reason))

    def _waiting(self, reason: str) -> messages.Waiting:
        return messages.Waiting(self.id, reason, self.execution.is_handed_on())

    def _log(self, name: str) -> None:
        event(log, name, job=self.job_id, attempt=self.id)

    def _log_failure(self, name: str, error: Exception) -> None:
        event(
            log,
            name,
            level=logging.ERROR,
            exc_info=error,
            job=self.job_id,
            attempt=self.id,
            error=str(error),
        )


def _reason(error: Exception) -> str:
    """Return what to tell the server of an error."""
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}"
    return str(error)


def phase_of(directory: AttemptDirectory, execution: Execution) -> AttemptPhase:
    """Tell from the files how far an attempt is."""
    if directory.has_result():
        return AttemptPhase.FINISHED
    if execution.is_started():
        return AttemptPhase.RUNNING
    if directory.has_input():
        return AttemptPhase.ACCEPTED
    return AttemptPhase.RECEIVING
