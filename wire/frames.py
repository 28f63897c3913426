"""Binary frames: a 16-byte header (transfer, offset) and a piece of the transfer's bytes."""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from wire.messages import ProtocolError

CHUNK_BYTES = 256 * 1024
"""Bytes in every binary frame but the last of its transfer, and in every stored chunk."""

READ_BYTES = 4 * CHUNK_BYTES
"""Bytes that the sender of a long transfer reads at a time: a thread's turn for some frames."""

WINDOW_BYTES = 4 * 1024 * 1024
"""How far a sender may run ahead of the last offset that its receiver acknowledged."""


class Stream(enum.IntEnum):
    """What of an attempt a transfer carries; the direction follows from it.

    A SNAPSHOT is named by its request, all others by the attempt.
    """

    INPUT = 0
    RESULT = 1
    STDOUT = 2
    STDERR = 3
    SNAPSHOT = 4
    STDOUT_LIVE = 5
    STDERR_LIVE = 6


LIVE_STREAMS: Mapping[Stream, Stream] = {
    Stream.STDOUT: Stream.STDOUT_LIVE,
    Stream.STDERR: Stream.STDERR_LIVE,
}
"""The two streams of a job's output, each with the one that carries the latest of it.

Offsets are those of what the process wrote; gaps are allowed. Of an output that is longer
than the limit STDOUT and STDERR carry the first half of the limit while the job runs, and the
last half at its end, before Finished. What the job writes between goes, as far as there is
room, with the live stream, and counts only until the end.
"""

OUTPUT_STREAMS = frozenset({*LIVE_STREAMS, *LIVE_STREAMS.values()})
"""All streams that carry output."""


_STREAM_BITS = 3
_HEADER = struct.Struct(">QQ")
MAX_FRAME_BYTES = _HEADER.size + CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Frame:
    """A piece of a transfer: ``data`` stands at ``offset`` bytes from its start."""

    transfer: int
    offset: int
    data: bytes


def transfer_id(attempt_id: int, stream: Stream) -> int:
    """Name a transfer; derived, so that both ends know it without agreeing on it first."""
    return attempt_id << _STREAM_BITS | stream


def transfer_parts(transfer: int) -> tuple[int, Stream]:
    """Split a transfer's name into attempt id and stream.

    Raises :class:`ProtocolError` for a stream that this version does not know.
    """
    try:
        return transfer >> _STREAM_BITS, Stream(transfer & (1 << _STREAM_BITS) - 1)
    except ValueError:
        raise ProtocolError(f"unknown stream in transfer {transfer}") from None


def encode_frame(transfer: int, offset: int, data: bytes | memoryview) -> bytes:
    """Return the binary frame for one piece of a transfer."""
    return _HEADER.pack(transfer, offset) + data


def decode_frame(frame: bytes) -> Frame:
    """Parse one binary frame; raises :class:`ProtocolError` if it is not one."""
    if not _HEADER.size < len(frame) <= MAX_FRAME_BYTES:
        raise ProtocolError(f"binary frame of {len(frame)} bytes")
    transfer, offset = _HEADER.unpack_from(frame)
    return Frame(transfer, offset, frame[_HEADER.size :])
