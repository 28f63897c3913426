"""Unpack a result: all of it or nothing, never outside of the directory, never through a link."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from orchestrator_client.errors import DamagedDownload, UnsafeArchive
from orchestrator_client.uploads import Progress

_PIECE_BYTES = 256 * 1024
_LONGEST_TARGET_BYTES = 4096
_TIMESTAMP_ID = 0x5455
_ENCRYPTED = 0x1


@dataclass(frozen=True, slots=True)
class Extraction:
    """What came out of an archive: how many files, their bytes, and the links not made.

    Only links that stay in the directory are made, and never written through.
    """

    files: int
    size: int
    left_out: tuple[str, ...]


def extract(archive: IO[bytes], directory: Path, progress: Progress | None = None) -> Extraction:
    """Unpack a ZIP into a directory, which is made if need be; files of the same name are replaced.

    It is unpacked beside its place first, so that a full disk or a damaged archive changes
    nothing. Raises :class:`UnsafeArchive`, :class:`DamagedDownload` and :class:`OSError`.
    """
    directory = Path(os.path.realpath(directory))
    try:
        with zipfile.ZipFile(archive) as opened:
            plan = _Plan(opened)
            plan.check_room(existing_parent(directory))
            with _staging(directory) as staging:
                extraction = plan.unpack(opened, staging, progress)
                _put_in_place(staging, directory)
            return extraction
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise DamagedDownload(f"the archive is damaged: {error}") from None


# --- what is in it ----------------------------------------------------------------


class _Plan:
    """What is to be unpacked, checked before anything is written."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._files: dict[PurePosixPath, zipfile.ZipInfo] = {}
        self._links: dict[PurePosixPath, zipfile.ZipInfo] = {}
        self._directories: set[PurePosixPath] = set()
        self._left_out: list[str] = []
        for member in archive.infolist():
            self._add(member)
        self.size = sum(member.file_size for member in self._files.values())
        self._refuse_files_as_directories()

    def check_room(self, place: Path) -> None:
        """Raise :class:`OSError` if the disk has too little room, before it is filled."""
        if self.size > shutil.disk_usage(place).free:
            text = f"no space left on device for {self.size} bytes"
            raise OSError(errno.ENOSPC, text, str(place))

    def unpack(
        self, archive: zipfile.ZipFile, place: Path, progress: Progress | None
    ) -> Extraction:
        """Write everything into an empty directory that nobody else writes to."""
        for path in sorted(self._directories):
            (place / path).mkdir(parents=True, exist_ok=True)
        done = 0
        for path, member in self._files.items():
            target = place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            for size in _write_member(archive, member, target):
                done += size
                if progress is not None:
                    progress(done, self.size)
        left_out = list(self._left_out)
        for path, member in self._links.items():  # last, so that nothing is written through one
            link_target = _target_of(archive, member)
            if not _stays_inside(path, link_target):
                left_out.append(member.filename)
                continue
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(link_target, place / path)
        return Extraction(len(self._files), self.size, tuple(left_out))

    def _add(self, member: zipfile.ZipInfo) -> None:
        path = _safe_path(member)
        if path in self._files or path in self._links:
            raise UnsafeArchive(f"the archive holds {member.filename!r:.200} more than once")
        if member.flag_bits & _ENCRYPTED:
            raise UnsafeArchive("the archive is encrypted")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if member.is_dir() or kind == stat.S_IFDIR:
            self._directories.add(path)
        elif kind == stat.S_IFLNK:
            self._links[path] = member
        elif kind in (0, stat.S_IFREG):
            self._files[path] = member
        else:
            self._left_out.append(member.filename)

    def _refuse_files_as_directories(self) -> None:
        leaves = self._files.keys() | self._links.keys()
        if clash := next(iter(leaves & self._directories), None):
            raise UnsafeArchive(f"the archive holds {clash} as a file and as a directory")
        for path in [*leaves, *self._directories]:
            for place in path.parents:
                if place in leaves:
                    raise UnsafeArchive(f"the archive holds {place} as a file and as a directory")


def _safe_path(member: zipfile.ZipInfo) -> PurePosixPath:
    name = member.orig_filename
    parts = name.rstrip("/").split("/") if name.endswith("/") else name.split("/")
    if "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise UnsafeArchive(f"the archive holds a file of an unsafe name: {name!r:.200}")
    return PurePosixPath(*parts)


def _target_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
    if not 0 < member.file_size <= _LONGEST_TARGET_BYTES:
        raise UnsafeArchive(f"the link {member.filename!r:.200} has no usable target")
    return os.fsdecode(archive.read(member))


def _stays_inside(path: PurePosixPath, target: str) -> bool:
    """Whether a link leads to a place in the directory, whatever other links are there.

    ``..`` is allowed at the start only: after a name it would be that of a link's target.
    """
    if target.startswith("/") or "\0" in target:
        return False
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    return ".." not in parts[ups:] and ups <= len(path.parts) - 1


def _write_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Iterator[int]:
    """Write a new file; yields the bytes of each step. The length and the CRC are checked."""
    mode = (member.external_attr >> 16) & 0o777 or 0o644
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(target, flags, mode | 0o600)
    with os.fdopen(handle, "wb") as file, archive.open(member) as content:
        while data := content.read(_PIECE_BYTES):
            file.write(data)
            yield len(data)
    modified = _modified(member)
    if modified is not None:
        os.utime(target, (modified, modified))


def _modified(member: zipfile.ZipInfo) -> int | None:
    """Return the time of the last change, in Unix seconds, of the "UT" field of Info-ZIP."""
    extra = member.extra
    while len(extra) >= 4:
        field, size = struct.unpack_from("<HH", extra)
        content = extra[4 : 4 + size]
        if field == _TIMESTAMP_ID and len(content) >= 5 and content[0] & 1:
            return int(struct.unpack_from("<i", content, 1)[0])
        extra = extra[4 + size :]
    return None


# --- where it goes ----------------------------------------------------------------


def existing_parent(directory: Path) -> Path:
    """Return the directory itself, or the nearest one above it that is there."""
    while not directory.exists():
        directory = directory.parent
    return directory


class _staging:
    """A new directory on the same file system as ``directory``, gone at the end of the block."""

    def __init__(self, directory: Path) -> None:
        parent = directory if directory.is_dir() else directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._path = parent / f".orchestrator-{secrets.token_hex(6)}.part"

    def __enter__(self) -> Path:
        self._path.mkdir(mode=0o700)
        return self._path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _put_in_place(staging: Path, directory: Path) -> None:
    """Move all that was unpacked to its place; checked before anything is moved."""
    moves = list(_moves(staging, directory))
    for source, target in moves:
        _check_move(source, target)
    for source, target in moves:
        if stat.S_ISDIR(source.lstat().st_mode):
            target.mkdir(exist_ok=True)
        else:
            os.replace(source, target)


def _moves(staging: Path, directory: Path) -> Iterator[tuple[Path, Path]]:
    """Yield (from, to), directories before what is in them."""
    yield staging, directory
    for folder, folders, names in os.walk(staging):
        place = directory / Path(folder).relative_to(staging)
        for name in (*folders, *names):
            yield Path(folder, name), place / name


def _check_move(source: Path, target: Path) -> None:
    try:
        there = target.lstat().st_mode
    except FileNotFoundError:
        return
    is_directory = stat.S_ISDIR(source.lstat().st_mode)
    if is_directory != stat.S_ISDIR(there):
        what = "a link or file" if is_directory else "a directory"
        raise UnsafeArchive(f"{target} is {what} already; it is left as it is")
