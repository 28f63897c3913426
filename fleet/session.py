"""The server's end of the agent channel: one connection of one agent, and what it holds."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, TypeVar

import config
import jobs
from config import ServiceLimits, Settings
from events import AgentChangeKind
from fleet.snapshot_relay import IncomingSnapshot
from records import (
    ActiveJob,
    Assignment,
    IllegalTransition,
    JobIdentity,
    Loss,
    NewOutput,
    OutputPiece,
    ResultMismatch,
    StoredFile,
    Superseded,
)
from runtime import first_failure
from store import Store
from wire import codec, messages
from wire.frames import (
    CHUNK_BYTES,
    OUTPUT_STREAMS,
    WINDOW_BYTES,
    Frame,
    Stream,
    decode_frame,
    transfer_id,
    transfer_parts,
)
from wire.messages import ProtocolError
from wire.outbox import Outbox, Socket

log = logging.getLogger("orchestrator.session")

T = TypeVar("T")

_HELLO_SECONDS = 10.0
_PROBE_SECONDS = 2.0
_CLOSE_SECONDS = 2.0
_KILL_SECONDS = 30.0  # for what a killed job left to be archived and sent
_FINISH_SECONDS = 2.0
_SILENT_HEARTBEATS = 2.5  # a connection that was silent for so many intervals is dead


@dataclass(slots=True)
class Attempt:
    """An attempt that an agent holds, as far as the server knows."""

    job: JobIdentity
    id: int
    number: int
    state: jobs.JobState = jobs.JobState.PROCESSING
    may_have_result: bool = True  # some bytes of it may be stored already
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, active: ActiveJob) -> Attempt:
        """Make it from what the store says."""
        return cls(active.job, active.attempt_id, active.number, active.state)


@dataclass(frozen=True, slots=True)
class AgentStatus:
    """An agent as an operator sees it.

    ``services`` is None for all; ``busy`` is the number of slots in use, of ``slots``, which
    are 0 while it stops by itself. ``heartbeat_age``: seconds since it was heard, None if not
    since the server started. ``load``: the load average of its machine. ``lease_left``: seconds
    until the jobs of an agent that is away go to others.
    """

    id: str
    name: str
    version: str | None
    services: tuple[str, ...] | None
    slots: int
    busy: int
    jobs: tuple[JobIdentity, ...]
    is_connected: bool
    is_drained: bool
    heartbeat_age: float | None
    load: float | None
    connected_since: float | None
    address: str | None
    lease_left: float | None

    def offers(self, service: str) -> bool:
        """Say whether jobs of the service may run there."""
        return self.services is None or service in self.services


@dataclass(slots=True)
class Agent:
    """An agent, connected or away. Away, it keeps its attempts until the lease runs out."""

    id: str
    name: str
    slots: int = 0
    services: frozenset[str] | None = None
    session: Session | None = None
    reserved: int = 0
    attempts: dict[int, Attempt] = field(default_factory=dict)
    lease: asyncio.TimerHandle | None = None
    version: str | None = None
    is_drained: bool = False
    heard_at: float | None = None

    def free_slots(self) -> int:
        """Return how many more jobs it could run now."""
        if self.is_drained or self.session is None or not self.session.is_welcomed:
            return 0
        return self.slots - self.reserved - len(self.attempts)

    def offers(self, service: str) -> bool:
        """Say whether jobs of the service may run there."""
        return self.services is None or service in self.services

    def takes_nothing_new(self) -> bool:
        """Say whether it drains, by itself or since an operator wants it."""
        return self.is_drained or not self.slots

    def load(self) -> float:
        """Return the share of its slots in use."""
        return (self.reserved + len(self.attempts)) / self.slots

    def status(self) -> AgentStatus:
        """Return what an operator sees of it."""
        now = asyncio.get_running_loop().time()
        session = self.session
        heard_at = self.heard_at if session is None else session.heard_at
        return AgentStatus(
            id=self.id,
            name=self.name,
            version=self.version,
            services=None if self.services is None else tuple(sorted(self.services)),
            slots=self.slots,
            busy=self.reserved + len(self.attempts),
            jobs=tuple(attempt.job for attempt in self.attempts.values()),
            is_connected=session is not None,
            is_drained=self.is_drained,
            heartbeat_age=None if heard_at is None else now - heard_at,
            load=None if session is None else session.load,
            connected_since=None if session is None else session.connected_at,
            address=None if session is None else session.address,
            lease_left=None if self.lease is None else self.lease.when() - now,
        )


class AgentSocket(Socket, Protocol):
    """What a session needs of the agent's WebSocket (aiohttp's server side has it)."""

    async def close(self, *, code: int = ..., message: bytes = ...) -> bool:
        """Say good-bye; bounded in time by the implementation."""

    def frames(self) -> AsyncIterator[str | bytes]:
        """Iterate over what arrives; ends when the connection does."""


class Registry(Protocol):
    """What a session needs of the dispatcher, which knows all agents and what they hold."""

    store: Store

    @property
    def settings(self) -> Settings:
        """The settings now in force."""

    async def durably(self, write: Callable[[], Awaitable[T]]) -> T:
        """Repeat a write of the store until there is room for it; other errors pass."""

    async def admit(self, session: Session, hello: messages.Hello) -> Agent | messages.Refused:
        """Take an agent in, or say why not."""

    def detach(self, session: Session, agent: Agent) -> None:
        """A connection ended."""

    def note_slots(self, agent: Agent) -> None:
        """The agent's free slots may be others than before."""

    def note_change(self, agent: Agent, kind: AgentChangeKind) -> None:
        """Write down what happened to an agent, without waiting for it."""

    def forget(self, agent: Agent, attempt: Attempt) -> None:
        """An attempt ended for good."""

    async def give_back(self, agent: Agent, attempt: Attempt, loss: Loss, reason: str) -> None:
        """An attempt was lost."""


