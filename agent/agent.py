"""The agent: its attempts, its connection, and what each tells the other.

After a reconnect both ends compare what they hold and go on from where they were.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import config
from agent.attempt_directory import AttemptDirectory, find_all, path_of
from agent.attempts import Attempt, phase_of
from agent.connection import Channel, Connection, Received, RetryPause, stay_connected
from agent.executors.base import Execution, Executor
from agent.inotify import TimedWatch, WriteWatch
from agent.settings import AgentRefused, AgentSettings
from agent.snapshots import SnapshotRequests, Snapshots
from agent.workdir import Identity, identity, lock, unusable_refused
from telemetry.logs import event
from wire import codec, messages
from wire.frames import Frame, Stream, transfer_parts
from wire.messages import AttemptPhase

log = logging.getLogger("orchestrator.agent")

_BEATS_AFTER_DRAIN = 2
_DRAIN_HEARD_SECONDS = 5.0


class Agent:
    """One agent; :meth:`run` serves until it is cancelled or refused."""

    def __init__(self, settings: AgentSettings, executor: Executor) -> None:
        self._settings = settings
        self._executor = executor
        self._attempts_path = settings.workdir / "attempts"
        self._identity: Identity
        self._incarnation = ""
        self._instance = secrets.token_hex(8)
        self._held: dict[int, Attempt] = {}
        self._write_watch = TimedWatch() if executor.is_remote else WriteWatch()
        self._snapshots: Snapshots
        self._snapshot_requests: SnapshotRequests
        self._channel = Channel()
        self._pause = RetryPause()
        self._delivered = 0  # bytes of results that the server had when it last said so
        self._is_draining = False
        self._is_busy = asyncio.Event()
        self._beats_heard = 0
        self._beat_came = asyncio.Event()
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
                self._identity = identity(self._settings.workdir)
            await self._executor.make_ready()
            async with asyncio.TaskGroup() as self._tasks:
                self._tasks.create_task(
                    self._executor.run(), name=f"{self._executor.name} executor"
                )
                await self._adopt()
                event(
                    log,
                    "agent_started",
                    agent=self._settings.name,
                    id=self._identity.id,
                    adopted=len(self._held),
                )
                await stay_connected(self._settings, self._pause, self._converse)
        finally:
            self._executor.close()
            self._write_watch.close()
            self._snapshots.close()
            os.close(held_lock)

    async def _adopt(self) -> None:
        """Take up what earlier processes have left."""
        with unusable_refused(self._settings.workdir):
            found = await asyncio.to_thread(find_all, self._attempts_path)
        for path in found.unreadable:
            # the server will hear nothing of it, and have its job run again
            await self._end_abandoned(path)
        self._demand_same_executor(found.attempts)
        # first those that are not held for long: an id may have been given out twice
        for directory in sorted(found.attempts, key=lambda found: not found.is_dropped()):
            execution = self._executor.adopt(directory)
            attempt = self._hold(directory, execution, phase_of(directory, execution))
            if directory.is_dropped():
                self._drop(attempt.id, "the server did not want it")

    def _demand_same_executor(self, attempts: Sequence[AttemptDirectory]) -> None:
        """Raise :class:`AgentRefused` if jobs may run where this agent does not look."""
        for directory in attempts:
            other = directory.executor
            if other not in ("", self._executor.name) and not directory.has_result():
                raise AgentRefused(
                    f"{self._settings.workdir} holds jobs of the executor {other}: start the agent"
                    f" with --executor {other}, as before, or with another --workdir"
                )

    async def _end_abandoned(self, path: Path) -> None:
        try:
            await self._executor.end_abandoned(path)
        except OSError as error:
            raise AgentRefused(
                f"{path}: its record can't be read, and what may still run of it can't be ended:"
                f" {error.strerror}; start the agent again when that is mended"
            ) from None

    async def wait_idle(self, seconds: float) -> None:
        """Wait until it has held nothing for so long."""
        while True:
            while self._held:
                await next(iter(self._held.values())).wait()
            self._is_busy.clear()
            try:
                await asyncio.wait_for(self._is_busy.wait(), seconds)
            except TimeoutError:
                return

    async def drain(self) -> None:
        """Take nothing new; returns when all that is held has been delivered."""
        self._is_draining = True
        await self._say_drain()
        event(log, "draining", agent=self._settings.name, attempts=len(self._held))
        while self._held:
            await next(iter(self._held.values())).wait()

    def _heartbeat(self) -> messages.Heartbeat:
        return messages.Heartbeat(os.getloadavg()[0], self._executor.problem())

    async def _say_drain(self) -> None:
        """Say so, and wait until the server has heard it: what it had given before is here then."""
        if self._channel.outbox is None:
            return  # the next connection begins with it
        self._beats_heard = 0
        self._channel.put(messages.Drain())
        # each is answered by one; the first to come may be the answer to an earlier one
        for _ in range(_BEATS_AFTER_DRAIN):
            self._channel.put(self._heartbeat())
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_HEARD_SECONDS):
                while self._beats_heard < _BEATS_AFTER_DRAIN:
                    self._beat_came.clear()
                    await self._beat_came.wait()

    # --- connection

    async def _converse(self, connection: Connection) -> None:
        welcome = await connection.greet(self._hello())
        event(log, "connected", agent=self._settings.name, server_version=welcome.version)
        self._channel.outbox = connection.outbox
        self._snapshot_requests = SnapshotRequests(self._snapshots, connection.outbox, self._tasks)
        self._reconcile(welcome)
        try:
            await connection.serve(welcome.heartbeat_seconds, self._executor.problem, self._take)
        finally:
            self._channel.outbox = None
            self._snapshot_requests.close()
            for attempt in self._held.values():
                attempt.disconnect()

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            protocol=messages.PROTOCOL_VERSION,
            agent_id=self._identity.id,
            secret=self._identity.secret,
            instance=self._instance,
            name=self._settings.name,
            version=config.VERSION,
            slots=0 if self._is_draining else self._settings.slots,
            services=self._settings.services,
            resources=self._executor.resources(),
            attempts=tuple(
                messages.HeldAttempt(
                    held.job_id,
                    held.id,
                    held.phase,
                    held.directory.input_offset,
                    held.directory.incarnation,
                )
                for held in self._held.values()
            ),
            isolation=self._executor.isolation_offers(),
            default_isolation=self._executor.default_isolation(),
        )

    def _reconcile(self, welcome: messages.Welcome) -> None:
        self._incarnation = welcome.incarnation
        all_kept = {(kept.attempt_id, kept.incarnation): kept for kept in welcome.keep}
        delivered = sum(kept.result_offset for kept in welcome.keep)
        if delivered > self._delivered:
            self._pause.reset()  # the connection before brought something, though it broke
        self._delivered = delivered
        for held in list(self._held.values()):
            if kept := all_kept.get((held.id, held.directory.incarnation)):
                held.connect(kept)
            else:
                self._drop(held.id, "the server no longer wants it")

    def _take(self, received: Received) -> None:
        match received:
            case Frame():
                self._take_frame(received)
            case messages.Assign():
                self._take_assignment(received)
            case messages.Acknowledge():
                self._pause.reset()  # bytes are safe: this connection is worth having
                if self._channel.outbox is not None:
                    self._channel.outbox.acknowledge(received.transfer, received.offset)
            case messages.Snapshot():
                held = self._held.get(received.attempt_id)
                self._snapshot_requests.answer(received.request_id, held)
            case messages.SnapshotDone():
                self._snapshot_requests.withdraw(received.request_id)
            case messages.Stored() | messages.Kill() | messages.Drop():
                self._take_order(received)
            case messages.Services():
                self._tasks.create_task(self._check(received), name="check services")
            case messages.Heartbeat(asks=True):
                self._channel.put(self._heartbeat())
            case messages.Heartbeat():
                self._beats_heard += 1
                self._beat_came.set()
            case codec.UnknownMessage():
                event(log, "unknown_message", type=received.type)
            case _:
                raise messages.ProtocolError(f"a server does not send {type(received).__name__}")

    def _take_order(self, order: messages.Stored | messages.Kill | messages.Drop) -> None:
        held = self._held.get(order.attempt_id)
        if held is None:
            return
        match order:
            case messages.Stored():
                self._pause.reset()  # a result was delivered: this connection is worth having
                held.release()
            case messages.Kill():
                held.kill()
            case messages.Drop():
                self._drop(order.attempt_id, order.reason)

    async def _check(self, asked: messages.Services) -> None:
        """Find out which services can't be offered, as their jobs can't be isolated as asked."""
        # an image may take a while to try out; nothing else is to wait for that
        in_order = sorted(asked.services, key=lambda service: service.isolation.image is not None)
        for service in in_order:
            problem = await asyncio.to_thread(self._executor.problem_with, service.isolation)
            if problem is not None:
                event(
                    log,
                    "service_not_offered",
                    level=logging.WARNING,
                    service=service.service,
                    reason=problem,
                )
            self._channel.put(messages.ServiceChecked(asked.number, service.service, problem))

    def _take_frame(self, frame: Frame) -> None:
        attempt_id, stream = transfer_parts(frame.transfer)
        if stream is not Stream.INPUT:
            raise messages.ProtocolError(f"a server does not send {stream.name}")
        if held := self._held.get(attempt_id):
            self._pause.reset()  # bytes came: on a link that breaks all the time it is progress
            held.take_input(frame)

    # --- attempts

    def _take_assignment(self, assign: messages.Assign) -> None:
        if assign.attempt_id in self._held:
            return  # repeated
        path = path_of(self._attempts_path, assign.attempt_id, self._incarnation)
        directory = AttemptDirectory(path, assign, self._incarnation, self._executor.name)
        execution = self._executor.execution(directory)
        held = self._hold(directory, execution, AttemptPhase.RECEIVING)
        held.connect(messages.KeptAttempt(held.id, 0, 0, 0))

    def _hold(
        self, directory: AttemptDirectory, execution: Execution, phase: AttemptPhase
    ) -> Attempt:
        held = Attempt(directory, execution, phase, self._channel, self._write_watch, self._tasks)
        self._held[held.id] = held
        held.begin(self._forget)
        self._is_busy.set()
        return held

    def _forget(self, attempt: Attempt) -> None:
        if self._held.get(attempt.id) is attempt:
            del self._held[attempt.id]

    def _drop(self, attempt_id: int, reason: str) -> None:
        if held := self._held.pop(attempt_id, None):
            held.drop(reason)
