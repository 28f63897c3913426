"""How control messages and transfers share a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

import protocol
from channel import Outbox
from protocol import CHUNK_BYTES, WINDOW_BYTES


class RecordingSocket:
    """Takes what is sent; ``on_frame`` may react to each binary frame."""

    def __init__(self) -> None:
        self.sent: list[protocol.Message | protocol.UnknownMessage | protocol.Frame] = []
        self.on_frame: Callable[[protocol.Frame], None] = lambda frame: None

    async def send_str(self, data: str) -> None:
        self.sent.append(protocol.decode(data))
        await asyncio.sleep(0)

    async def send_bytes(self, data: bytes) -> None:
        frame = protocol.decode_frame(data)
        self.sent.append(frame)
        self.on_frame(frame)
        await asyncio.sleep(0)

    def frames(self) -> list[protocol.Frame]:
        return [item for item in self.sent if isinstance(item, protocol.Frame)]


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


async def test_transfers_take_turns_and_messages_go_first() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    outbox.open(8, _zeros, 0, WINDOW_BYTES)
    outbox.open(16, _zeros, 0, WINDOW_BYTES)

    def interrupt(frame: protocol.Frame) -> None:
        if len(socket.frames()) == 5:
            outbox.put(protocol.Heartbeat())

    socket.on_frame = interrupt
    await _run_until_idle(outbox, socket)
    assert [frame.transfer for frame in socket.frames()] == [8, 16] * (WINDOW_BYTES // CHUNK_BYTES)
    assert socket.sent[5] == protocol.Heartbeat()


async def test_what_is_read_at_once_is_sent_in_frames_that_take_turns() -> None:
    outbox, socket = Outbox(), RecordingSocket()
    content = bytes(range(256)) * (5 * CHUNK_BYTES // 512)  # two and a half chunks
    reads: list[int] = []

    async def source(offset: int) -> bytes:
        reads.append(offset)
        return content[offset : offset + protocol.READ_BYTES]

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
    with pytest.raises(protocol.ProtocolError):
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
