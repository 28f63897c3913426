"""Files within reach of jobs, opened as what they were made: no link to elsewhere is followed."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from io import BufferedWriter, FileIO
from pathlib import Path

_MODE = 0o600
_READ_BYTES = 64 * 1024


def open_for_reading(path: Path) -> FileIO:
    """Open a file. Raises :class:`OSError`, also for what is a link, a fifo or a directory."""
    return os.fdopen(_open(path), "rb", buffering=0)


def read_text(path: Path) -> str:
    """Return a small file's text. Raises :class:`OSError`."""
    # without a file object, which asks the kernel six things more: it is read for each job
    descriptor = _open(path)
    try:
        parts = list(iter(lambda: os.read(descriptor, _READ_BYTES), b""))
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", errors="replace")


def _open(path: Path) -> int:
    # a fifo would block; what it is, is looked at before anything is read
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no file", str(path))
    return descriptor


def open_new(path: Path) -> BufferedWriter:
    """Make a file, in the place of whatever is there. Raises :class:`OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, _MODE)
    except FileExistsError:
        path.unlink()
        descriptor = os.open(path, flags, _MODE)
    return os.fdopen(descriptor, "wb")


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that it is there whole, or as it was before."""
    unfinished = path.with_name(f"{path.name}.new")
    with open_new(unfinished) as file:
        file.write(text.encode())
    unfinished.rename(path)


def mark(path: Path) -> None:
    """Make an empty file; does nothing if there is something of that name."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE))
