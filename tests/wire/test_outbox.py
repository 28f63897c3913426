"""How control messages and transfers share a connection."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import Callable

import pytest

from wire import codec, messages
from wire.frames import CHUNK_BYTES, READ_BYTES, WINDOW_BYTES, Frame, decode_frame
from wire.outbox import Outbox

pytestmark = pytest.mark.quick


class RecordingSocket:
    """Takes what is sent; ``on_frame`` may react to each binary frame."""

    def __init__(self) -> None:
        self.sent: list[messages.Message | codec.UnknownMessage | Frame] = []
        self.on_frame: Callable[[Frame], None] = lambda frame: None

    async def send_str(self, data: str) -> None:
        self.sent.append(codec.decode(data))
        await asyncio.sleep(0)

    async def send_bytes(self, data: bytes) -> None:
        frame = decode_frame(data)
        self.sent.append(frame)
        self.on_frame(frame)
        await asyncio.sleep(0)

    def get_extra_info(self, name: str) -> None:
        """There is no transport."""

    def frames(self) -> list[Frame]:
        return [item for item in self.sent if isinstance(item, Frame)]


async def _zeros(offset: int) -> bytes:
    return bytes(CHUNK_BYTES)


async def _run_until_idle(outbox: Outbox, socket: RecordingSocket) -> None:
    task = asyncio.create_task(outbox.run(socket))
    before = -1
    while before != len(socket.sent):
        before = len(socket.sent)
        for _ in range(50):
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_sender_stops_at_the_window_and_goes_on_when_it_opens() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    outbox.open(8, _zeros, 0, 10 * WINDOW_BYTES)
    await _run_until_idle(outbox, socket)
    assert sum(len(frame.data) for frame in socket.frames()) == WINDOW_BYTES
    outbox.acknowledge(8, CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert sum(len(frame.data) for frame in socket.frames()) == WINDOW_BYTES + CHUNK_BYTES


async def test_a_message_that_may_wait_leaves_with_the_next_one() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    outbox.put_along(messages.Accepted(1))
    await _run_until_idle(outbox, socket)
    assert socket.sent == [messages.Accepted(1)]  # before the first wait all that is there is sent
    task = asyncio.create_task(outbox.run(socket))
    await asyncio.sleep(0)
    outbox.put_along(messages.Accepted(2))
    for _ in range(3):
        await asyncio.sleep(0)
    assert socket.sent[1:] == []
    outbox.put(messages.Started(2))
    async with asyncio.timeout(20):
        while len(socket.sent) < 3:
            await asyncio.sleep(0)
    assert socket.sent[1:] == [messages.Accepted(2), messages.Started(2)]
    task.cancel()


async def test_a_message_that_may_wait_leaves_alone_after_a_moment() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    task = asyncio.create_task(outbox.run(socket))
    await asyncio.sleep(0)
    outbox.put_along(messages.Accepted(1))
    async with asyncio.timeout(20):
        while not socket.sent:
            await asyncio.sleep(0.001)
    assert socket.sent == [messages.Accepted(1)]
    task.cancel()


async def test_transfers_take_turns_and_messages_go_first() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    outbox.open(8, _zeros, 0, WINDOW_BYTES)
    outbox.open(16, _zeros, 0, WINDOW_BYTES)

    def interrupt(frame: Frame) -> None:
        if len(socket.frames()) == 5:
            outbox.put(messages.Heartbeat())

    socket.on_frame = interrupt
    await _run_until_idle(outbox, socket)
    assert [frame.transfer for frame in socket.frames()] == [8, 16] * (WINDOW_BYTES // CHUNK_BYTES)
    assert socket.sent[5] == messages.Heartbeat()


async def test_what_is_read_at_once_is_sent_in_frames_that_take_turns() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    content = bytes(range(256)) * (5 * CHUNK_BYTES // 512)  # two and a half chunks
    reads: list[int] = []

    async def source(offset: int) -> bytes:
        reads.append(offset)
        return content[offset : offset + READ_BYTES]

    outbox.open(8, source, 0, len(content))
    outbox.open(16, _zeros, 0, 2 * CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert [frame.transfer for frame in socket.frames()] == [8, 16, 8, 16, 8]
    own = [frame for frame in socket.frames() if frame.transfer == 8]
    assert [frame.offset for frame in own] == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]
    assert b"".join(frame.data for frame in own) == content
    assert reads == [0]


async def test_a_transfer_resumes_where_the_receiver_is() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    outbox.open(8, _zeros, 0, 4 * CHUNK_BYTES)
    outbox.acknowledge(8, 3 * CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert [frame.offset for frame in socket.frames()] == [3 * CHUNK_BYTES]


async def test_an_acknowledgement_past_the_end_is_refused() -> None:
    outbox = Outbox()
    outbox.open(8, _zeros, 0, 100)
    with pytest.raises(messages.ProtocolError):
        outbox.acknowledge(8, 101)


async def test_an_acknowledgement_while_the_last_frame_is_read_brings_no_empty_frame() -> None:
    outbox, socket = Outbox(), RecordingSocket()

    async def source(offset: int) -> bytes:
        if offset == CHUNK_BYTES:  # the receiver has the first frame while this one is read
            outbox.acknowledge(8, CHUNK_BYTES)
        return bytes(CHUNK_BYTES)

    outbox.open(8, source, 0, 2 * CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert [frame.offset for frame in socket.frames()] == [0, CHUNK_BYTES]


class CorkedSocket(RecordingSocket):
    """Notes what leaves in one piece: what was sent between cork and uncork, or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[int] = []
        self._corked_at: int | None = None

    def get_extra_info(self, name: str) -> CorkedSocket:  # type: ignore[override]
        assert name == "socket"
        return self

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert (level, option) == (sockets.IPPROTO_TCP, sockets.TCP_CORK)
        if value:
            assert self._corked_at is None
            self._corked_at = len(self.sent)
        else:
            assert self._corked_at is not None
            self.pieces.append(len(self.sent) - self._corked_at)
            self._corked_at = None

    async def send_str(self, data: str) -> None:
        self.sent.append(codec.decode(data))

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(decode_frame(data))