_Inbox: TypeAlias = asyncio.Queue[messages.AttemptReport | Frame | None]
"""What an agent reports on one attempt, in order; None when the connection is over."""


@dataclass(slots=True)
class _Incoming:
    """A result that arrives: what was announced, and how far it is safe."""

    report: messages.Finished
    digest: Any
    offset: int


class Session:
    """One connection of one agent: its outbox, and one task for each attempt it reports on."""

    def __init__(self, registry: Registry, socket: AgentSocket, address: str) -> None:
        self.address = address
        self.instance = ""
        self.is_welcomed = False
        self.has_ended = asyncio.Event()
        self._registry = registry
        self._store = registry.store
        self._socket = socket
        self._outbox = Outbox()
        self._agent: Agent
        self._inboxes: dict[int, _Inbox] = {}
        self._serving: set[asyncio.Task[None]] = set()
        self._inbox_bytes: dict[int, int] = {}
        self._remains: dict[int, Attempt] = {}
        self._tasks: asyncio.TaskGroup
        self._snapshots: dict[int, IncomingSnapshot] = {}
        self._snapshot_ids = itertools.count(1)
        self._closing = asyncio.Event()
        self._heard = asyncio.Event()
        self.heard_at = asyncio.get_running_loop().time()
        self.connected_at = time.time()
        self.load: float | None = None
        self._frames = socket.frames()

    async def run(self) -> None:
        """Serve the connection to its end; a peer's error ends it with a reason."""
        try:
            await self._serve()
        except* (ProtocolError, IllegalTransition, ResultMismatch) as group:
            error = first_failure(group)
            log.warning("event=agent_error address=%s error=%r", self.address, str(error))
            await self.close(str(error), code=1002)
        except* ConnectionError:
            log.debug("event=connection_lost address=%s", self.address)
        finally:
            self.has_ended.set()
            for incoming in self._snapshots.values():
                incoming.fail("the connection to the agent ended")

    async def is_alive(self) -> bool:
        """Ask the agent for a sign of life and wait for it, a moment only."""
        self._heard.clear()
        self._outbox.put(messages.Heartbeat())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), _PROBE_SECONDS)
        return self._heard.is_set()

    async def close(self, reason: str, code: int = 1001) -> None:
        """End the connection; bounded, also when the peer is gone."""
        # RFC 6455, 5.5: the reason of a close frame has at most 123 bytes
        message = reason.encode()[:120].decode(errors="ignore").encode()
        with suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(self._socket.close(code=code, message=message), _CLOSE_SECONDS)
        self._closing.set()

    def assign(self, attempt: Attempt, assignment: Assignment) -> None:
        """Send a new attempt and its input."""
        settings = self._registry.settings
        limits = settings.services.get(attempt.job.service, ServiceLimits())
        self._outbox.put(
            messages.Assign(
                job_id=attempt.job.id,
                attempt_id=attempt.id,
                number=attempt.number,
                user_id=attempt.job.user_id,
                service=attempt.job.service,
                timeout_seconds=_shorter(limits.timeout, assignment.timeout),
                grace_seconds=settings.kill_grace,
                output=messages.OutputLimits(
                    settings.max_result_bytes, settings.max_result_files, settings.max_log_bytes
                ),
                files=tuple(file.spec for file in assignment.files),
            )
        )
        self._send_input(attempt.id, assignment.files, 0, assignment.content)

    async def kill(self, attempt: Attempt) -> bool:
        """Ask the agent to end an attempt; returns whether it has, and the result is stored."""
        if not self.is_welcomed:
            return False
        self._outbox.put(messages.Kill(attempt.id))
        waits = [asyncio.ensure_future(event.wait()) for event in (attempt.ended, self.has_ended)]
        limit = self._registry.settings.kill_grace + _KILL_SECONDS
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return attempt.ended.is_set()

    def expect_remains(self, attempt: Attempt) -> None:
        """Take what a killed attempt left when it comes; its job is over already."""
        self._remains[attempt.id] = attempt

    @asynccontextmanager
    async def snapshot(self, attempt: Attempt) -> AsyncIterator[IncomingSnapshot]:
        """Ask the agent for the files of an attempt as they are now."""
        request_id = next(self._snapshot_ids)
        transfer = transfer_id(request_id, Stream.SNAPSHOT)
        incoming = IncomingSnapshot(
            lambda offset: self._outbox.put(messages.Acknowledge(transfer, offset))
        )
        self._snapshots[request_id] = incoming
        self._outbox.put(messages.Snapshot(request_id, attempt.id))
        try:
            yield incoming
        finally:
            del self._snapshots[request_id]
            self._outbox.put(messages.SnapshotDone(request_id))

    # --- life of the connection

    async def _serve(self) -> None:
        hello = await self._receive_hello()
        answer = await self._registry.admit(self, hello)
        if isinstance(answer, messages.Refused):
            log.warning("event=agent_refused address=%s reason=%r", self.address, answer.reason)
            self._outbox.put(answer)
            await self._outbox.flush(self._socket)
            await self.close(answer.reason, code=1008)
            return
        self._agent = answer
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._welcome(hello)
                await self._converse()
                await self._finish_inboxes()
        finally:
            log.info("event=agent_disconnected agent=%s", self._agent.name)
            self._registry.detach(self, self._agent)

    async def _converse(self) -> None:
        """Send and receive until the connection is over, however it ends."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._outbox.run(self._socket), name="outbox")
                tasks.create_task(self._watch_silence(), name="watch silence")
                tasks.create_task(self._end_when_closed(), name="close")
                self._registry.note_slots(self._agent)
                await self._receive()
                raise _ConnectionEnded
        except* (ConnectionError, _ConnectionEnded):
            self.is_welcomed = False
            self._registry.note_slots(self._agent)

    async def _finish_inboxes(self) -> None:
        """Store what has arrived: on a link that breaks all the time it is all the progress."""
        for inbox in self._inboxes.values():
            inbox.put_nowait(None)
        if self._serving:
            _, unfinished = await asyncio.wait(self._serving, timeout=_FINISH_SECONDS)
            for task in unfinished:
                task.cancel()

    async def _end_when_closed(self) -> None:
        await self._closing.wait()
        raise _ConnectionEnded

    async def _receive_hello(self) -> messages.Hello:
        try:
            frame = await asyncio.wait_for(anext(self._frames), _HELLO_SECONDS)
        except (TimeoutError, StopAsyncIteration):
            raise ProtocolError("no hello") from None
        hello = codec.decode(frame) if isinstance(frame, str) else None
        if not isinstance(hello, messages.Hello):
            raise ProtocolError("the first message must be a hello")
        self.instance = hello.instance
        self._note_heard()
        return hello

    async def _welcome(self, hello: messages.Hello) -> None:
        """Compare what the agent holds with what it should hold, and act on the difference."""
        agent, settings = self._agent, self._registry.settings
        log.info(
            "event=agent_connected agent=%s id=%s address=%s slots=%d attempts=%d",
            agent.name,
            agent.id,
            self.address,
            agent.slots,
            len(hello.attempts),
        )
        await self._find_remains(hello)
        wanted = [
            held
            for held in hello.attempts
            if held.attempt_id in agent.attempts or held.attempt_id in self._remains
        ]
        keep = [
            messages.KeptAttempt(
                held.attempt_id,
                await self._store.attempts.result_size(held.attempt_id),
                await self._store.output.end(held.attempt_id, Stream.STDOUT),
                await self._store.output.end(held.attempt_id, Stream.STDERR),
            )
            for held in wanted
        ]
        self._outbox.put(
            messages.Welcome(
                protocol=messages.PROTOCOL_VERSION,
                version=config.VERSION,
                lease_seconds=settings.lease,
                heartbeat_seconds=_heartbeat_seconds(settings),
                keep=tuple(keep),
            )
        )
        # from here on, what is assigned goes straight to the agent
        self.is_welcomed = True
        for attempt_id in self._remains:
            self._outbox.put(messages.Kill(attempt_id))
        present = {held.attempt_id for held in hello.attempts}
        missing = [attempt for attempt in agent.attempts.values() if attempt.id not in present]
        for held in wanted:
            is_to_run = held.attempt_id in agent.attempts
            if is_to_run and held.phase is messages.AttemptPhase.RECEIVING:
                files = await self._store.attempts.input_files(held.attempt_id)
                self._send_input(held.attempt_id, files, held.input_offset)
        for attempt in missing:
            reason = f"agent {agent.name} does not have the job any more"
            await self._registry.give_back(agent, attempt, Loss.AGENT_AWAY, reason)

    async def _find_remains(self, hello: messages.Hello) -> None:
        """See whether the agent comes with what is left of jobs that were killed meanwhile."""
        for held in hello.attempts:
            if held.attempt_id in self._agent.attempts:
                continue
            killed = await self._store.attempts.killed_without_result(held.attempt_id)
            if killed is not None:
                # as far as can be: what the agent reports of its way changes nothing any more
                last = jobs.ACTIVE_STATES[-1]
                self._remains[held.attempt_id] = replace(Attempt.of(killed), state=last)

    async def _receive(self) -> None:
        async for frame in self._frames:
            self._note_heard()
            if isinstance(frame, bytes):
                self._take_frame(decode_frame(frame))
            else:
                self._take_message(codec.decode(frame))

    def _note_heard(self) -> None:
        self.heard_at = asyncio.get_running_loop().time()
        self._heard.set()

    async def _watch_silence(self) -> None:
        """End a half-open connection: nothing came for some heartbeats."""
        limit = _SILENT_HEARTBEATS * _heartbeat_seconds(self._registry.settings)
        loop = asyncio.get_running_loop()
        while (left := self.heard_at + limit - loop.time()) > 0:  # noqa: ASYNC110 - no poll: the deadline moves
            await asyncio.sleep(left)
        log.warning("event=agent_silent agent=%s seconds=%g", self._agent.name, limit)
        raise _ConnectionEnded

    # --- messages

    def _take_message(self, message: messages.Message | codec.UnknownMessage) -> None:
        match message:
            case messages.Heartbeat():
                self.load = message.load
                self._outbox.put(messages.Heartbeat())
            case messages.Drain():
                log.info("event=agent_drains agent=%s", self._agent.name)
                self._registry.note_change(self._agent, AgentChangeKind.DRAINING)
                self._agent.slots = 0
                self._registry.note_slots(self._agent)
            case messages.Acknowledge():
                self._outbox.acknowledge(message.transfer, message.offset)
            case (
                messages.Accepted()
                | messages.Started()
                | messages.Finished()
                | messages.Rejected()
                | messages.Lost()
            ):
                self._inbox(message.attempt_id).put_nowait(message)
            case messages.SnapshotReady():
                if incoming := self._snapshots.get(message.request_id):
                    incoming.begin(message.size)
            case messages.SnapshotRefused():
                if incoming := self._snapshots.get(message.request_id):
                    incoming.fail(message.reason)
            case codec.UnknownMessage():
                log.info("event=unknown_message agent=%s type=%s", self._agent.name, message.type)
            case _:
                raise ProtocolError(f"an agent does not send {type(message).__name__}")

    def _take_frame(self, frame: Frame) -> None:
        attempt_id, stream = transfer_parts(frame.transfer)
        if stream is Stream.INPUT:
            raise ProtocolError(f"an agent does not send {stream.name}")
        if stream is Stream.SNAPSHOT:
            if incoming := self._snapshots.get(attempt_id):  # else nobody wants it any more
                incoming.put(frame)
            return
        waiting = self._inbox_bytes.get(frame.transfer, 0) + len(frame.data)
        if waiting > WINDOW_BYTES + CHUNK_BYTES:
            raise ProtocolError(f"attempt {attempt_id}: sent more than the window allows")
        self._inbox(attempt_id).put_nowait(frame)
        self._inbox_bytes[frame.transfer] = waiting

    def _inbox(self, attempt_id: int) -> _Inbox:
        inbox = self._inboxes.get(attempt_id)
        if inbox is None:
            attempt = self._agent.attempts.get(attempt_id) or self._remains.get(attempt_id)
            inbox = self._inboxes[attempt_id] = asyncio.Queue()
            serve = (
                self._serve_unknown(attempt_id, inbox)
                if attempt is None
                else self._serve_attempt(attempt, inbox)
            )
            task = self._tasks.create_task(serve, name=f"attempt {attempt_id}")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        return inbox

    async def _serve_unknown(self, attempt_id: int, inbox: _Inbox) -> None:
        """Answer for an attempt that is not (any more) this agent's."""
        item = await inbox.get()
        try:
            if isinstance(item, messages.Finished):
                # a repeated report of a result that is stored already does no harm
                await self._registry.durably(lambda: self._store.attempts.finish(item, 0, ()))
                self._outbox.put(messages.Stored(attempt_id))
            elif item is not None:
                self._outbox.put(messages.Drop(attempt_id, "superseded"))
        except (Superseded, ResultMismatch):
            self._outbox.put(messages.Drop(attempt_id, "superseded"))
        finally:
            self._close_inbox(attempt_id)

    async def _serve_attempt(
        self,
        attempt: Attempt,
        inbox: _Inbox,
    ) -> None:
        """Carry out what the agent reports on one attempt, in order, until it has ended."""
        try:
            await self._carry_out_reports(attempt, inbox)
        except Superseded:
            self._outbox.put(messages.Drop(attempt.id, "superseded"))
            self._registry.forget(self._agent, attempt)
        finally:
            self._close_inbox(attempt.id)

    async def _carry_out_reports(
        self,
        attempt: Attempt,
        inbox: _Inbox,
    ) -> None:
        incoming: _Incoming | None = None
        output: list[Frame] = []
        while True:
            item = await self._next_report(attempt, inbox, output)
            match item:
                case None:
                    return
                case messages.Accepted():
                    self._outbox.close(transfer_id(attempt.id, Stream.INPUT))
                    await self._advance(attempt, jobs.JobState.SUBMITTED, "input received")
                case messages.Started():
                    await self._advance(attempt, jobs.JobState.RUNNING, "process started")
                case messages.Finished():
                    incoming = await self._begin_result(attempt, item)
                    if incoming.offset == item.result_size:
                        # stored before, but the agent did not hear of it
                        await self._finish(attempt, incoming, incoming.offset, [], output)
                        return
                case Frame():
                    if incoming is None:
                        raise ProtocolError(f"attempt {attempt.id}: bytes before Finished")
                    if await self._take_result(attempt, incoming, item, inbox, output):
                        return
                case messages.Lost():
                    reason = f"agent {self._agent.name} lost it: {item.reason}"
                    await self._registry.give_back(self._agent, attempt, Loss.REPORTED, reason)
                    self._outbox.put(messages.Drop(attempt.id, "lost"))
                    return
                case messages.Rejected():
                    await self._reject(attempt, item.reason)
                    return

    async def _next_report(
        self, attempt: Attempt, inbox: _Inbox, output: list[Frame]
    ) -> messages.AttemptReport | Frame | None:
        """Return what comes next that is not output; that is stored when nothing else waits.

        What is left in ``output`` came just before: it is to be stored with what is returned.
        """
        while True:
            if output and inbox.empty():
                await self._store_output(attempt, output)
                output.clear()
            item = await inbox.get()
            if isinstance(item, Frame) and _is_output(item):
                output.append(item)
                continue
            if item is None and output:
                await self._store_output(attempt, output)
            return item

    async def _reject(self, attempt: Attempt, reason: str) -> None:
        await self._registry.durably(lambda: self._store.attempts.reject(attempt.id, reason))
        self._outbox.put(messages.Drop(attempt.id, "rejected"))
        self._end(attempt, jobs.JobState.INVALID)

    def _close_inbox(self, attempt_id: int) -> None:
        self._outbox.close(transfer_id(attempt_id, Stream.INPUT))
        self._inboxes.pop(attempt_id, None)
        for stream in Stream:
            self._inbox_bytes.pop(transfer_id(attempt_id, stream), None)

    async def _advance(self, attempt: Attempt, state: jobs.JobState, reason: str) -> None:
        if jobs.ACTIVE_STATES.index(attempt.state) >= jobs.ACTIVE_STATES.index(state):
            return  # repeated after a reconnect
        await self._registry.durably(
            lambda: self._store.attempts.advance(attempt.id, state, reason)
        )
        attempt.state = state
        log.info(
            "event=state job=%d attempt=%d agent=%s state=%s",
            attempt.job.id,
            attempt.id,
            self._agent.name,
            state,
        )

    def _end(self, attempt: Attempt, state: jobs.JobState) -> None:
        self._registry.forget(self._agent, attempt)
        log.info(
            "event=ended job=%d attempt=%d agent=%s state=%s",
            attempt.job.id,
            attempt.id,
            self._agent.name,
            state,
        )

    # --- input out, result in

    def _send_input(
        self,
        attempt_id: int,
        files: tuple[StoredFile, ...],
        offset: int,
        content: bytes | None = None,
    ) -> None:
        """Send the input from ``offset`` on; ``content`` is all of it, if that is here already."""
        size = sum(file.spec.size for file in files)
        if not 0 <= offset <= size:
            raise ProtocolError(f"attempt {attempt_id}: has {offset} of {size} input bytes")

        async def source(position: int) -> bytes:
            if content is not None:
                return content[position:]
            return await self._store.blobs.read_files(files, position)

        if offset < size:
            self._outbox.open(transfer_id(attempt_id, Stream.INPUT), source, offset, size)

    async def _begin_result(self, attempt: Attempt, report: messages.Finished) -> _Incoming:
        if report.state not in jobs.FINAL_STATES:
            raise ProtocolError(f"attempt {report.attempt_id}: finished as {report.state}")
        if report.result_size < 1:
            raise ProtocolError(f"attempt {report.attempt_id}: a result of no bytes")
        if not attempt.may_have_result:
            return _Incoming(report, hashlib.sha256(), 0)
        offset = await self._store.attempts.result_size(report.attempt_id)
        if offset > report.result_size or offset % CHUNK_BYTES:
            await self._registry.durably(
                lambda: self._store.attempts.discard_result(report.attempt_id)
            )
            offset = 0
        digest = await self._store.attempts.result_digest(report.attempt_id, offset)
        return _Incoming(report, digest, offset)

    async def _take_result(
        self,
        attempt: Attempt,
        incoming: _Incoming,
        first: Frame,
        inbox: _Inbox,
        output: Sequence[Frame],
    ) -> bool:
        """Store the frames that are there; returns whether the result is whole and stored."""
        attempt.may_have_result = True  # also if the connection ends before the store answers
        start = incoming.offset
        chunks: list[bytes] = []
        frame: Frame = first
        while True:
            self._inbox_bytes[frame.transfer] -= len(frame.data)
            _append_frame(incoming, frame, chunks)
            if inbox.empty():
                break
            item = inbox.get_nowait()
            if item is None:
                inbox.put_nowait(None)  # for the caller, after what is here
                break
            if not isinstance(item, Frame) or _is_output(item):
                raise ProtocolError(f"attempt {attempt.id}: {type(item).__name__} within a result")
            frame = item
        if incoming.offset == incoming.report.result_size:
            for chunk in chunks:
                incoming.digest.update(chunk)
            await self._finish(attempt, incoming, start, chunks, output)
            return True
        if chunks:
            # side by side: the one takes the event loop's time, the other the writer's
            await asyncio.gather(
                self._registry.durably(
                    lambda: self._store.attempts.append_result(attempt.id, start, chunks)
                ),
                _hash(incoming, chunks),
            )
        transfer = transfer_id(attempt.id, Stream.RESULT)
        self._outbox.put(messages.Acknowledge(transfer, incoming.offset))
        return False

    async def _store_output(self, attempt: Attempt, frames: Sequence[Frame]) -> None:
        """Store what was written since the last time, and open the window again."""
        new = self._new_output(frames)
        await self._registry.durably(lambda: self._store.output.append(attempt.id, new))
        ends: dict[int, int] = {}
        for frame in frames:
            self._inbox_bytes[frame.transfer] -= len(frame.data)
            ends[frame.transfer] = frame.offset + len(frame.data)
        for transfer, end in ends.items():
            self._outbox.put(messages.Acknowledge(transfer, end))

    def _new_output(self, frames: Sequence[Frame]) -> NewOutput:
        pieces = tuple(
            OutputPiece(transfer_parts(frame.transfer)[1], frame.offset, frame.data)
            for frame in frames
        )
        return NewOutput(pieces, self._registry.settings.max_log_bytes)

    async def _finish(
        self,
        attempt: Attempt,
        incoming: _Incoming,
        start: int,
        tail: list[bytes],
        output: Sequence[Frame],
    ) -> None:
        report = incoming.report
        if incoming.digest.hexdigest() != report.result_sha256:
            # the agent would send the same again for ever
            reason = f"agent {self._agent.name} sent a result with another SHA-256 than it said"
            await self._registry.give_back(self._agent, attempt, Loss.REPORTED, reason)
            self._outbox.put(messages.Drop(attempt.id, "damaged"))
            return
        new = self._new_output(output)
        await self._registry.durably(lambda: self._store.attempts.finish(report, start, tail, new))
        self._outbox.put(messages.Stored(attempt.id))
        self._end(attempt, report.state)


