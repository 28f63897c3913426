"""The members of a ZIP that lies elsewhere: listed and read without fetching the rest.

``zipfile`` wants a file and keeps every member in memory, of which a result may have a
million. Here the central directory is read in portions, through a function, and nothing
is kept. The format is PKWARE's APPNOTE.TXT 6.3; numbers in parentheses are its sections.
"""

from __future__ import annotations

import asyncio
import calendar
import stat
import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

Read: TypeAlias = Callable[[int, int], Awaitable[bytes]]
"""Returns the bytes of the archive from an offset on, as many as asked for, all within it."""

_PORTION_BYTES = 256 * 1024  # longer than the longest entry, which has 3 * 65,535 bytes of text
_PIECE_BYTES = 256 * 1024
_LONGEST_END = 65535 + 22  # (4.3.16) with the longest comment

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # (4.3.7)
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")  # (4.3.12)
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")  # (4.3.14)
_ZIP64_LOCATOR = struct.Struct("<4sLQL")  # (4.3.15)
_END = struct.Struct("<4s4H2LH")  # (4.3.16)
_LARGEST_32 = 0xFFFFFFFF

_STORED, _DEFLATED = 0, 8  # (4.4.5)
_RAW = -15  # window bits of a deflate stream without a zlib header
_UTF8_NAME = 0x800  # (4.4.4) bit 11
_ZIP64_EXTRA, _TIMESTAMP_EXTRA = 0x0001, 0x5455


ENDING_BYTES = _END.size + _ZIP64_LOCATOR.size + _ZIP64_END.size
"""How much of an archive without a comment stands behind its central directory, at most."""


def has_whole_ending(ending: bytes, size: int) -> bool:
    """Say whether an archive of ``size`` bytes, without a comment, ends as one that is whole.

    ``ending`` are its last :data:`ENDING_BYTES`, or all of it. The central directory must reach
    from where the end says it starts up to that end: nothing was cut off or put between.
    """
    at = len(ending) - _END.size
    if at < 0 or not ending.startswith(b"PK\x05\x06", at):
        return False
    *_, length, first, comment = _END.unpack_from(ending, at)
    directory_end = size - _END.size
    locator = at - _ZIP64_LOCATOR.size
    if locator >= _ZIP64_END.size and ending.startswith(b"PK\x06\x07", locator):
        directory_end -= _ZIP64_LOCATOR.size + _ZIP64_END.size
        signature, *_, length, first = _ZIP64_END.unpack_from(ending, locator - _ZIP64_END.size)
        if signature != b"PK\x06\x06":
            return False
    return bool(comment == 0 and first + length == directory_end)


class DamagedArchive(Exception):
    """The archive is not what the format, or its own directory, says."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of the archive.

    ``size`` in bytes, unpacked; ``mode`` as in stat(2), 0 if unknown; ``modified`` in Unix
    seconds. In the directory it stands from ``start`` up to, not including, ``next``.
    """

    name: str
    size: int
    mode: int
    modified: float
    start: int
    next: int
    method: int
    compressed: int
    check_sum: int
    header: int

    @property
    def is_directory(self) -> bool:
        """Whether it stands for a directory."""
        return self.name.endswith("/")

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link; its content is what the link says."""
        return stat.S_ISLNK(self.mode)


class Archive:
    """A ZIP of ``size`` bytes that ``read`` reads. All methods raise :class:`DamagedArchive`."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size

    async def members(self, start: int = 0) -> AsyncGenerator[Member, None]:
        """Yield the members in their order, from the one at ``start`` in the directory on."""
        first, length = await self._find_directory()
        while start < length:
            portion = await self._exactly(first + start, min(_PORTION_BYTES, length - start))
            taken = 0
            while (member := _parse(portion, taken, start)) is not None:
                yield member
                taken = member.next - start
            if not taken:
                raise DamagedArchive("the directory is cut off")
            start += taken

    async def find(self, name: str) -> Member | None:
        """Return the member of that name, None if there is none."""
        async with aclosing(self.members()) as members:
            async for member in members:
                if member.name == name:
                    return member
        return None

    async def content(self, member: Member) -> AsyncGenerator[bytes, None]:
        """Yield a member's bytes, unpacked, in bounded pieces."""
        header = await self._exactly(member.header, _LOCAL_HEADER.size)
        signature, *_, name, extra = _LOCAL_HEADER.unpack(header)
        if signature != b"PK\x03\x04":
            raise DamagedArchive("no member where the directory says")
        start = member.header + _LOCAL_HEADER.size + name + extra
        packed = self._pieces(start, start + member.compressed)
        if member.method not in (_STORED, _DEFLATED):
            raise DamagedArchive(f"compression method {member.method}")
        size = check_sum = 0
        async for piece in packed if member.method == _STORED else _inflated(packed):
            size += len(piece)
            check_sum = zlib.crc32(piece, check_sum)
            yield piece
        if (size, check_sum) != (member.size, member.check_sum):
            raise DamagedArchive("a member has other bytes than were put in")

    async def _pieces(self, start: int, end: int) -> AsyncIterator[bytes]:
        while start < end:
            piece = await self._exactly(start, min(_PIECE_BYTES, end - start))
            yield piece
            start += len(piece)

    async def _find_directory(self) -> tuple[int, int]:
        """Return where the central directory starts, and its length."""
        tail_start = max(0, self._size - _LONGEST_END - _ZIP64_LOCATOR.size)
        tail = await self._exactly(tail_start, self._size - tail_start)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < _END.size:
            raise DamagedArchive("no end of the central directory")
        *_, length, first, _ = _END.unpack_from(tail, at)
        locator = at - _ZIP64_LOCATOR.size
        if locator >= 0 and tail.startswith(b"PK\x06\x07", locator):
            _, _, end, _ = _ZIP64_LOCATOR.unpack_from(tail, locator)
            *_, length, first = _ZIP64_END.unpack(await self._exactly(end, _ZIP64_END.size))
        return first, length

    async def _exactly(self, start: int, length: int) -> bytes:
        if start + length > self._size:
            raise DamagedArchive("something lies beyond its end")
        return await self._read(start, length)


