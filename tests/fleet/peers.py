"""A dispatcher on a real store, and agents in memory that say what a test wants them to say."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from config import ServiceLimits, Settings, SettingsInForce
from dispatch import Dispatcher
from jobs import JobState, Resources
from records import JobRequest
from store import Store
from tests.storage.steps import filled
from wire import codec, messages
from wire.frames import CHUNK_BYTES, Frame, Stream, decode_frame, encode_frame, transfer_id

M = TypeVar("M")
_SECONDS = 60.0  # until a test fails that waits for something


def archive(*names: str) -> bytes:
    """Make a ZIP with a few files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in names or ("run.sh",):
            file.writestr(name, f"content of {name}")
    return buffer.getvalue()


def finished(attempt_id: int, content: bytes, **changes: Any) -> messages.Finished:
    """Say that an attempt completed with this result."""
    report = messages.Finished(
        attempt_id, JobState.COMPLETED, 0, "", len(content), hashlib.sha256(content).hexdigest()
    )
    return dataclasses.replace(report, **changes)


class Peer:
    """One connection of an agent, in memory: what the server says, and what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = asyncio.Event()
        self._to_server: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        self._from_server: asyncio.Queue[messages.Message | Frame] = asyncio.Queue()

    # --- the server's end

    async def send_str(self, data: str) -> None:
        """For the server."""
        message = codec.decode(data)
        assert not isinstance(message, codec.UnknownMessage)
        self._from_server.put_nowait(message)

    async def send_bytes(self, data: bytes) -> None:
        """For the server."""
        self._from_server.put_nowait(decode_frame(data))

    def get_extra_info(self, name: str) -> Any:
        """For the server."""
        return None

    async def close(self, *, code: int = 1000, message: bytes = b"") -> bool:
        """For the server."""
        self.closed.set()
        self._to_server.put_nowait(None)
        return True

    async def frames(self) -> AsyncIterator[str | bytes]:
        """For the server."""
        while (frame := await self._to_server.get()) is not None:
            yield frame

    # --- the test's end

    def hello(self, **changes: Any) -> None:
        """Introduce the agent, which has ten slots unless told otherwise."""
        hello = messages.Hello(
            messages.PROTOCOL_VERSION, f"id-{self.name}", "i", self.name, "0", 10, None, ()
        )
        self.say(dataclasses.replace(hello, **changes))

    def say(self, *said: messages.Message) -> None:
        """Send messages."""
        for message in said:
            self._to_server.put_nowait(codec.encode(message))

    def send(self, attempt_id: int, content: bytes, stream: Stream = Stream.RESULT) -> None:
        """Send bytes as a transfer of an attempt."""
        for offset in range(0, len(content), CHUNK_BYTES):
            chunk = content[offset : offset + CHUNK_BYTES]
            self._to_server.put_nowait(encode_frame(transfer_id(attempt_id, stream), offset, chunk))

    def run_through(self, attempt_id: int) -> None:
        """Say that an attempt was received, and runs."""
        self.say(messages.Accepted(attempt_id), messages.Started(attempt_id))

    def deliver(self, attempt_id: int, content: bytes) -> None:
        """Say that an attempt completed, and send its result."""
        self.run_through(attempt_id)
        self.say(finished(attempt_id, content))
        self.send(attempt_id, content)

    def disconnect(self) -> None:
        """End the connection, as a network does."""
        self._to_server.put_nowait(None)

    async def wait_for(self, kind: type[M]) -> M:
        """Return the next message of a kind, soon; what comes before is ignored."""
        async with asyncio.timeout(_SECONDS):
            return await self.receive(kind)

    async def receive(self, kind: type[M]) -> M:
        """Return the next message of a kind, whenever it comes; what comes before is ignored."""
        while True:
            item = await self._from_server.get()
            if isinstance(item, kind):
                return item


@dataclasses.dataclass
class Fleet:
    """A store and its dispatcher, with connections of agents."""

    store: Store
    dispatcher: Dispatcher
    settings: SettingsInForce
    tasks: asyncio.TaskGroup

    def connect(self, name: str) -> Peer:
        """Open a connection; nothing is said on it."""
        peer = Peer(name)
        self.tasks.create_task(self.dispatcher.serve_agent(peer, f"address of {name}"))
        return peer

    async def agent(self, name: str, **hello: Any) -> Peer:
        """Connect an agent and have it welcomed."""
        peer = self.connect(name)
        peer.hello(**hello)
        await peer.wait_for(messages.Welcome)
        return peer

    async def submit(
        self,
        user_id: int = 1,
        service: str = "example",
        content: bytes = b"true\n",
        **request: Any,
    ) -> int:
        """Submit a job; returns its id."""
        upload = await filled(self.store, content)
        submission = await self.dispatcher.submit(
            upload, JobRequest(user_id, service, **request), "uploaded"
        )
        return submission.job.id

    async def state(self, job_id: int) -> tuple[JobState, str]:
        """Return a job's state and message."""
        status = await self.store.jobs.status(job_id)
        assert status is not None
        return status.state, status.message

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let everything run until a condition holds."""
        async with asyncio.timeout(_SECONDS):
            while not condition():
                await asyncio.sleep(0.001)

    async def wait(self, job_id: int, state: JobState) -> str:
        """Wait until a job is in a state; returns its message."""
        async with asyncio.timeout(_SECONDS):
            with self.store.feed.transitions_of(job_id, 1000) as transitions:
                while (now := await self.state(job_id))[0] is not state:
                    await transitions.next()
                return now[1]


@contextlib.asynccontextmanager
async def running_fleet(
    path: Path, services: dict[str, ServiceLimits] | None = None, **settings: Any
) -> AsyncIterator[Fleet]:
    """Run a dispatcher on the database in ``path``, without HTTP."""
    limits = services or {"example": ServiceLimits(runs_per_user=1000, max_runs=1000)}
    in_force = SettingsInForce(Settings(services=MappingProxyType(limits), **settings))
    store = await Store.open(str(path / "orchestrator.db"))
    try:
        async with asyncio.TaskGroup() as background:
            store_task = background.create_task(store.run())
            dispatcher = Dispatcher(store, in_force)
            task = background.create_task(dispatcher.run())
            await dispatcher.wait_loaded()
            async with asyncio.TaskGroup() as connections:
                yield Fleet(store, dispatcher, in_force, connections)
                await dispatcher.close()
            task.cancel()
            store_task.cancel()
    finally:
        await store.close()


GPU_MACHINE = Resources(cpus=8, memory=2**36, gpus=4)
