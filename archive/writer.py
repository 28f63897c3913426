"""What a job left, as a ZIP: written in memory that does not grow with the number of files.

``zipfile`` keeps some 400 bytes for each member until the end, which a job with a
million files turns into the memory of the agent. Here the central directory goes to a
temporary file as soon as it is long. The format is PKWARE's APPNOTE.TXT 6.3; numbers in
parentheses are its sections.
"""

from __future__ import annotations

import itertools
import os
import shutil
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

_COPY_BYTES = 1024 * 1024
_SAMPLE_BYTES = 64 * 1024
_WORTHWHILE = 0.9  # a sample that shrinks less than to this share is stored as it is
_LEVEL = 1
_RAW = -15  # window bits of a deflate stream without a zlib header
_DIRECTORY_BYTES_IN_MEMORY = 256 * 1024
LONGEST_MEMBER_NAME = 65535  # bytes; the format has 16 bits for it

_STORED, _DEFLATED = 0, 8
_UTF8_NAME = 0x800  # (4.4.4) bit 11
_UNIX = 3  # (4.4.2) the high half of the external attributes is the mode
_MSDOS_DIRECTORY = 0x10  # which some programs look for
_PLAIN, _ZIP64 = 20, 45  # (4.4.3) versions needed to extract
_LARGEST_32 = 0xFFFFFFFF
_LARGEST_16 = 0xFFFF

_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # (4.3.7)
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")  # (4.3.12)
_ZIP64_END = struct.Struct("<4sQ2H2L4Q")  # (4.3.14)
_ZIP64_LOCATOR = struct.Struct("<4sLQL")  # (4.3.15)
_END = struct.Struct("<4s4H2LH")  # (4.3.16)
_TIMESTAMP = struct.Struct("<HHBl")  # Info-ZIP's extended timestamp, 0x5455
_ZIP64_SIZES = struct.Struct("<HH2Q")  # (4.5.3) in a local header
_ZIP64_ALL = struct.Struct("<HH3Q")  # (4.5.3) in the central directory


@dataclass(slots=True)
class _Member:
    name: bytes
    status: os.stat_result
    offset: int
    method: int
    crc: int = 0
    compressed: int = 0
    size: int = 0

    @property
    def is_large(self) -> bool:
        """Whether its sizes may not fit into 32 bits; known before it is read."""
        return self.status.st_size >= 2**31

    def local_header(self) -> bytes:
        extra = self._timestamp()
        sizes = (self.compressed, self.size)
        if self.is_large:
            extra += _ZIP64_SIZES.pack(1, 16, self.size, self.compressed)
            sizes = (_LARGEST_32, _LARGEST_32)
        header = _LOCAL_HEADER.pack(
            b"PK\x03\x04", *self._common(), self.crc, *sizes, len(self.name), len(extra)
        )
        return header + self.name + extra

    def central_header(self) -> bytes:
        extra = self._timestamp()
        sizes = (self.compressed, self.size)
        offset = self.offset
        if self.is_large or offset >= _LARGEST_32:
            extra += _ZIP64_ALL.pack(1, 24, self.size, self.compressed, offset)
            sizes, offset = (_LARGEST_32, _LARGEST_32), _LARGEST_32
        version, *common = self._common()
        mode = self.status.st_mode
        attributes = (mode & 0xFFFF) << 16 | (_MSDOS_DIRECTORY if stat.S_ISDIR(mode) else 0)
        header = _CENTRAL_HEADER.pack(
            *(b"PK\x01\x02", _UNIX << 8 | version, version, *common, self.crc, *sizes),
            *(len(self.name), len(extra), 0, 0, 0, attributes, offset),
        )
        return header + self.name + extra

    def _common(self) -> tuple[int, int, int, int, int]:
        """Return version, flags, method, time and date, which both headers begin with."""
        version = _ZIP64 if self.is_large or self.offset >= _LARGEST_32 else _PLAIN
        flags = 0 if self.name.isascii() else _UTF8_NAME
        moment = min(max(self.status.st_mtime, 315619200), 4354732800)  # ZIP knows 1980 to 2107
        year, month, day, hour, minute, second = time.localtime(moment)[:6]
        clock = hour << 11 | minute << 5 | second // 2
        return version, flags, self.method, clock, (year - 1980) << 9 | month << 5 | day

    def _timestamp(self) -> bytes:
        """Seconds in UTC, where the format itself has two-second local time."""
        if not 0 <= self.status.st_mtime < 2**31:
            return b""
        return _TIMESTAMP.pack(0x5455, 5, 1, int(self.status.st_mtime))


