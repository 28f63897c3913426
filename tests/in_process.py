"""Dispatcher, session and agent in one process: a clock that jumps, sockets made of memory.

The store is real, on a real file. What is made up: the WebSocket between the two ends, the
event loop's clock, which a test may set forward, and the executor, whose jobs end when a test
says so. Leases, adoption and windows are tested here in milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import zipfile
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from agent.agent import Agent
from agent.attempt_directory import AttemptDirectory
from agent.connection import Connection, ConnectionEnded, RetryPause
from agent.executors.base import Command, Execution, Executor
from agent.outcomes import Exit, ExitKind
from agent.settings import AgentSettings
from config import Settings, SettingsInForce
from dispatch import Dispatcher
from jobs import FINAL_STATES, JobState
from records import JobIdentity, JobRequest
from store import Store
from tests.storage.steps import filled
from wire import codec, messages
from wire.messages import ProtocolError

DEADLINE_SECONDS = 60.0


class Clock:
    """The event loop's clock, which can be set forward: what was to happen by then happens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._loop = asyncio.get_running_loop()
        self._true_time = self._loop.time
        self._ahead = 0.0
        monkeypatch.setattr(self._loop, "time", self._time)

    def _time(self) -> float:
        return self._true_time() + self._ahead

    async def spend(self, seconds: float) -> None:
        """Let so many seconds pass, in steps in which all that runs has its turns."""
        for _ in range(round(seconds / 0.25)):
            self.advance(0.25)
            for _ in range(10):
                await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass at once, as for a process that was stopped."""
        self._ahead += seconds
        self._loop.call_soon(lambda: None)  # it may be asleep until a time by the old clock


async def until(condition: Callable[[], bool], what: str) -> None:
    """Let everything run until a condition holds; fails the test at a (true) deadline."""
    for _ in range(round(DEADLINE_SECONDS / 0.001)):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"never: {what}")


async def ended(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks until they have ended, whatever swallows a cancellation; fails the test if not.

    What they failed of is not asked: a test that ends cuts them off anywhere.
    """
    left = set(tasks)
    for _ in range(round(DEADLINE_SECONDS)):
        if not left:
            return
        for task in left:
            task.cancel()
        done, left = await asyncio.wait(left, timeout=1)
        for task in done:
            if not task.cancelled():
                task.exception()
    raise AssertionError(f"they do not end: {left}")


@dataclass(frozen=True, slots=True)
class _Frame:
    type: aiohttp.WSMsgType
    data: Any


