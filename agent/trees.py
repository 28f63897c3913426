"""Trees of files that a job may have made: walked, archived and removed.

Nothing here follows a link, goes by a path that a job can change, or needs more memory for a
deeper or a wider tree.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from archive.writer import LONGEST_MEMBER_NAME, ZipWriter, read_pieces

_NAMES_AT_A_TIME = 4096
_CHANGED = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.EINVAL)
"""How the opening of a file fails that may not be read, or is no longer what it was."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Something below a directory: open directory, name in it, name in the archive."""

    directory: int
    name: str
    archive_name: str
    status: os.stat_result


@dataclass(slots=True)
class _Level:
    """A directory on the way down: which it is, where its path ends, what is still below it."""

    identity: tuple[int, int]
    path_length: int
    below: list[str] = field(default_factory=list)


def walk(top: Path) -> Iterator[Entry]:
    """Yield everything below ``top``, parents first, without following links.

    By one directory descriptor that goes down and, by way of "..", up again: neither the
    length of a path nor the depth of a tree matters. Names of files are read in portions, so
    their number does not matter either. An entry's descriptor is valid until the next entry
    is asked for. What vanishes meanwhile is left out, and a directory that is moved away
    while it is read ends the walk, which would go on elsewhere.
    """
    try:
        directory = _open_directory(str(top), None)
    except (FileNotFoundError, NotADirectoryError):
        return  # the job removed its own directory
    path = ""
    levels = [_Level(_identity(directory), 0)]
    try:
        yield from _entries(directory, path, levels[-1].below)
        while levels:
            level = levels[-1]
            if level.below:
                name = level.below.pop()
                with suppress(FileNotFoundError, NotADirectoryError):
                    directory = _replace_directory(directory, name)
                    path += _printable(name) + "/"
                    levels.append(_Level(_identity(directory), len(path)))
                    yield from _entries(directory, path, levels[-1].below)
                continue
            levels.pop()
            if levels:
                directory = _replace_directory(directory, "..")
                path = path[: levels[-1].path_length]
                if _identity(directory) != levels[-1].identity:
                    return
    finally:
        os.close(directory)


def _entries(directory: int, path: str, below: list[str]) -> Iterator[Entry]:
    """Yield what is in an open directory, and put the directories there into ``below``."""
    for name, status in _list(directory):
        is_directory = stat.S_ISDIR(status.st_mode)
        archive_name = path + _printable(name) + ("/" if is_directory else "")
        yield Entry(directory, name, archive_name, status)
        if is_directory:
            below.append(name)
    below.reverse()


def _identity(directory: int) -> tuple[int, int]:
    status = os.fstat(directory)
    return status.st_dev, status.st_ino


def _list(directory: int) -> Iterator[tuple[str, os.stat_result]]:
    """Yield names and states, in the order of the names unless they are very many."""
    for names in _portions_of_names(directory):
        for name in names:
            with suppress(FileNotFoundError):
                yield name, os.stat(name, dir_fd=directory, follow_symlinks=False)


def _portions_of_names(directory: int) -> Iterator[list[str]]:
    """Yield the names in an open directory, some thousands at a time, each portion sorted."""
    with os.scandir(directory) as entries:
        while names := [entry.name for entry in itertools.islice(entries, _NAMES_AT_A_TIME)]:
            yield sorted(names)


def _replace_directory(directory: int, name: str) -> int:
    other = _open_directory(name, directory)
    os.close(directory)
    return other


