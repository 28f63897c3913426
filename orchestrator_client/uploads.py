"""What is uploaded: files of any kind as named sources that can be read again, and the form."""

from __future__ import annotations

import io
import os
import stat
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, TypeAlias, cast

from orchestrator_client.errors import UnusableFile
from orchestrator_client.transport import PIECE_BYTES

_MAX_NAME_BYTES = 4096
_SPOOL_BYTES = 1024 * 1024

FileLike: TypeAlias = (
    str | os.PathLike[str] | tuple[str, bytes | str | os.PathLike[str] | IO[bytes]] | IO[bytes]
)
"""A path of a file or a directory, (name, content or path or file object), or a file object."""

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""


@dataclass(frozen=True, slots=True)
class Source:
    """One file to upload: its name at the server, its size, and how to read it from the start."""

    name: str
    size: int
    open: Callable[[], IO[bytes]]


def sources_of(files: Iterable[FileLike]) -> list[Source]:
    """Return the files that these stand for; directories bring all of theirs, with their paths.

    Links to files are followed, links to directories are not (they may lead round in circles).
    Raises :class:`UnusableFile` for what is not there, can't be read, or has no usable name.
    """
    sources: dict[str, Source] = {}
    for file in files:
        for source in _expand(file):
            if source.name in sources:
                raise UnusableFile(f"there is more than one file of the name {source.name}")
            sources[source.name] = source
    _refuse_collisions(sources)
    return list(sources.values())


def _expand(file: FileLike) -> Iterator[Source]:
    if isinstance(file, tuple):
        name, content = file
        if isinstance(content, bytes | bytearray | memoryview):
            yield _source_of_bytes(checked_name(name), bytes(content))
        elif isinstance(content, str | os.PathLike):
            yield _source_of_path(checked_name(name), Path(content))
        else:
            yield _source_of_stream(checked_name(name), content)
    elif isinstance(file, str | os.PathLike):
        path = Path(file)
        if path.is_dir():
            yield from _sources_of_directory(path)
        else:
            yield _source_of_path(checked_name(path.name), path)
    else:
        own_name = getattr(file, "name", None)
        if not isinstance(own_name, str):
            raise UnusableFile("a file object without a name: give it as (name, file object)")
        yield _source_of_stream(checked_name(PurePosixPath(own_name).name), file)


def checked_name(name: str) -> str:
    """Return a name that the server will take: a relative path. Raises :class:`UnusableFile`."""
    shown = name.encode("ascii", "backslashreplace").decode()
    if not name:
        raise UnusableFile("a file without a name")
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name:
        raise UnusableFile(f"{shown}: a name must be a relative path without '..' or backslashes")
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise UnusableFile(f"{shown!r}: the name holds a control character")
    try:
        if len(name.encode("utf-8")) > _MAX_NAME_BYTES:
            raise UnusableFile(f"{shown[:60]}…: the name is longer than {_MAX_NAME_BYTES} bytes")
    except UnicodeEncodeError:
        raise UnusableFile(f"{shown}: the name is not UTF-8") from None
    return name


def _refuse_collisions(sources: Mapping[str, Source]) -> None:
    """Refuse names that a file system could not hold, or could confuse, side by side."""
    normalised: dict[str, str] = {}
    for name in sources:
        for parent in PurePosixPath(name).parents:
            if str(parent) in sources:
                raise UnusableFile(f"{parent} can't be a file and the directory of {name}")
        other = normalised.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UnusableFile(f"two names differ only in how Unicode writes them: {name}")


# --- sources ----------------------------------------------------------------------


def _sources_of_directory(directory: Path) -> Iterator[Source]:
    """Yield the files below a directory, in order, named from the directory's own name on."""
    root = directory.name if directory.name not in ("", "..") else ""
    found = False
    for folder, folders, names in os.walk(directory, onerror=_raise_unreadable):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            found = True
            yield _source_of_path(checked_name(f"{root}/{relative}" if root else relative), path)
    if not found:
        raise UnusableFile(f"{directory}: there are no files in this directory")


def _raise_unreadable(error: OSError) -> None:
    raise UnusableFile(f"{error.filename}: {_words(error)}")


def _source_of_bytes(name: str, content: bytes) -> Source:
    return Source(name, len(content), lambda: io.BytesIO(content))


