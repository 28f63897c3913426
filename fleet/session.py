"""One connection of one agent: its life, and the way of what arrives to where it belongs."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from fleet.agent import Agent
from fleet.connection import AgentSocket, Connection, UnreadableInput
from fleet.intake import Intake
from fleet.reconciliation import Reconciliation
from fleet.roster import Roster
from fleet.storing import until_stored
from records import IllegalTransition, ResultMismatch, StoreDamaged, Superseded
from runtime import first_failure
from telemetry.logs import event
from wire import codec, messages
from wire.frames import Frame, Stream, decode_frame, transfer_parts
from wire.messages import ProtocolError

log = logging.getLogger("orchestrator.fleet")

_HELLO_SECONDS = 10.0
_FINISH_SECONDS = 2.0
_MAX_REASON_CHARACTERS = 500  # of what an agent may say about an attempt that waits
_STEPS_OF_A_HEARTBEAT = 4
_READ_TRIES = 3
_READ_AGAIN_SECONDS = 1.0
_MAX_TEXT_LENGTH = 2 * 1024 * 1024  # a hello with ten thousand attempts has about one of them
_SILENT_HEARTBEATS = 2.5  # a connection that was silent for so many intervals is dead


class Session:
    """Receives on one connection; has one task for each attempt that the agent reports on."""

    def __init__(self, roster: Roster, connection: Connection, socket: AgentSocket) -> None:
        self._roster = roster
        self._store = roster.store
        self._connection = connection
        self._outbox = connection.outbox
        self._frames = socket.frames()
        self._agent: Agent
        self._tasks: asyncio.TaskGroup
        self._intakes: dict[int, Intake] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve the connection to its end; a peer's error ends it with a reason."""
        address = self._connection.address
        try:
            await self._serve()
        except* (ProtocolError, IllegalTransition, ResultMismatch) as group:
            error = first_failure(group)
            event(log, "agent_error", level=logging.WARNING, address=address, error=str(error))
            await self._connection.close(str(error), code=1002)
        except* ConnectionError:
            event(log, "connection_lost", level=logging.DEBUG, address=address)
        finally:
            self._connection.end()

    # --- life of the connection

    async def _serve(self) -> None:
        hello = await self._receive_hello()
        answer = await self._roster.admit(self._connection, hello)
        if isinstance(answer, messages.Refused):
            event(
                log,
                "agent_refused",
                level=logging.WARNING,
                address=self._connection.address,
                reason=answer.reason,
            )
            await self._connection.refuse(answer)
            return
        self._agent = answer
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await Reconciliation(self._roster, self._agent, self._connection).run(hello)
                await self._converse()
                await self._finish_intakes()
        finally:
            event(log, "agent_disconnected", agent=self._agent.name)
            self._roster.detach(self._connection, self._agent)

    async def _converse(self) -> None:
        """Send and receive until the connection is over, however it ends."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._connection.send(), name="outbox")
                tasks.create_task(self._watch_silence(), name="watch silence")
                tasks.create_task(self._end_when_closed(), name="close")
                tasks.create_task(self._follow_unreadable(), name="unreadable input")
                self._roster.changed(self._agent)
                await self._receive()
                raise _ConnectionEnded
        except* (ConnectionError, _ConnectionEnded):
            self._connection.is_welcomed = False
            self._roster.changed(self._agent)

    async def _finish_intakes(self) -> None:
        """Store what has arrived: on a link that breaks all the time it is all the progress."""
        for intake in self._intakes.values():
            intake.close()
        if self._running:
            _, unfinished = await asyncio.wait(self._running, timeout=_FINISH_SECONDS)
            for task in unfinished:
                task.cancel()

    async def _end_when_closed(self) -> None:
        await self._connection.closing.wait()
        raise _ConnectionEnded

    async def _receive_hello(self) -> messages.Hello:
        try:
            frame = await asyncio.wait_for(anext(self._frames), _HELLO_SECONDS)
        except (TimeoutError, StopAsyncIteration):
            raise ProtocolError("no hello") from None
        is_text = isinstance(frame, str) and len(frame) <= _MAX_TEXT_LENGTH
        hello = codec.decode(frame) if isinstance(frame, str) and is_text else None
        if not isinstance(hello, messages.Hello):
            raise ProtocolError("the first message must be a hello")
        self._connection.instance = hello.instance
        self._connection.heard()
        return hello

    async def _receive(self) -> None:
        async for frame in self._frames:
            self._connection.heard()
            if isinstance(frame, bytes):
                self._take_frame(decode_frame(frame))
            else:
                if len(frame) > _MAX_TEXT_LENGTH:
                    raise ProtocolError(f"a message of {len(frame)} characters")
                self._take_message(codec.decode(frame))

    async def _watch_silence(self) -> None:
        """End a half-open connection: nothing came for some heartbeats.

        Counted in steps of time in which the server listened. If it stood still (a paused
        machine), what has come meanwhile is read in the steps that follow.
        """
        heartbeat = self._connection.heartbeat_seconds()
        limit, step = _SILENT_HEARTBEATS * heartbeat, heartbeat / _STEPS_OF_A_HEARTBEAT
        loop = asyncio.get_running_loop()
        heard_at, silent = self._connection.heard_at, 0.0
        while silent < limit:
            before = loop.time()
            await asyncio.sleep(step)
            silent += min(loop.time() - before, 2 * step)
            if self._connection.heard_at != heard_at:
                heard_at, silent = self._connection.heard_at, 0.0
        event(log, "agent_silent", level=logging.WARNING, agent=self._agent.name, seconds=limit)
        raise _ConnectionEnded

    async def _follow_unreadable(self) -> None:
        """Try again to read inputs that could not be, and fail those jobs that are damaged."""
        tries: Counter[int] = Counter()
        while True:
            input_ = await self._connection.unreadable.get()
            tries[input_.attempt_id] += 1
            is_damaged = isinstance(input_.error, StoreDamaged)
            if not is_damaged and tries[input_.attempt_id] < _READ_TRIES:
                self._start(self._send_again(input_), f"input of attempt {input_.attempt_id}")
            elif (attempt := self._agent.attempts.get(input_.attempt_id)) is not None:
                reason = f"its input can't be read: {input_.error}"
                await self._roster.fail(self._agent, attempt, reason)
                self._outbox.put(messages.Drop(attempt.id, "its input can't be read"))

    async def _send_again(self, input_: UnreadableInput) -> None:
        await asyncio.sleep(_READ_AGAIN_SECONDS)
        if input_.attempt_id in self._agent.attempts:
            # what the agent has of it already it ignores
            self._connection.send_input(input_.attempt_id, input_.files, 0)

    # --- what arrives

    def _take_message(self, message: messages.Message | codec.UnknownMessage) -> None:
        match message:
            case messages.Heartbeat():
                self._connection.load = message.load
                self._connection.problem = message.problem
                self._outbox.put(messages.Heartbeat())
            case messages.Drain():
                event(log, "agent_drains", agent=self._agent.name)
                self._roster.stop_giving(self._agent)
            case messages.ServiceChecked():
                self._roster.take_answer(self._agent, message)
            case messages.Acknowledge():
                self._outbox.acknowledge(message.transfer, message.offset)
            case messages.Waiting():
                if attempt := self._agent.attempts.get(message.attempt_id):
                    attempt.waiting_reason = message.reason[:_MAX_REASON_CHARACTERS]
                    if message.is_handed_on:
                        self._roster.began(self._agent, attempt)
            case (
                messages.Accepted()
                | messages.Started()
                | messages.Finished()
                | messages.Rejected()
                | messages.Lost()
            ):
                self._take_report(message)
            case messages.SnapshotReady() | messages.SnapshotRefused():
                self._take_snapshot_answer(message)
            case codec.UnknownMessage():
                event(log, "unknown_message", agent=self._agent.name, type=message.type)
            case _:
                raise ProtocolError(f"an agent does not send {type(message).__name__}")

    def _take_snapshot_answer(
        self, message: messages.SnapshotReady | messages.SnapshotRefused
    ) -> None:
        relay = self._connection.relays.get(message.request_id)
        if relay is None:
            return  # nobody wants it any longer
        match message:
            case messages.SnapshotReady():
                relay.begin(message.size)
            case messages.SnapshotRefused():
                relay.fail(message.reason)

    def _take_frame(self, frame: Frame) -> None:
        attempt_id, stream = transfer_parts(frame.transfer)
        if stream is Stream.INPUT:
            raise ProtocolError(f"an agent does not send {stream.name}")
        if stream is Stream.SNAPSHOT:
            if relay := self._connection.relays.get(attempt_id):  # else nobody wants it any longer
                relay.put(frame)
        elif intake := self._intake(attempt_id):
            intake.put(frame)
        else:
            self._outbox.put(messages.Drop(attempt_id, "superseded"))

    def _take_report(self, report: messages.AttemptReport) -> None:
        if intake := self._intake(report.attempt_id):
            intake.put(report)
        elif isinstance(report, messages.Finished):
            self._start(self._answer_late(report), f"late report of attempt {report.attempt_id}")
        else:
            self._outbox.put(messages.Drop(report.attempt_id, "superseded"))

    def _intake(self, attempt_id: int) -> Intake | None:
        """Return where an attempt's reports go; None if it is not, or no longer, this agent's."""
        intake = self._intakes.get(attempt_id)
        if intake is not None:
            return intake
        attempt = self._agent.attempts.get(attempt_id) or self._connection.remains.get(attempt_id)
        if attempt is None:
            return None
        intake = self._intakes[attempt_id] = Intake(
            self._roster, self._agent, attempt, self._outbox
        )
        self._start(self._take_in(attempt_id, intake), f"attempt {attempt_id}")
        return intake

    async def _take_in(self, attempt_id: int, intake: Intake) -> None:
        try:
            await intake.run()
        finally:
            del self._intakes[attempt_id]

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer_late(self, report: messages.Finished) -> None:
        """Answer for an attempt that is not, or no longer, this agent's."""
        try:
            # a repeated report of a result that is stored already does no harm
            await until_stored(lambda: self._store.attempts.finish(self._agent.id, report, 0, ()))
        except (Superseded, ResultMismatch):
            self._outbox.put(messages.Drop(report.attempt_id, "superseded"))
        else:
            self._outbox.put(messages.Stored(report.attempt_id))


class _ConnectionEnded(Exception):
    """The connection is over, as connections are; unwinds its tasks."""