def _parse(portion: bytes, at: int, start: int) -> Member | None:
    """Parse the entry at ``at`` of what stands at ``start``; None if it is not all there."""
    if len(portion) - at < _CENTRAL_HEADER.size:
        return None
    fields = _CENTRAL_HEADER.unpack_from(portion, at)
    signature, _, _, flags, method, clock, date, check_sum, compressed, size = fields[:10]
    name_length, extra_length, comment_length, _, _, attributes, header = fields[10:]
    if signature != b"PK\x01\x02":
        raise DamagedArchive("no entry where one must be")
    name_start = at + _CENTRAL_HEADER.size
    extra_start = name_start + name_length
    end = extra_start + extra_length + comment_length
    if end > len(portion):
        return None
    extras = _extras(portion[extra_start : extra_start + extra_length])
    # (4.5.3) those values that do not fit into the entry, in this order
    large = iter(_integers(extras.get(_ZIP64_EXTRA, b"")))
    size, compressed, header = (
        next(large, value) if value == _LARGEST_32 else value
        for value in (size, compressed, header)
    )
    encoding = "utf-8" if flags & _UTF8_NAME else "cp437"
    return Member(
        name=portion[name_start:extra_start].decode(encoding, errors="replace"),
        size=size,
        mode=attributes >> 16,
        modified=_modified(extras.get(_TIMESTAMP_EXTRA, b""), date, clock),
        start=start + at,
        next=start + end,
        method=method,
        compressed=compressed,
        check_sum=check_sum,
        header=header,
    )


def _extras(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        kind, length = struct.unpack_from("<HH", data)
        found[kind] = data[4 : 4 + length]
        data = data[4 + length :]
    return found


def _integers(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}Q", data[: len(data) // 8 * 8])


def _modified(timestamp: bytes, date: int, clock: int) -> float:
    if len(timestamp) >= 5 and timestamp[0] & 1:
        return float(struct.unpack_from("<l", timestamp, 1)[0])
    # MS-DOS time, which has no zone: taken as UTC
    day = (1980 + (date >> 9), min(max(date >> 5 & 15, 1), 12), date & 31)
    return float(calendar.timegm((*day, clock >> 11, clock >> 5 & 63, 2 * (clock & 31), 0, 0, 0)))


async def _inflated(packed: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    inflate = zlib.decompressobj(_RAW)
    while not inflate.eof:
        data = inflate.unconsumed_tail or await anext(packed, b"")
        try:
            piece = await asyncio.to_thread(inflate.decompress, data, _PIECE_BYTES)
        except zlib.error as error:
            raise DamagedArchive(str(error)) from None
        if piece:
            yield piece
        elif not data:
            raise DamagedArchive("a member is cut off")
