"""Input files below a job's directory, whose names may be paths.

A name may have as many bytes as the kernel allows in a whole path (PATH_MAX), so it is not put
behind that of the directory: what is opened is opened relative to its own directory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

import jobs


def make_directories(top: Path, names: Iterable[str]) -> None:
    """Make the directories that files of these names need."""
    for directory in jobs.directories_of(names):
        parent, _, name = directory.rpartition("/")
        descriptor = _open_directory(top, parent)
        try:
            os.mkdir(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)


def append_to(top: Path, name: str) -> FileIO:
    """Open a file to be added to, made if it is not there."""
    return os.fdopen(_open(top, name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab", buffering=0)


def read_from(top: Path, name: str) -> FileIO:
    """Open a file to be read. Raises :class:`FileNotFoundError`."""
    return os.fdopen(_open(top, name, os.O_RDONLY), "rb", buffering=0)


def _open(top: Path, name: str, flags: int) -> int:
    parent, _, base = name.rpartition("/")
    if not parent:
        return os.open(top / base, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    descriptor = _open_directory(top, parent)
    try:
        return os.open(base, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def _open_directory(top: Path, path: str) -> int:
    descriptor = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if not path:
        return descriptor
    try:
        return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
    finally:
        os.close(descriptor)
