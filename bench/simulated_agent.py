"""Agents that speak the real protocol but run nothing: every job's result is ready-made.

They use ``messages.py`` and ``channel.py`` as the real agent does, and reconnect like it. What an
agent held when its connection ended, it forgets: the server gives the job out again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import random
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

import config
from bench.measure import BenchmarkError
from bench.processes import AGENT_TOKEN
from jobs import JobState
from wire import codec, messages
from wire.frames import (
    CHUNK_BYTES,
    READ_BYTES,
    Frame,
    Stream,
    decode_frame,
    transfer_id,
    transfer_parts,
)
from wire.outbox import Outbox

_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0
_HASH_BYTES = 1024 * 1024


class Archive:
    """The result that every job gets: a file, which is read as an agent reads its own."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        with open(path, "rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            self._only_frame = file.read() if self.size <= CHUNK_BYTES else None
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    async def read(self, offset: int) -> bytes:
        """Return what is at an offset; large files are read in a thread, as agents do."""
        if self._only_frame is not None:
            return self._only_frame
        return await asyncio.to_thread(os.pread, self._file, READ_BYTES, offset)


def write_minimal_archive(path: Path) -> None:
    """Make the ZIP of a job that wrote one line."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("run.sh", b"echo done\n")
        archive.writestr("stdout.log", b"done\n")
    path.write_bytes(buffer.getvalue())


@dataclass(slots=True)
class _Attempt:
    """An attempt that the agent holds: how much input is missing, and who waits for its end."""

    missing: int
    stored: asyncio.Future[float]


class SimulatedAgent:
    """One agent of one slot. :meth:`run` keeps it connected; ``ready`` names attempts to deliver.

    ``ready`` gives the attempt's id and when its Assign came (:func:`time.perf_counter`), once the
    attempt's input is there.
    """

    def __init__(
        self,
        url: str,
        name: str,
        archive: Archive,
        on_connection: Callable[[int], None] = lambda change: None,
    ) -> None:
        self.ready: asyncio.Queue[tuple[int, float]] = asyncio.Queue()
        self._url = url
        self._name = name
        self._id = uuid.uuid4().hex
        self._archive = archive
        self._on_connection = on_connection
        self._attempts: dict[int, _Attempt] = {}
        self._assigned_at: dict[int, float] = {}
        self._outbox = Outbox()
        self._pause = _FIRST_RETRY_SECONDS

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Stay connected until cancelled; tries again with the real agent's pauses."""
        while True:
            # the server may be away; that is what some benchmarks are about
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                await self._connect(session)
            await asyncio.sleep(random.uniform(_FIRST_RETRY_SECONDS / 2, self._pause))
            self._pause = min(self._pause * 2, _LAST_RETRY_SECONDS)

    async def deliver(self, attempt_id: int) -> tuple[float, float]:
        """Say that a job has ended and send its result; returns once the server has stored it.

        Returns when Finished was said and when Stored came (:func:`time.perf_counter`). Raises
        :class:`ConnectionError` if the connection ends before.
        """
        attempt = self._attempts.get(attempt_id)
        if attempt is None:
            raise ConnectionError("the attempt was forgotten with its connection")
        finished_at = time.perf_counter()
        self._outbox.put(
            messages.Finished(
                attempt_id=attempt_id,
                state=JobState.COMPLETED,
                exit_code=0,
                message="",
                result_size=self._archive.size,
                result_sha256=self._archive.sha256,
            )
        )
        transfer = transfer_id(attempt_id, Stream.RESULT)
        self._outbox.open(transfer, self._archive.read, 0, self._archive.size)
        return finished_at, await attempt.stored

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        async with session.ws_connect(
            f"{self._url}/agent",
            headers={"Authorization": f"Bearer {AGENT_TOKEN}"},
            max_msg_size=codec.MAX_TEXT_BYTES,
            compress=0,
        ) as socket:
            self._outbox = Outbox()
            await socket.send_str(codec.encode(self._hello()))
            welcome = codec.decode(await socket.receive_str(timeout=30))
            if not isinstance(welcome, messages.Welcome):
                raise BenchmarkError(f"an agent was not welcomed: {welcome}")
            self._pause = _FIRST_RETRY_SECONDS
            self._on_connection(1)
            try:
                await self._converse(socket, welcome.heartbeat_seconds)
            finally:
                self._on_connection(-1)
                self._forget_all()

    def _hello(self) -> messages.Hello:
        return messages.Hello(
            protocol=messages.PROTOCOL_VERSION,
            agent_id=self._id,
            instance=self._id[:16],
            name=self._name,
            version=config.VERSION,
            slots=1,
            services=("example",),
            attempts=(),
        )

    async def _converse(
        self, socket: aiohttp.ClientWebSocketResponse, heartbeat_seconds: float
    ) -> None:
        sending = asyncio.create_task(self._outbox.run(socket))
        beating = asyncio.create_task(self._beat(heartbeat_seconds))
        try:
            async for frame in socket:
                if frame.type is aiohttp.WSMsgType.TEXT:
                    self._take_message(codec.decode(frame.data))
                elif frame.type is aiohttp.WSMsgType.BINARY:
                    self._take_frame(decode_frame(frame.data))
        finally:
            sending.cancel()
            beating.cancel()
            await asyncio.gather(sending, beating, return_exceptions=True)

    async def _beat(self, interval: float) -> None:
        """Send heartbeats. The first comes at random: agents of a grown fleet don't beat as one."""
        await asyncio.sleep(random.uniform(0, interval))
        while True:
            self._outbox.put(messages.Heartbeat())
            await asyncio.sleep(interval)

    def _forget_all(self) -> None:
        while not self.ready.empty():
            self.ready.get_nowait()
        for attempt in self._attempts.values():
            if not attempt.stored.done():
                attempt.stored.set_exception(ConnectionError("the connection ended"))
                attempt.stored.exception()  # nobody may be waiting for it
        self._attempts.clear()

    def _take_message(self, message: messages.Message | codec.UnknownMessage) -> None:
        match message:
            case messages.Assign():
                self._assigned_at[message.attempt_id] = time.perf_counter()
                missing = sum(file.size for file in message.files)
                stored = asyncio.get_running_loop().create_future()
                self._attempts[message.attempt_id] = _Attempt(missing, stored)
                self._start_if_whole(message.attempt_id)
            case messages.Acknowledge():
                self._outbox.acknowledge(message.transfer, message.offset)
            case messages.Stored():
                if attempt := self._attempts.pop(message.attempt_id, None):
                    attempt.stored.set_result(time.perf_counter())
            case messages.Refused() | messages.Kill() | messages.Drop():
                raise BenchmarkError(f"a simulated agent got {message}")
            case _:
                pass

    def _take_frame(self, frame: Frame) -> None:
        attempt_id, _ = transfer_parts(frame.transfer)
        attempt = self._attempts[attempt_id]
        attempt.missing -= len(frame.data)
        self._outbox.put(messages.Acknowledge(frame.transfer, frame.offset + len(frame.data)))
        self._start_if_whole(attempt_id)

    def _start_if_whole(self, attempt_id: int) -> None:
        if self._attempts[attempt_id].missing == 0:
            self._outbox.put(messages.Accepted(attempt_id))
            self._outbox.put(messages.Started(attempt_id))
            self.ready.put_nowait((attempt_id, self._assigned_at.pop(attempt_id)))
