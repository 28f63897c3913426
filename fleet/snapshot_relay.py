"""A snapshot on its way from an agent to a client, at the client's pace and in bounded memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from wire.frames import CHUNK_BYTES, WINDOW_BYTES, Frame
from wire.messages import ProtocolError

_MAX_BYTES = 2**48


class SnapshotUnavailable(Exception):
    """The agent can't give the job's files now; the message says why."""


class SnapshotRelay:
    """What a session puts in at one end, and a request takes out at the other."""

    def __init__(self, acknowledge: Callable[[int], None]) -> None:
        """``acknowledge`` is told up to where the client has it, which lets more come."""
        self._acknowledge = acknowledge
        self._size: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._received = 0
        self._taken = 0
        self._on_break: Callable[[], None] | None = None

    # --- the session's end

    def begin(self, size: int) -> None:
        """The agent has made it. Raises :class:`ProtocolError` if no archive has that size."""
        if not 0 < size <= _MAX_BYTES:
            raise ProtocolError(f"snapshot: {size} bytes")
        if not self._size.done():
            self._size.set_result(size)

    def fail(self, reason: str) -> None:
        """Nothing, or nothing more, will come."""
        if not self._size.done():
            self._size.set_exception(SnapshotUnavailable(reason))
            self._size.exception()  # whoever asked may be gone
        self._frames.put_nowait(None)
        if self._on_break is not None:
            self._on_break()

    def put(self, frame: Frame) -> None:
        """A piece came. Raises :class:`ProtocolError` if it is not the next, or too much."""
        if frame.offset != self._received:
            raise ProtocolError(f"snapshot: bytes at {frame.offset}, expected {self._received}")
        self._received += len(frame.data)
        if self._received - self._taken > WINDOW_BYTES + CHUNK_BYTES:
            raise ProtocolError("snapshot: sent more than the window allows")
        self._frames.put_nowait(frame)

    # --- the request's end

    async def size(self) -> int:
        """Wait until it is made; returns its bytes. Raises :class:`SnapshotUnavailable`."""
        return await self._size

    def when_broken(self, function: Callable[[], None]) -> None:
        """Call ``function`` if the bytes end too early, also while the taker is busy."""
        self._on_break = function

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """Yield its bytes. Raises :class:`ConnectionResetError` if they end too early."""
        size = await self._size
        while self._taken < size:
            frame = await self._frames.get()
            if frame is None:
                raise ConnectionResetError("the agent's connection ended")
            yield frame.data
            self._taken += len(frame.data)
            self._acknowledge(self._taken)
