"""One end of the agent channel: how control messages and transfers share one WebSocket.

Control messages go first, then one frame of each open transfer in turn, so that a
heartbeat passes while gigabytes flow. No transfer runs further ahead of its receiver
than the window, so memory stays bounded on both sides however slow the link is.
"""

from __future__ import annotations

import asyncio
import socket as sockets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from wire import codec, messages
from wire.frames import CHUNK_BYTES, WINDOW_BYTES, encode_frame

Source: TypeAlias = Callable[[int], Awaitable[bytes]]
"""Returns the piece of a transfer that starts at the offset: a chunk, or some to be sent in turn.

Nothing, if the transfer turns out to end there.
"""

NO_GAP = range(0)
_NOTHING = memoryview(b"")
_ALONG_SECONDS = 0.01


class Socket(Protocol):
    """What the outbox needs of a WebSocket, client's or server's."""

    async def send_str(self, data: str) -> None:
        """Send one text frame; returns when the transport has room for more."""

    async def send_bytes(self, data: bytes) -> None:
        """Send one binary frame; returns when the transport has room for more."""

    def get_extra_info(self, name: str) -> Any:
        """Return what the transport tells under ``name``, its ``socket`` for one; None if not."""


class _Cork:
    """Has what is written within one turn of the event loop leave in one piece.

    The transport hands each frame to the kernel at once, and a receiver that sees the first
    alone begins to act on it alone: it would store the last output of a job in a transaction
    of its own while the job's end is on the way. TCP_CORK (tcp(7)) is Linux's.
    """

    def __init__(self, socket: Socket) -> None:
        # once: uvloop makes another object, and asks the kernel for its address, each time
        self._connected = socket.get_extra_info("socket")
        self._removal: asyncio.Handle | None = None

    def put_on(self) -> None:
        """Keep back what is written from now on, until the next turn at most."""
        if self._removal is None:
            self._set(1)
            self._removal = asyncio.get_running_loop().call_soon(self.take_off)

    def take_off(self) -> None:
        """Let go what was kept back; does nothing if nothing is."""
        if self._removal is not None:
            self._removal.cancel()
            self._removal = None
            self._set(0)

    def _set(self, value: int) -> None:
        if self._connected is not None and hasattr(sockets, "TCP_CORK"):
            with suppress(OSError, ValueError):  # it is closed
                self._connected.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_CORK, value)


@dataclass(slots=True)
class _Sending:
    source: Source
    offset: int
    acknowledged: int
    end: int
    gap: range = NO_GAP
    on_sent: Callable[[], None] | None = None
    on_failure: Callable[[Exception], None] | None = None
    piece: memoryview = _NOTHING
    piece_start: int = 0

    def next_offset(self) -> int:
        return self.gap.stop if self.offset in self.gap else self.offset

    def room(self) -> int:
        """How many bytes may stand in a frame at the next offset."""
        is_before_gap = self.next_offset() < self.gap.start
        return (self.gap.start if is_before_gap else self.end) - self.next_offset()

    async def frame_at(self, offset: int) -> memoryview:
        """Return what goes into the frame at the next offset; nothing at the transfer's end."""
        if not 0 <= offset - self.piece_start < len(self.piece):
            room = self.room()
            self.piece, self.piece_start = memoryview(await self.source(offset))[:room], offset
        start = offset - self.piece_start
        return self.piece[start : start + CHUNK_BYTES]

    def may_send(self) -> bool:
        return self.offset < self.end and self.offset - self.acknowledged < WINDOW_BYTES