class Wire:
    """One end of a WebSocket made of memory. What is sent on it arrives at once, in order."""

    def __init__(self) -> None:
        self.peer: Wire
        self.sent_bytes = 0
        self.sent: list[messages.Message] = []
        self.cut_after: int | None = None  # frames after which the connection breaks
        self._arrived: asyncio.Queue[_Frame | None] = asyncio.Queue()
        self._is_over = False
        self._is_silent = False

    @classmethod
    def pair(cls) -> tuple[Wire, Wire]:
        """Return the two ends of a new connection."""
        one, other = cls(), cls()
        one.peer, other.peer = other, one
        return one, other

    def cut(self) -> None:
        """Break the connection: both ends read its end, what was on the way is lost."""
        for end in (self, self.peer):
            end._is_over = True
            end._arrived.put_nowait(None)

    def fall_silent(self) -> None:
        """Lose from now on what either end sends, without a sign."""
        self._is_silent = self.peer._is_silent = True

    def _send(self, frame: _Frame) -> None:
        if self._is_over:
            raise ConnectionResetError("the connection is broken")
        if self._is_silent:
            return
        if self.cut_after is not None:
            self.cut_after -= 1
            if self.cut_after < 0:
                self.cut()
                raise ConnectionResetError("the connection breaks")
        self.peer._arrived.put_nowait(frame)

    async def send_str(self, data: str) -> None:
        """Send a text frame."""
        message = codec.decode(data)
        self._send(_Frame(aiohttp.WSMsgType.TEXT, data))
        if not isinstance(message, codec.UnknownMessage):
            self.sent.append(message)

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame."""
        self._send(_Frame(aiohttp.WSMsgType.BINARY, bytes(data)))
        self.sent_bytes += len(data)

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """Say good-bye."""
        self.cut()
        return True

    def get_extra_info(self, name: str) -> Any:
        """Memory has nothing to tell of itself."""
        return None

    async def frames(self) -> AsyncIterator[str | bytes]:
        """Iterate over what arrives, as the server reads it."""
        async for frame in self:
            yield frame.data

    async def __aiter__(self) -> AsyncIterator[_Frame]:
        """Iterate over what arrives, as the agent reads it."""
        while (frame := await self._arrived.get()) is not None:
            yield frame


class ScriptedExecution(Execution):
    """A job that ends when a test says so; it leaves one file, ``out.txt``."""

    def __init__(self, executor: ScriptedExecutor, directory: AttemptDirectory) -> None:
        self._executor = executor
        self._directory = directory
        self._id = directory.assign.attempt_id

    def is_started(self) -> bool:
        return self._id in self._executor.starts

    def check_adopted(self) -> None:
        return None

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> None:
        self._executor.starts.append(self._id)

    async def wait(self) -> Exit:
        code = await self._executor.ending(self._id)
        (self._directory.path / "job" / "out.txt").write_text(f"of attempt {self._id}")
        return Exit(ExitKind.EXITED, code)

    async def kill(self) -> Exit:
        self._executor.end(self._id, 0)
        return Exit(ExitKind.KILLED)

    def forget(self) -> None:
        return None


class ScriptedExecutor(Executor):
    """Runs nothing. Outlives an agent, as the processes of jobs do."""

    name = "scripted"

    def __init__(self) -> None:
        self.starts: list[int] = []
        self._codes: dict[int, int] = {}
        self._ended: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def run(self) -> None:
        return None

    def execution(self, directory: AttemptDirectory) -> Execution:
        return ScriptedExecution(self, directory)

    async def end_abandoned(self, attempt: Path) -> None:
        return None

    def close(self) -> None:
        return None

    async def ending(self, attempt_id: int) -> int:
        """Wait until the job of an attempt has ended; returns its exit code."""
        await self._ended[attempt_id].wait()
        return self._codes[attempt_id]

    def end(self, attempt_id: int, code: int) -> None:
        """Let the job of an attempt end."""
        self._codes.setdefault(attempt_id, code)
        self._ended[attempt_id].set()


@dataclass
class Machine:
    """One machine with an agent that may be stopped, started again, and cut off."""

    house: House
    workdir: Path
    executor: ScriptedExecutor = field(default_factory=ScriptedExecutor)
    is_reachable: bool = True
    cuts: list[int] = field(default_factory=list)
    connections: list[Wire] = field(default_factory=list)
    _running: asyncio.Task[None] | None = None

    def start(self, slots: int = 2) -> None:
        """Start its agent."""
        settings = AgentSettings(
            server="memory",
            name=self.workdir.name,
            slots=slots,
            services=None,
            workdir=self.workdir,
        )
        program = Agent(settings, self.executor)
        self._running = asyncio.create_task(program.run())

    async def stop(self) -> None:
        """End its agent as a crash would; its jobs go on."""
        if self._running is not None:
            await ended(self._running)
            self.cut()

    def cut(self) -> None:
        """Break its connection, if it has one."""
        if self.connections:
            self.connections[-1].cut()

    async def stay_connected(
        self, pause: RetryPause, converse: Callable[[Connection], Awaitable[None]]
    ) -> None:
        """Stand in for the network: connect again and again."""
        while True:
            if self.is_reachable:
                ours, theirs = Wire.pair()
                ours.cut_after = self.cuts.pop(0) if self.cuts else None
                self.connections.append(ours)
                self.house.accept(theirs)
                with contextlib.suppress(ConnectionEnded, ConnectionError, ProtocolError):
                    await converse(Connection(cast(aiohttp.ClientWebSocketResponse, ours)))
            # a task group that fails while it is cancelled may swallow that (gh-116720)
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            await asyncio.sleep(0.001)


class House:
    """A server without HTTP: store and dispatcher, and the machines around it."""

    def __init__(self, store: Store, settings: Settings, clock: Clock) -> None:
        self.store = store
        self.clock = clock
        self.dispatcher = Dispatcher(store, SettingsInForce(settings))
        self.machines: list[Machine] = []
        self._sessions: set[asyncio.Task[None]] = set()

    def accept(self, socket: Wire) -> None:
        """Take in a connection of an agent."""
        session = asyncio.create_task(self.dispatcher.serve_agent(socket, "memory"))
        self._sessions.add(session)
        session.add_done_callback(self._sessions.discard)

    async def submit(self, script: bytes = b"true", user_id: int = 1) -> JobIdentity:
        """Submit a job."""
        upload = await filled(self.store, script)
        request = JobRequest(user_id, "example")
        return (await self.dispatcher.submit(upload, request, "uploaded")).job

    async def states(self, job: JobIdentity) -> list[JobState]:
        """Return the states that a job went through, without Queued at its start."""
        return [entry.after for entry in await self.store.history.of_job(job.id)][1:]

    async def state(self, job: JobIdentity) -> JobState:
        """Return the state that a job is in."""
        status = await self.store.jobs.status(job.id)
        assert status is not None
        return status.state

    async def wait(self, job: JobIdentity, *states: JobState) -> None:
        """Wait until a job is in one of the states (default: a final one)."""
        wanted = set(states) or FINAL_STATES
        for _ in range(round(DEADLINE_SECONDS / 0.001)):
            if await self.state(job) in wanted:
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"job {job.id} is {await self.state(job)}, not in {wanted}")

    async def result(self, job: JobIdentity) -> zipfile.ZipFile:
        """Wait for a job to complete; returns its ZIP, checked."""
        await self.wait(job, JobState.COMPLETED)
        stored = await self.store.blobs.result_of_job(job.id)
        assert stored is not None
        content = b""
        while len(content) < stored.size:
            left = stored.size - len(content)
            content += b"".join(await self.store.blobs.read(stored.blob_id, len(content), left))
        archive = zipfile.ZipFile(io.BytesIO(content))
        assert archive.testzip() is None
        return archive

    async def close(self) -> None:
        """End the sessions."""
        await ended(*self._sessions)


@contextlib.asynccontextmanager
async def running_house(
    directory: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> AsyncIterator[House]:
    """Open a server in this process; ends it and its machines."""
    store = await Store.open(str(directory / "orchestrator.db"))
    house = House(store, settings, Clock(monkeypatch))

    async def stay_connected(
        settings: AgentSettings,
        pause: RetryPause,
        converse: Callable[[Connection], Awaitable[None]],
    ) -> None:
        (machine,) = [one for one in house.machines if one.workdir == settings.workdir]
        await machine.stay_connected(pause, converse)

    monkeypatch.setattr("agent.agent.stay_connected", stay_connected)
    running = [asyncio.create_task(store.run()), asyncio.create_task(house.dispatcher.run())]
    await house.dispatcher.wait_loaded()
    try:
        yield house
    finally:
        for machine in house.machines:
            await machine.stop()
        await house.close()
        for task in reversed(running):
            await ended(task)
        await store.close()