def _is_output(frame: Frame) -> bool:
    return transfer_parts(frame.transfer)[1] in OUTPUT_STREAMS


def _append_frame(incoming: _Incoming, frame: Frame, chunks: list[bytes]) -> None:
    """Check that a frame continues the result and take its bytes; pass over a repeated one."""
    if frame.offset < incoming.offset:
        return
    left = incoming.report.result_size - frame.offset
    if frame.offset > incoming.offset or len(frame.data) != min(left, CHUNK_BYTES):
        raise ProtocolError(
            f"attempt {incoming.report.attempt_id}: {len(frame.data)} bytes at {frame.offset},"
            f" expected offset {incoming.offset}"
        )
    chunks.append(frame.data)
    incoming.offset += len(frame.data)


async def _hash(incoming: _Incoming, chunks: Sequence[bytes]) -> None:
    """Take chunks into the digest, with a turn for others before each."""
    for chunk in chunks:
        await asyncio.sleep(0)
        incoming.digest.update(chunk)


def _shorter(one: int | None, other: int | None) -> int | None:
    """Return the shorter of two time limits; None is no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)


def _heartbeat_seconds(settings: Settings) -> float:
    """Often enough that some may be late within a lease."""
    return min(10.0, settings.lease / 6)


class _ConnectionEnded(Exception):
    """The connection is over, as connections are; unwinds its tasks."""