def _open_directory(name: str, parent: int | None) -> int:
    """Open a directory, but no link to one; one whose mode forbids it is made readable."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except PermissionError:
        _permit(name, parent, stat.S_IRWXU)  # it is ours, only its mode forbids
        return os.open(name, flags, dir_fd=parent)


def _permit(name: str, parent: int | None, bits: int) -> None:
    """Add to the mode of a file or directory, but of nothing that a link leads to.

    By a descriptor, as chmod(2) follows links: a job could put one there at the last moment, to
    something of the agent's user.
    """
    descriptor = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            os.chmod(f"/proc/self/fd/{descriptor}", stat.S_IMODE(mode) | bits)
    finally:
        os.close(descriptor)


def _printable(name: str) -> str:
    """Return a name that ZIP can hold: bytes that are not UTF-8 are shown as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def add_entry(archive: ZipWriter, entry: Entry) -> bool:
    """Add a file, directory or link; skips sockets, fifos and devices. False if it can't be."""
    mode = entry.status.st_mode
    if len(entry.archive_name.encode()) > LONGEST_MEMBER_NAME:
        return False
    try:
        if stat.S_ISDIR(mode):
            archive.add(entry.archive_name, entry.status, ())
        elif stat.S_ISLNK(mode):
            target = os.fsencode(os.readlink(entry.name, dir_fd=entry.directory))
            archive.add(entry.archive_name, entry.status, [target])
        elif stat.S_ISREG(mode):
            with _open_file(entry) as source:
                size = entry.status.st_size
                archive.add(entry.archive_name, entry.status, read_pieces(source, size))
    except OSError as error:
        if error.errno not in _CHANGED:
            raise
        return False
    return True


def _open_file(entry: Entry) -> IO[bytes]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(entry.name, flags, dir_fd=entry.directory), "rb", buffering=0)
    except PermissionError:
        # it is ours, only its mode forbids; the archive keeps that mode
        _permit(entry.name, entry.directory, stat.S_IRUSR)
        return os.fdopen(os.open(entry.name, flags, dir_fd=entry.directory), "rb", buffering=0)


def remove_tree(top: Path) -> None:
    """Remove a directory with all that a job may have left in it; no error if there is none."""
    with suppress(FileNotFoundError):
        while True:
            remove_contents(top)
            if _remove_empty(top):
                return


def _remove_empty(directory: str | Path, within: int | None = None) -> bool:
    """Remove a directory, unless there is something in it."""
    try:
        os.rmdir(directory, dir_fd=within)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # POSIX allows either
            raise
        return False
    return True


def remove_contents(top: Path) -> None:
    """Remove all that a job may have left in a directory.

    Directories are moved up to the top before they are emptied, so that the depth of the tree
    does not matter (shutil.rmtree recurses).
    """
    directory = _open_directory(str(top), None)
    numbers = itertools.count()
    try:
        while _remove_some(directory, numbers):
            pass
    finally:
        os.close(directory)


def _remove_some(directory: int, numbers: Iterator[int]) -> bool:
    """Remove what is in the directory now; returns whether there may be more by now."""
    has_moved = False
    for names in _portions_of_names(directory):
        for name in names:
            if not _unlink(name, directory) and not _remove_empty(name, directory):
                has_moved |= _empty_into(name, directory, numbers)
                os.rmdir(name, dir_fd=directory)
    return has_moved


def _empty_into(name: str, top: int, numbers: Iterator[int]) -> bool:
    """Unlink the files of a directory in ``top`` and move its directories to ``top``, if any."""
    has_moved = False
    directory = _open_directory(name, top)
    try:
        for child in itertools.chain.from_iterable(_portions_of_names(directory)):
            if _unlink(child, directory):
                continue
            # a directory that changes its parent must be writable itself
            _permit(child, directory, stat.S_IRWXU)
            os.rename(child, _free_name(top, numbers), src_dir_fd=directory, dst_dir_fd=top)
            has_moved = True
    finally:
        os.close(directory)
    return has_moved


def _free_name(directory: int, numbers: Iterator[int]) -> str:
    while True:
        name = f"removed-{next(numbers)}"
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return name


def _unlink(name: str, directory: int) -> bool:
    """Remove what is not a directory; returns False if it is one."""
    try:
        try:
            os.unlink(name, dir_fd=directory)
        except PermissionError:
            os.fchmod(directory, 0o700)
            os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    return True