class Outbox:
    """All that one end still has to send. Fill it from anywhere; one task runs :meth:`run`."""

    def __init__(self) -> None:
        self._messages: deque[str] = deque()
        self._sending: dict[int, _Sending] = {}
        self._ready: OrderedDict[int, None] = OrderedDict()
        self._wake = asyncio.Event()

    def put(self, message: messages.Message) -> None:
        """Queue a control message; messages keep their order."""
        self._messages.append(codec.encode(message))
        self._wake.set()

    def put_along(self, message: messages.Message) -> None:
        """Queue a control message that leaves with the next one, or alone a moment later.

        The receiver then has both at once, and stores both at once.
        """
        self._messages.append(codec.encode(message))
        asyncio.get_running_loop().call_later(_ALONG_SECONDS, self._wake.set)

    def open(
        self,
        transfer: int,
        source: Source,
        offset: int,
        end: int,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        """Begin to send a transfer, from ``offset`` (what is before is there) to ``end``.

        ``on_failure`` is called with what the source raises; the transfer is closed before, and
        everything else goes on. Without it the failure ends :meth:`run`.
        """
        self._sending[transfer] = _Sending(source, offset, offset, end, on_failure=on_failure)
        self._mark_ready(transfer)

    def extend(
        self,
        transfer: int,
        source: Source,
        offset: int,
        end: int,
        gap: range = NO_GAP,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Have a transfer that grows go on to ``end``; like :meth:`open` if there is none.

        What is in the ``gap`` is left out. ``on_sent`` is called once the last byte is sent.
        """
        sending = self._sending.get(transfer)
        if sending is None:
            sending = self._sending[transfer] = _Sending(source, offset, offset, end)
        sending.end, sending.gap, sending.on_sent = end, gap, on_sent
        self._mark_ready(transfer)

    def position(self, transfer: int) -> int | None:
        """Return up to where an open transfer is sent, None if there is none."""
        sending = self._sending.get(transfer)
        return None if sending is None else sending.offset

    def acknowledge(self, transfer: int, offset: int) -> None:
        """Note how far the receiver has the transfer; a late or repeated one does no harm."""
        sending = self._sending.get(transfer)
        if sending is None:
            return
        if not 0 <= offset <= sending.end:
            raise messages.ProtocolError(f"acknowledged {offset} of {sending.end} bytes")
        sending.acknowledged = max(sending.acknowledged, offset)
        # A receiver may already have more than we knew of: do not send that again.
        sending.offset = max(sending.offset, offset)
        if sending.acknowledged == sending.end:
            self.close(transfer)
        else:
            self._mark_ready(transfer)

    def close(self, transfer: int) -> None:
        """Forget a transfer, finished or not."""
        self._sending.pop(transfer, None)
        self._ready.pop(transfer, None)

    async def run(self, socket: Socket) -> None:
        """Send for as long as the connection lives; raises what the socket raises."""
        cork = _Cork(socket)
        while True:
            # a frame goes with the messages before and after it, a message with the next one
            if self._ready or len(self._messages) > 1:
                cork.put_on()
            while self._messages:
                await socket.send_str(self._messages.popleft())
            if self._ready:
                await self._send_one_frame(socket)
                continue
            cork.take_off()
            self._wake.clear()
            await self._wake.wait()

    async def flush(self, socket: Socket) -> None:
        """Send the queued control messages, for an end that is about to close."""
        while self._messages:
            await socket.send_str(self._messages.popleft())

    def _mark_ready(self, transfer: int) -> None:
        if self._sending[transfer].may_send():
            self._ready[transfer] = None
            self._wake.set()

    async def _read(self, transfer: int, sending: _Sending, offset: int) -> memoryview:
        """Return what goes into the next frame; a source that fails ends its transfer alone."""
        try:
            return await sending.frame_at(offset)
        except Exception as error:
            if sending.on_failure is None:
                raise
            if self._sending.get(transfer) is sending:
                self.close(transfer)
                sending.on_failure(error)
            return _NOTHING

    async def _send_one_frame(self, socket: Socket) -> None:
        transfer, _ = self._ready.popitem(last=False)
        sending = self._sending[transfer]
        if not sending.may_send():
            return  # it was marked as ready while its last frame, or the window's, was read
        offset = sending.next_offset()
        data = await self._read(transfer, sending, offset)
        if self._sending.get(transfer) is not sending:
            return  # closed or replaced while its source was read
        if not data:
            sending.end = sending.offset
        sending.offset = max(sending.offset, offset + len(data))
        self._mark_ready(transfer)
        if data:
            await socket.send_bytes(encode_frame(transfer, offset, data))
        if sending.offset >= sending.end and sending.on_sent is not None:
            on_sent, sending.on_sent = sending.on_sent, None
            on_sent()
