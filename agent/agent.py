"""The agent process: connection, slots, transfers, adoption after restart.

Every attempt is driven by a task of its own, from receiving its input to the server's
word that the result is stored, whether or not there is a connection. A connection, when
there is one, carries what the attempts have to say; after a reconnect both ends compare
notes and go on from where they were.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
from dataclasses import dataclass, field

import aiohttp

import config
from agent import attempt_directory as runner
from agent.inotify import WriteWatch
from agent.output_follower import Follower
from agent.settings import AgentRefused, AgentSettings
from agent.snapshots import Snapshots, read_piece
from agent.supervision.launcher import Launcher
from agent.workdir import identity, lock, unusable_refused
from runtime import first_failure
from wire import codec, messages
from wire.frames import Frame, Stream, decode_frame, transfer_id, transfer_parts
from wire.messages import AttemptPhase
from wire.outbox import Outbox

log = logging.getLogger("orchestrator.agent")

_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_SILENT_HEARTBEATS = 2.5
_STOP_SECONDS = 5.0


@dataclass(slots=True)
class _Held:
    """An attempt that this agent holds, and the task that drives it."""

    directory: runner.JobDirectory
    phase: AttemptPhase
    follower: Follower
    input: asyncio.Queue[Frame] = field(default_factory=asyncio.Queue)
    finished: messages.Finished | None = None
    failure: messages.Rejected | messages.Lost | None = None
    is_ending: bool = False
    released: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def id(self) -> int:
        return self.directory.assign.attempt_id

    @property
    def job_id(self) -> int:
        return self.directory.assign.job_id


class Agent:
    """One agent; :meth:`run` serves until it is cancelled or refused."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._attempts_path = settings.workdir / "attempts"
        self._agent_id = ""
        self._instance = secrets.token_hex(8)
        self._launcher = Launcher(
            settings.workdir,
            runner.inherited_environment(os.environ),
            preparing="agent.isolation.before_exec",
        )
        self._held: dict[int, _Held] = {}
        self._write_watch = WriteWatch()
        self._snapshots: Snapshots
        self._snapshot_requests: dict[int, asyncio.Task[None]] = {}
        self._outbox: Outbox | None = None
        self._heard_at = 0.0
        self._is_draining = False
        self._retry_pause = _FIRST_RETRY_SECONDS
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Adopt what earlier processes left, then stay connected.

        Raises :class:`AgentRefused` if the server refuses it for good. Cancelled, it leaves
        its jobs running; the next process with this work directory adopts them.
        """
        held_lock = await lock(self._settings.workdir)
        self._snapshots = Snapshots(self._settings.workdir / "snapshots")
        try:
            with unusable_refused(self._settings.workdir):
                self._agent_id = identity(self._settings.workdir)
            self._launcher.warm_up()
            async with asyncio.TaskGroup() as self._tasks:
                for directory in await asyncio.to_thread(
                    runner.JobDirectory.find_all, self._attempts_path
                ):
                    held = self._new_held(directory, directory.phase())
                    is_finished = held.phase is AttemptPhase.FINISHED
                    held.is_ending = directory.is_to_be_killed() and not is_finished
                    self._hold(held)
                log.info(
                    "event=agent_started agent=%s id=%s adopted=%d",
                    self._settings.name,
                    self._agent_id,
                    len(self._held),
                )
                await self._stay_connected()
        finally:
            self._launcher.close()
            self._write_watch.close()
            self._snapshots.close()
            os.close(held_lock)

    async def drain(self) -> None:
        """Take nothing new; returns when all that is held has been delivered."""
        self._is_draining = True
        self._put(messages.Drain())
        log.info("event=draining agent=%s attempts=%d", self._settings.name, len(self._held))
        while tasks := [held.task for held in self._held.values() if held.task is not None]:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    # --- connection

    async def _stay_connected(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                try:
                    await self._connect(session)
                except (aiohttp.ClientError, OSError, TimeoutError, _ConnectionEnded) as error:
                    log.info("event=connection_failed error=%r", str(error))
                except messages.ProtocolError as error:
                    log.warning("event=server_error error=%r", str(error))
                if _is_cancelled():
                    raise asyncio.CancelledError
                # full jitter: agents of a restarted server must not come back all at once
                await asyncio.sleep(random.uniform(_FIRST_RETRY_SECONDS / 2, self._retry_pause))
                self._retry_pause = min(self._retry_pause * 2, _LAST_RETRY_SECONDS)

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        token = self._settings.token
        try:
            socket = await asyncio.wait_for(
                session.ws_connect(
                    f"{self._settings.server}/agent",
                    headers={"Authorization": f"Bearer {token}"} if token else {},
                    max_msg_size=codec.MAX_TEXT_BYTES,
                    compress=0,
                    autoping=True,
                    timeout=aiohttp.ClientWSTimeout(ws_close=_STOP_SECONDS),
                ),
                _CONNECT_SECONDS,
            )
        except aiohttp.WSServerHandshakeError as error:
            raise _handshake_error(error) from None
        async with socket:
            await self._converse(socket)

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        outbox = Outbox()
        await socket.send_str(codec.encode(self._hello()))
        welcome = await asyncio.wait_for(_receive_welcome(socket), _CONNECT_SECONDS)
        log.info("event=connected agent=%s server_version=%s", self._settings.name, welcome.version)
        self._retry_pause = _FIRST_RETRY_SECONDS
        self._outbox = outbox
        self._reconcile(welcome, outbox)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(outbox.run(socket), name="outbox")
                tasks.create_task(self._beat(welcome.heartbeat_seconds), name="heartbeat")
                await self._receive(socket)
                raise _ConnectionEnded("the server closed the connection")
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        finally:
            self._outbox = None
            for task in self._snapshot_requests.values():
                task.cancel()
            self._snapshot_requests.clear()
            for held in self._held.values():
                held.follower.disconnect()
                _empty(held.input)

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            protocol=messages.PROTOCOL_VERSION,
            agent_id=self._agent_id,
            instance=self._instance,
            name=self._settings.name,
            version=config.VERSION,
            slots=0 if self._is_draining else self._settings.slots,
            services=self._settings.services,
            attempts=tuple(
                messages.HeldAttempt(held.job_id, held.id, held.phase, held.directory.input_offset)
                for held in self._held.values()
            ),
        )

    def _reconcile(self, welcome: messages.Welcome, outbox: Outbox) -> None:
        all_kept = {attempt.attempt_id: attempt for attempt in welcome.keep}
        for held in list(self._held.values()):
            if kept := all_kept.get(held.id):
                held.follower.connect(outbox, (kept.stdout_offset, kept.stderr_offset))
                self._report_all(held, kept.result_offset)
            else:
                self._drop(held.id, "the server does not want it any more")

    async def _beat(self, interval: float) -> None:
        """Send heartbeats; end the connection when the server was silent for too long."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while loop.time() - self._heard_at < _SILENT_HEARTBEATS * interval:
            self._put(messages.Heartbeat(os.getloadavg()[0]))
            await asyncio.sleep(interval)
        raise _ConnectionEnded("the server is silent")

    async def _receive(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        loop = asyncio.get_running_loop()
        async for frame in socket:
            self._heard_at = loop.time()
            if frame.type is aiohttp.WSMsgType.TEXT:
                self._take_message(codec.decode(frame.data))
            elif frame.type is aiohttp.WSMsgType.BINARY:
                self._take_frame(decode_frame(frame.data))

    def _take_message(self, message: messages.Message | codec.UnknownMessage) -> None:
        match message:
            case messages.Assign():
                self._take_assignment(message)
            case messages.Acknowledge():
                if self._outbox is not None:
                    self._outbox.acknowledge(message.transfer, message.offset)
            case messages.Stored():
                if held := self._held.get(message.attempt_id):
                    self._close_transfers(held)
                    held.released.set()
            case messages.Snapshot() | messages.SnapshotDone():
                self._take_snapshot_message(message)
            case messages.Kill():
                self._kill(message.attempt_id)
            case messages.Drop():
                self._drop(message.attempt_id, message.reason)
            case messages.Heartbeat():
                pass
            case codec.UnknownMessage():
                log.info("event=unknown_message type=%s", message.type)
            case _:
                raise messages.ProtocolError(f"a server does not send {type(message).__name__}")

    def _take_frame(self, frame: Frame) -> None:
        attempt_id, stream = transfer_parts(frame.transfer)
        if stream is not Stream.INPUT:
            raise messages.ProtocolError(f"a server does not send {stream.name}")
        if held := self._held.get(attempt_id):
            held.input.put_nowait(frame)

    def _put(self, message: messages.Message) -> None:
        """Say it if there is a connection; if not, the next one begins with a report of all."""
        if self._outbox is not None:
            self._outbox.put(message)

    # --- snapshots

    def _take_snapshot_message(self, message: messages.Snapshot | messages.SnapshotDone) -> None:
        if present := self._snapshot_requests.pop(message.request_id, None):
            present.cancel()
        if isinstance(message, messages.Snapshot) and self._outbox is not None:
            self._snapshot_requests[message.request_id] = self._tasks.create_task(
                self._answer_snapshot_request(message, self._outbox),
                name=f"snapshot {message.request_id}",
            )

    async def _answer_snapshot_request(self, request: messages.Snapshot, outbox: Outbox) -> None:
        """Make and send a ZIP; ends by cancellation, when the server or the connection does."""
        request_id = request.request_id
        transfer = transfer_id(request_id, Stream.SNAPSHOT)
        try:
            held = self._held.get(request.attempt_id)
            if held is None:
                raise runner.SnapshotImpossible("the agent does not have the job any more")
            async with self._snapshots.of(held.directory) as path:
                if held.released.is_set() or self._held.get(held.id) is not held:
                    raise runner.SnapshotImpossible("the job has ended meanwhile")

                async def source(offset: int) -> bytes:
                    return await asyncio.to_thread(read_piece, path, offset)

                size = path.stat().st_size
                outbox.put(messages.SnapshotReady(request_id, size))
                outbox.open(transfer, source, 0, size)
                await asyncio.Event().wait()
        except runner.SnapshotImpossible as error:
            outbox.put(messages.SnapshotRefused(request_id, str(error)))
        finally:
            outbox.close(transfer)

    # --- attempts

    def _take_assignment(self, assign: messages.Assign) -> None:
        if assign.attempt_id in self._held:
            return  # repeated
        path = self._attempts_path / str(assign.attempt_id)
        held = self._new_held(runner.JobDirectory(path, assign), AttemptPhase.RECEIVING)
        if self._outbox is not None:
            held.follower.connect(self._outbox, (0, 0))
        self._hold(held)

    def _new_held(self, directory: runner.JobDirectory, phase: AttemptPhase) -> _Held:
        attempt_id, logs = directory.assign.attempt_id, directory.logs()
        return _Held(directory, phase, Follower(attempt_id, logs, self._write_watch))

    def _hold(self, held: _Held) -> None:
        self._held[held.id] = held
        held.task = self._tasks.create_task(self._drive(held), name=f"attempt {held.id}")

    def _kill(self, attempt_id: int) -> None:
        """End a job and report what it left; does nothing if it has ended."""
        held = self._held.get(attempt_id)
        if held is None or held.task is None or held.is_ending:
            return
        if held.phase is AttemptPhase.FINISHED or held.failure is not None:
            return
        log.info("event=killing job=%d attempt=%d", held.job_id, attempt_id)
        held.is_ending = True
        before = held.task
        before.cancel()
        held.task = self._tasks.create_task(
            self._drive(held, before), name=f"kill attempt {attempt_id}"
        )

    def _drop(self, attempt_id: int, reason: str) -> None:
        held = self._held.get(attempt_id)
        if held is None or held.task is None:
            return
        log.info("event=dropped job=%d attempt=%d reason=%r", held.job_id, attempt_id, reason)
        del self._held[attempt_id]
        self._close_transfers(held)
        held.task.cancel()
        self._tasks.create_task(self._discard(held), name=f"discard {attempt_id}")

    async def _discard(self, held: _Held) -> None:
        """Kill what runs of an attempt and remove it."""
        assert held.task is not None
        await asyncio.wait([held.task])
        try:
            if held.directory.path.exists():
                await held.directory.kill()
        except (OSError, runner.JobLost):
            log.exception("event=kill_failed attempt=%d", held.id)
        await self._remove(held)

    async def _drive(self, held: _Held, before: asyncio.Task[None] | None = None) -> None:
        """Bring an attempt from where it is to its end, once the task ``before`` is over."""
        try:
            if before is not None:
                await asyncio.wait([before])
            if held.is_ending:
                await self._end_job(held)
            else:
                await self._run_job(held)
            await held.released.wait()
        except runner.JobInvalid as error:
            held.failure = messages.Rejected(held.id, str(error))
        except runner.JobLost as error:
            held.failure = messages.Lost(held.id, str(error))
        except OSError as error:
            log.exception("event=attempt_failed job=%d attempt=%d", held.job_id, held.id)
            held.failure = messages.Lost(held.id, f"{error.strerror}: {error.filename}")
        except Exception as error:  # a defect here must not end the other jobs
            log.exception("event=attempt_failed job=%d attempt=%d", held.job_id, held.id)
            held.failure = messages.Lost(held.id, f"defect in the agent: {error!r}")
        if held.failure is not None:
            self._put(held.failure)
            await held.released.wait()  # in vain: the server answers with a drop, which cancels
        await self._remove(held)
        self._held.pop(held.id, None)

    async def _remove(self, held: _Held) -> None:
        try:
            await held.directory.remove()
        except OSError:
            # the next start of the agent tries again
            log.exception("event=remove_failed attempt=%d", held.id)

    async def _run_job(self, held: _Held) -> None:
        directory = held.directory
        if held.phase is not AttemptPhase.FINISHED:
            directory.check_boot()
        if held.phase is AttemptPhase.RECEIVING:
            await self._receive_input(held)
            self._enter(held, AttemptPhase.ACCEPTED)
        if held.phase is AttemptPhase.ACCEPTED:
            await directory.start(self._launcher)
            self._enter(held, AttemptPhase.RUNNING)
        if held.phase is AttemptPhase.RUNNING:
            ended = await _end_of_job(held)
            held.is_ending = True  # from here on there is nothing to kill
            held.finished = await directory.finish(ended)
            self._enter(held, AttemptPhase.FINISHED)
        else:
            held.finished = await asyncio.to_thread(directory.report)
            self._enter(held, AttemptPhase.FINISHED)

    async def _end_job(self, held: _Held) -> None:
        directory = await _existing(held.directory)
        ended = await directory.kill()
        if directory.phase() is AttemptPhase.RUNNING and held.phase is AttemptPhase.ACCEPTED:
            self._enter(held, AttemptPhase.RUNNING)  # it was started before the kill came
        held.finished = await directory.finish(ended)
        self._enter(held, AttemptPhase.FINISHED)

    async def _receive_input(self, held: _Held) -> None:
        directory = await _existing(held.directory)
        transfer = transfer_id(held.id, Stream.INPUT)
        while directory.input_offset < directory.input_size:
            frame = await held.input.get()
            if frame.offset < directory.input_offset:
                continue  # repeated
            if frame.offset > directory.input_offset:
                raise messages.ProtocolError(f"attempt {held.id}: a gap in the input")
            await directory.write_input(frame.data)
            if directory.input_offset < directory.input_size:  # else Accepted says it
                self._put(messages.Acknowledge(transfer, directory.input_offset))
        await directory.accept_input()

    def _enter(self, held: _Held, phase: AttemptPhase) -> None:
        held.phase = phase
        log.info("event=%s job=%d attempt=%d", phase, held.job_id, held.id)
        match phase:
            case AttemptPhase.ACCEPTED:
                self._put(messages.Accepted(held.id))
            case AttemptPhase.RUNNING:
                self._put(messages.Started(held.id))
            case AttemptPhase.FINISHED:
                held.follower.send_rest(lambda: self._report_result(held, 0))

    def _report_all(self, held: _Held, result_offset: int) -> None:
        """Tell a new connection how far an attempt is; what the server knows does no harm."""
        if held.failure is not None:
            self._put(held.failure)
            return
        if held.phase is not AttemptPhase.RECEIVING:
            self._put(messages.Accepted(held.id))
        if held.phase in (AttemptPhase.RUNNING, AttemptPhase.FINISHED):
            self._put(messages.Started(held.id))
        if held.phase is AttemptPhase.FINISHED and held.finished is not None:
            held.follower.send_rest(lambda: self._report_result(held, result_offset))

    def _close_transfers(self, held: _Held) -> None:
        held.follower.close()
        if self._outbox is not None:
            self._outbox.close(transfer_id(held.id, Stream.RESULT))

    def _report_result(self, held: _Held, offset: int) -> None:
        if self._outbox is None or held.finished is None:
            return
        size = held.finished.result_size
        self._outbox.put(held.finished)
        if offset < size:
            transfer = transfer_id(held.id, Stream.RESULT)
            self._outbox.open(transfer, held.directory.read_result, offset, size)


async def _end_of_job(held: _Held) -> runner.Exit:
    """Wait for the end of a job; meanwhile its output is followed."""
    following = asyncio.create_task(held.follower.run(), name=f"follow attempt {held.id}")
    try:
        return await held.directory.wait()
    finally:
        following.cancel()


async def _existing(directory: runner.JobDirectory) -> runner.JobDirectory:
    if not directory.path.exists():
        await directory.create()
    return directory


class _ConnectionEnded(Exception):
    """The connection is over, as connections are; another one follows."""


def _is_cancelled() -> bool:
    """Whether this task was cancelled and the cancellation got lost.

    A TaskGroup that is cancelled while its body or a child fails raises the failure only
    (CPython 3.11 to 3.12, gh-116720).
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _empty(queue: asyncio.Queue[Frame]) -> None:
    while not queue.empty():
        queue.get_nowait()


def _handshake_error(error: aiohttp.WSServerHandshakeError) -> Exception:
    match error.status:
        case 401:
            return AgentRefused(
                "the server refused the agent token; show the right one with"
                " 'python orchestrator.py agent-token' where the server runs"
            )
        case 403:
            return AgentRefused(
                "the server does not go by that name; add it to its ALLOWED_HOSTS setting"
            )
        case status:
            return _ConnectionEnded(f"the server answered with HTTP status {status}")


async def _receive_welcome(socket: aiohttp.ClientWebSocketResponse) -> messages.Welcome:
    async for frame in socket:
        if frame.type is not aiohttp.WSMsgType.TEXT:
            continue
        message = codec.decode(frame.data)
        if isinstance(message, messages.Refused) and not message.retry:
            raise AgentRefused(message.reason)
        if isinstance(message, messages.Refused):
            raise _ConnectionEnded(message.reason)
        if isinstance(message, messages.Welcome):
            return message
    raise _ConnectionEnded("the server closed the connection before its welcome")