class ZipWriter:
    """A ZIP under construction; :func:`new_zip` makes one.

    Names are in ``/`` form; a directory's ends with one.
    """

    def __init__(self, target: BinaryIO, directory: IO[bytes]) -> None:
        self._target = target
        self._directory = directory
        self._end = 0
        self._members = 0

    def add(self, name: str, status: os.stat_result, content: Iterable[bytes]) -> None:
        """Add a member with the mode and the time of ``status``."""
        pieces = iter(content)
        first, second = next(pieces, b""), next(pieces, b"")
        member = _Member(name.encode(), status, self._end, _method_for(first))
        if second:
            self._write(member.local_header())
            self._write_pieces(member, itertools.chain((first, second), pieces))
            # now with sizes and check sum
            self._target.seek(member.offset)
            self._target.write(member.local_header())
            self._target.seek(self._end)
        else:
            data = _deflated(first) if member.method == _DEFLATED else first
            member.crc, member.size, member.compressed = zlib.crc32(first), len(first), len(data)
            self._write(member.local_header() + data)
        self._directory.write(member.central_header())
        self._members += 1

    def close(self) -> None:
        """Write the central directory and the end; the target stays open."""
        start, size = self._end, self._directory.tell()
        self._directory.seek(0)
        shutil.copyfileobj(self._directory, self._target, _COPY_BYTES)
        count = self._members
        if count >= _LARGEST_16 or start >= _LARGEST_32 or size >= _LARGEST_32:
            end = _ZIP64_END.pack(
                *(b"PK\x06\x06", _ZIP64_END.size - 12, _UNIX << 8 | _ZIP64, _ZIP64),
                *(0, 0, count, count, size, start),
            )
            locator = _ZIP64_LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
            self._target.write(end + locator)
        count = min(count, _LARGEST_16)
        size, start = min(size, _LARGEST_32), min(start, _LARGEST_32)
        self._target.write(_END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0))

    def _write(self, data: bytes) -> None:
        self._target.write(data)
        self._end += len(data)

    def _write_pieces(self, member: _Member, pieces: Iterable[bytes]) -> None:
        deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW)
        is_deflated = member.method == _DEFLATED
        start = self._end
        for piece in pieces:
            member.crc = zlib.crc32(piece, member.crc)
            member.size += len(piece)
            self._write(deflate.compress(piece) if is_deflated else piece)
        if is_deflated:
            self._write(deflate.flush())
        member.compressed = self._end - start


@contextmanager
def new_zip(path: Path) -> Iterator[ZipWriter]:
    """Write a ZIP at ``path``, and scratch beside it; whole when the block has ended."""
    with open(path, "wb") as target, zip_into(target, path.parent) as writer:
        yield writer


@contextmanager
def zip_into(target: BinaryIO, scratch: Path) -> Iterator[ZipWriter]:
    """Write a ZIP into ``target``, whole when the block has ended; ``scratch`` is a directory."""
    with tempfile.SpooledTemporaryFile(_DIRECTORY_BYTES_IN_MEMORY, dir=str(scratch)) as spool:
        writer = ZipWriter(target, spool)
        yield writer
        writer.close()


def _method_for(start: bytes) -> int:
    """Deflate what a sample says is worth it, store the rest."""
    sample = start[:_SAMPLE_BYTES]
    return _DEFLATED if len(zlib.compress(sample, 1)) < _WORTHWHILE * len(sample) else _STORED


def _deflated(data: bytes) -> bytes:
    return zlib.compress(data, _LEVEL, _RAW)


def read_pieces(source: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the next ``size`` bytes, fewer if there are not as many."""
    while size > 0 and (piece := source.read(min(size, _COPY_BYTES))):
        yield piece
        size -= len(piece)