async def _hello(offset: int) -> bytes:
    return b"hello"


async def test_what_is_ready_leaves_in_one_piece() -> None:
    outbox, socket = Outbox(), CorkedSocket()

    def end() -> None:
        outbox.put(messages.Stored(2))
        outbox.open(17, _hello, 0, 5)

    outbox.put(messages.Started(2))
    outbox.extend(18, _hello, 0, 5, on_sent=end)  # as the last output does with the result
    await _run_until_idle(outbox, socket)
    assert socket.pieces == [4]


async def test_nothing_is_kept_back_while_a_source_is_waited_for() -> None:
    outbox, socket, disk = Outbox(), CorkedSocket(), asyncio.Event()

    async def slow(offset: int) -> bytes:
        await disk.wait()
        return b"hello"

    outbox.put(messages.Started(2))
    outbox.open(17, slow, 0, 5)
    await _run_until_idle(outbox, socket)
    assert socket.pieces == [1]


class BrokenSource(Exception):
    """The bytes can't be read."""


async def test_a_source_that_fails_ends_its_transfer_and_nothing_else() -> None:
    outbox, socket, failures = Outbox(), RecordingSocket(), list[Exception]()

    async def broken(offset: int) -> bytes:
        if offset:
            raise BrokenSource
        return bytes(CHUNK_BYTES)

    outbox.open(8, broken, 0, 3 * CHUNK_BYTES, failures.append)
    outbox.open(16, _zeros, 0, 3 * CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert [frame.transfer for frame in socket.frames()] == [8, 16, 16, 16]
    assert [type(failure) for failure in failures] == [BrokenSource]
    outbox.acknowledge(8, CHUNK_BYTES)
    await _run_until_idle(outbox, socket)
    assert len(socket.frames()) == 4