def _source_of_path(name: str, path: Path) -> Source:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UnusableFile(f"{path}: {_words(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnusableFile(f"{path}: is not a file")
    if not os.access(path, os.R_OK):
        raise UnusableFile(f"{path}: permission denied")

    def open_unchanged() -> IO[bytes]:
        try:
            file = open(path, "rb")  # noqa: SIM115 - the taker closes it
        except OSError as error:
            raise UnusableFile(f"{path}: {_words(error)}") from None
        now = os.fstat(file.fileno())
        if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
            file.close()
            raise UnusableFile(f"{path}: was changed while it was uploaded")
        return file

    return Source(name, status.st_size, open_unchanged)


def _source_of_stream(name: str, stream: IO[bytes]) -> Source:
    """Read a file object from where it stands; one that can't be read twice is copied first."""
    try:
        is_seekable = stream.seekable()
        start = stream.tell() if is_seekable else 0
    except (AttributeError, OSError):
        is_seekable, start = False, 0
    if not is_seekable:
        stream, start = _spooled(stream), 0
    size = stream.seek(0, os.SEEK_END) - start
    stream.seek(start)

    def reopen() -> IO[bytes]:
        return cast(IO[bytes], _From(stream, start))

    return Source(name, size, reopen)


def _spooled(stream: IO[bytes]) -> IO[bytes]:
    """Copy a stream, to the disk if it is long: how long must be said before it is sent."""
    copy = cast(IO[bytes], tempfile.SpooledTemporaryFile(_SPOOL_BYTES))  # noqa: SIM115
    while piece := stream.read(PIECE_BYTES):
        if isinstance(piece, str):
            raise UnusableFile("a file object must be opened in binary mode")
        copy.write(piece)
    return copy


class _From(io.RawIOBase):
    """A reader of a file object that begins where that stood, and does not close it."""

    def __init__(self, stream: IO[bytes], start: int) -> None:
        self._stream = stream
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        if isinstance(data, str):
            raise UnusableFile("a file object must be opened in binary mode")
        return data


def _words(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]


# --- the form ---------------------------------------------------------------------


class Form:
    """A multipart/form-data body (RFC 7578) of known length, read from its files as it is sent.

    The fields come first, so that the server can refuse a job before the files are sent.
    """

    def __init__(
        self,
        fields: Sequence[tuple[str, str]],
        sources: Sequence[Source],
        progress: Progress | None = None,
    ) -> None:
        self._boundary = os.urandom(16).hex()
        self._fields = b"".join(self._field(name, value) for name, value in fields)
        self._parts = [(self._head(source), source) for source in sources]
        self._end = f"--{self._boundary}--\r\n".encode()
        self._progress = progress
        parts = sum(len(head) + source.size + 2 for head, source in self._parts)
        self.length = len(self._fields) + parts + len(self._end)
        self.content_type = f"multipart/form-data; boundary={self._boundary}"

    def pieces(self) -> Iterator[bytes]:
        """Yield the body from its start, in pieces of some size, and report the progress."""
        done = 0
        gathered = bytearray()
        for data in self._raw_pieces():
            gathered += data
            if len(gathered) >= PIECE_BYTES:
                done += len(gathered)
                yield bytes(gathered)
                gathered.clear()
                self._report(done)
        yield bytes(gathered)
        self._report(self.length)

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, self.length)

    def _raw_pieces(self) -> Iterator[bytes]:
        yield self._fields
        for head, source in self._parts:
            yield head
            yield from _content(source)
            yield b"\r\n"
        yield self._end

    def _field(self, name: str, value: str) -> bytes:
        head = f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        return f"{head}{value}\r\n".encode()

    def _head(self, source: Source) -> bytes:
        # escaped as browsers do it; names with control characters were refused before
        name = source.name.replace('"', "%22")
        return (
            f"--{self._boundary}\r\n"
            f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()


def _content(source: Source) -> Iterator[bytes]:
    """Yield a file's bytes, as many as were announced. Raises :class:`UnusableFile`."""
    left = source.size
    with source.open() as file:
        while left:
            try:
                data = file.read(min(PIECE_BYTES, left))
            except OSError as error:
                raise UnusableFile(f"{source.name}: {_words(error)}") from None
            if not data:
                raise UnusableFile(f"{source.name}: became shorter while it was uploaded")
            left -= len(data)
            yield data
