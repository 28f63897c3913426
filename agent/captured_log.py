"""What a job writes to standard output and standard error, kept in bounds."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from archive.writer import read_pieces

LOG_NAMES = ("stdout.log", "stderr.log")
_TRIM_BYTES = 1024 * 1024  # a smaller gap, or one that grew by less, is not worth a call
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01  # fallocate(2)


@dataclass(frozen=True, slots=True)
class Gap:
    """The middle of a log that is left out: from ``start``, ``length`` bytes."""

    start: int
    length: int


class CapturedLog:
    """One output stream of a job: a file that the job itself appends to, with no pipe between.

    Of more than ``limit`` bytes only the start and the end are kept, half each. What lies
    between is given back to the disk while the file still grows (:meth:`trim`); the offsets of
    the rest stay as the job wrote them. The path is within reach of the job, so what is there
    now need not be what was made.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit
        self._trimmed = 0  # up to where the middle has been given back

    def size(self) -> int:
        """Return how many bytes the job wrote; 0 if there is no such file."""
        status = self.status()
        return 0 if status is None else status.st_size

    def gap(self) -> Gap | None:
        """Return what is left out of the file as it is now, None while it is within the limit."""
        left_out = self.size() - self.limit
        return Gap(self.limit // 2, left_out) if left_out > 0 else None

    def trim(self) -> None:
        """Give the disk space of the gap back; a file system that can't do that keeps it."""
        gap = self.gap()
        if gap is None or gap.start + gap.length < self._trimmed + _TRIM_BYTES:
            return
        with suppress(OSError), self._open(os.O_WRONLY) as file:
            _punch_hole(file.fileno(), gap.start, gap.length)
            self._trimmed = gap.start + gap.length

    def content(self) -> Iterator[bytes]:
        """Yield what is kept; a line in the place of the gap says how much is missing."""
        with self._open(os.O_RDONLY) as file:
            size = os.fstat(file.fileno()).st_size
            left_out = size - self.limit
            if left_out <= 0:
                yield from read_pieces(file, size)
                return
            yield from read_pieces(file, self.limit // 2)
            yield b"\n[... %d bytes left out ...]\n" % left_out
            file.seek(left_out, os.SEEK_CUR)
            yield from read_pieces(file, self.limit - self.limit // 2)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on; nothing if they can't be had."""
        with suppress(OSError), self._open(os.O_RDONLY) as file:
            return os.pread(file.fileno(), size, offset)
        return b""

    def status(self) -> os.stat_result | None:
        """Return the state of the file, None if there is none, or no file of that name."""
        with suppress(OSError):
            status = os.lstat(self.path)
            return status if stat.S_ISREG(status.st_mode) else None
        return None

    def _open(self, access: int) -> IO[bytes]:
        # the job may have put a link or a fifo there, which would block
        flags = access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        mode = "rb" if access == os.O_RDONLY else "wb"
        return os.fdopen(os.open(self.path, flags), mode, buffering=0)


def _punch_hole(descriptor: int, start: int, length: int) -> None:
    """Make a hole in a file, whose size does not change (fallocate(2))."""
    # looked up at each use, which is rare: an agent that never needs it does not load ctypes
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
