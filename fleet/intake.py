"""What an agent delivers of one attempt: how far it is, its output, its result."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jobs
from config import MAX_UPLOAD_BYTES
from fleet.agent import Agent
from fleet.attempt import Attempt
from fleet.roster import Roster
from fleet.storing import until_stored
from records import Loss, NewOutput, OutputPiece, ResultMismatch, Superseded
from telemetry.logs import event
from wire import messages
from wire.frames import (
    CHUNK_BYTES,
    OUTPUT_STREAMS,
    WINDOW_BYTES,
    Frame,
    Stream,
    transfer_id,
    transfer_parts,
)
from wire.messages import ProtocolError
from wire.outbox import Outbox

log = logging.getLogger("orchestrator.fleet")

_MAX_MESSAGE_LENGTH = 4000  # of what an agent says that users read
_MEMBER_BYTES = 10_000  # of an archive for each file, its content aside: its long name twice
_SHA256 = re.compile(r"[0-9a-f]{64}")


_Delivery: TypeAlias = messages.Finished | messages.Lost | messages.Rejected | Frame
"""What is carried out one by one; frames are those of a result."""


@dataclass(slots=True)
class _Result:
    """A result that arrives: what was announced, and how far it is safe."""

    report: messages.Finished
    digest: Any
    offset: int


class Intake:
    """Takes what one agent says of one attempt, in order, on one connection.

    Fill it with :meth:`put`; one task runs :meth:`run`, which ends with the attempt or, after
    :meth:`close`, once what had come before is stored.
    """

    def __init__(self, roster: Roster, agent: Agent, attempt: Attempt, outbox: Outbox) -> None:
        self._roster = roster
        self._store = roster.store
        self._agent = agent
        self._attempt = attempt
        self._outbox = outbox
        self._waiting: asyncio.Queue[jobs.Step | _Delivery | None] = asyncio.Queue()
        self._waiting_bytes: Counter[int] = Counter()  # by transfer
        self._steps: list[jobs.Step] = []
        self._output: list[Frame] = []
        self._result: _Result | None = None

    def put(self, item: messages.AttemptReport | Frame) -> None:
        """Something came. Raises :class:`ProtocolError` if it is more than the window allows."""
        if isinstance(item, Frame):
            waiting = self._waiting_bytes[item.transfer] + len(item.data)
            if waiting > WINDOW_BYTES + CHUNK_BYTES:
                raise ProtocolError(f"attempt {self._attempt.id}: sent more than the window allows")
            self._waiting_bytes[item.transfer] = waiting
        self._waiting.put_nowait(self._taken_in(item))

    def _taken_in(self, item: messages.AttemptReport | Frame) -> jobs.Step | _Delivery:
        """Make a step of what is one: it has the time at which it came."""
        match item:
            case messages.Accepted():
                self._outbox.close(transfer_id(self._attempt.id, Stream.INPUT))
                return jobs.Step(jobs.JobState.SUBMITTED, "input received", time.time())
            case messages.Started():
                return jobs.Step(jobs.JobState.RUNNING, "process started", time.time())
            case _:
                return item

    def close(self) -> None:
        """Nothing more will come."""
        self._waiting.put_nowait(None)

    async def run(self) -> None:
        """Carry out what comes until the attempt has ended, or nothing more will come."""
        try:
            while await self._carry_out(await self._next_report()):
                pass
        except Superseded:
            self._drop("superseded")
            self._roster.forget(self._agent, self._attempt)
        finally:
            self._outbox.close(transfer_id(self._attempt.id, Stream.INPUT))

    async def _next_report(self) -> _Delivery | None:
        """Return what comes next but steps and output; these are stored when nothing else waits.

        What is left of them came just before a result: it is to be stored with that.
        """
        while True:
            if self._waiting.empty():
                await self._store_noted()
            match item := await self._waiting.get():
                case jobs.Step():
                    self._steps.append(item)
                case Frame() if _is_output(item):
                    self._output.append(item)
                case Frame() | messages.Finished():
                    return item
                case _:
                    await self._store_noted()
                    return item

    async def _store_noted(self) -> None:
        if self._steps:
            await self._advance()
        if self._output:
            await self._store_output()

    async def _carry_out(self, item: _Delivery | None) -> bool:
        """Do what a report demands; returns whether more of the attempt is to come."""
        match item:
            case None:
                return False
            case messages.Finished():
                report = replace(item, message=item.message[:_MAX_MESSAGE_LENGTH])
                self._result = result = await self._begin_result(report)
                if result.offset == item.result_size:
                    # stored before, but the agent did not hear of it
                    await self._finish(result, result.offset, [])
                    return False
            case Frame():
                return not await self._take_result(item)
            case messages.Lost():
                reason = f"agent {self._agent.name} lost it: {item.reason[:_MAX_MESSAGE_LENGTH]}"
                loss = Loss.BY_SERVICE if item.by_service else Loss.REPORTED
                await self._give_back(loss, reason, "lost")
                return False
            case messages.Rejected():
                await self._reject(item.reason[:_MAX_MESSAGE_LENGTH])
                return False
        return True

    async def _give_back(self, loss: Loss, reason: str, answer: str) -> None:
        await self._roster.give_back(self._agent, self._attempt, loss, reason)
        self._drop(answer)

    async def _reject(self, reason: str) -> None:
        await until_stored(lambda: self._store.attempts.reject(self._attempt.id, reason))
        self._drop("rejected")
        self._end(jobs.JobState.INVALID)

    async def _advance(self) -> None:
        """Store the steps; what was repeated after a reconnect does nothing."""
        steps = jobs.steps_beyond(self._attempt.state, self._steps)
        if steps:
            await until_stored(lambda: self._store.attempts.advance(self._attempt.id, steps))
        self._pass(steps)

    def _pass(self, steps: Sequence[jobs.Step]) -> None:
        """The steps are stored, and all that were noted are done with."""
        for step in steps:
            self._attempt.state = step.state
            self._log("state", step.state)
        self._steps.clear()
        if self._attempt.state is jobs.JobState.RUNNING:
            self._roster.began(self._agent, self._attempt)

    def _end(self, state: jobs.JobState) -> None:
        self._roster.forget(self._agent, self._attempt)
        self._log("ended", state)

    def _log(self, name: str, state: jobs.JobState) -> None:
        attempt = self._attempt
        event(
            log, name, job=attempt.job.id, attempt=attempt.id, agent=self._agent.name, state=state
        )

    def _drop(self, reason: str) -> None:
        self._outbox.put(messages.Drop(self._attempt.id, reason))

    # --- output

    async def _store_output(self) -> None:
        """Store what was written since the last time, and open the window again."""
        frames = self._output
        new = self._new_output()
        await until_stored(lambda: self._store.output.append(self._attempt.id, new))
        ends: dict[int, int] = {}
        for frame in frames:
            self._waiting_bytes[frame.transfer] -= len(frame.data)
            ends[frame.transfer] = frame.offset + len(frame.data)
        for transfer, end in ends.items():
            self._outbox.put(messages.Acknowledge(transfer, end))
        frames.clear()

    def _new_output(self) -> NewOutput:
        pieces = tuple(
            OutputPiece(transfer_parts(frame.transfer)[1], frame.offset, frame.data)
            for frame in self._output
        )
        return NewOutput(pieces, self._roster.settings.max_log_bytes)

    # --- the result

    async def _begin_result(self, report: messages.Finished) -> _Result:
        if report.state not in jobs.FINAL_STATES:
            raise ProtocolError(f"attempt {report.attempt_id}: finished as {report.state}")
        if not 0 < report.result_size <= self._largest_result():
            raise ProtocolError(
                f"attempt {report.attempt_id}: a result of {report.result_size} bytes"
            )
        if not _SHA256.fullmatch(report.result_sha256):
            raise ProtocolError(f"attempt {report.attempt_id}: no SHA-256 of the result")
        if not self._attempt.may_have_result:
            return _Result(report, hashlib.sha256(), 0)
        offset = await self._store.attempts.result_size(report.attempt_id)
        if offset > report.result_size or offset % CHUNK_BYTES:
            await until_stored(lambda: self._store.attempts.discard_result(report.attempt_id))
            offset = 0
        digest = await self._store.attempts.result_digest(report.attempt_id, offset)
        return _Result(report, digest, offset)

    def _largest_result(self) -> int:
        """Return how large an archive can be of what a job may leave."""
        settings = self._roster.settings
        inputs = MAX_UPLOAD_BYTES + settings.max_files * _MEMBER_BYTES
        return (
            settings.max_result_bytes
            + settings.max_result_files * _MEMBER_BYTES
            + 2 * settings.max_log_bytes
            + inputs
        )

    async def _take_result(self, first: Frame) -> bool:
        """Store the frames that are there; returns whether the result is whole and stored."""
        result = self._result
        if result is None:
            raise ProtocolError(f"attempt {self._attempt.id}: bytes before Finished")
        self._attempt.may_have_result = True  # also if the connection ends before the store answers
        start = result.offset
        chunks = self._frames_at_hand(result, first)
        if result.offset == result.report.result_size:
            for chunk in chunks:
                result.digest.update(chunk)
            await self._finish(result, start, chunks)
            return True
        if chunks:
            attempt_id = self._attempt.id
            # side by side: the one takes the event loop's time, the other the writer's
            await asyncio.gather(
                until_stored(lambda: self._store.attempts.append_result(attempt_id, start, chunks)),
                _hash(result, chunks),
            )
        transfer = transfer_id(self._attempt.id, Stream.RESULT)
        self._outbox.put(messages.Acknowledge(transfer, result.offset))
        await self._store_noted()
        return False

    def _frames_at_hand(self, result: _Result, first: Frame) -> list[bytes]:
        """Return the chunks of a result's frames that have come, ``first`` and what follows."""
        chunks: list[bytes] = []
        frame = first
        while True:
            self._waiting_bytes[frame.transfer] -= len(frame.data)
            _append_frame(result, frame, chunks)
            if self._waiting.empty():
                return chunks
            item = self._waiting.get_nowait()
            if item is None:
                self.close()  # for the caller, after what is here
                return chunks
            if not isinstance(item, Frame) or _is_output(item):
                raise ProtocolError(
                    f"attempt {self._attempt.id}: {type(item).__name__} within a result"
                )
            frame = item

    async def _finish(self, result: _Result, start: int, tail: list[bytes]) -> None:
        report = result.report
        if result.digest.hexdigest() != report.result_sha256:
            # the agent would send the same again for ever
            reason = f"agent {self._agent.name} sent a result with another SHA-256 than it said"
            await self._give_back(Loss.REPORTED, reason, "damaged")
            return
        new = self._new_output()
        steps = jobs.steps_beyond(self._attempt.state, self._steps)
        finish, agent_id = self._store.attempts.finish, self._agent.id
        try:
            await until_stored(lambda: finish(agent_id, report, start, tail, new, steps))
        except ResultMismatch:
            # as above: the next attempt may have a better one
            reason = f"agent {self._agent.name} sent no whole archive"
            await self._give_back(Loss.REPORTED, reason, "damaged")
            return
        self._outbox.put(messages.Stored(self._attempt.id))
        self._pass(steps)
        self._roster.delivered(self._agent, self._attempt)
        self._end(report.state)


def _is_output(frame: Frame) -> bool:
    return transfer_parts(frame.transfer)[1] in OUTPUT_STREAMS


def _append_frame(result: _Result, frame: Frame, chunks: list[bytes]) -> None:
    """Check that a frame continues the result and take its bytes; a repeated one is ignored."""
    if frame.offset < result.offset:
        return
    left = result.report.result_size - frame.offset
    if frame.offset > result.offset or len(frame.data) != min(left, CHUNK_BYTES):
        raise ProtocolError(
            f"attempt {result.report.attempt_id}: {len(frame.data)} bytes at {frame.offset},"
            f" expected offset {result.offset}"
        )
    chunks.append(frame.data)
    result.offset += len(frame.data)


async def _hash(result: _Result, chunks: Sequence[bytes]) -> None:
    """Take chunks into the digest, with a turn for others before each."""
    for chunk in chunks:
        await asyncio.sleep(0)
        result.digest.update(chunk)
