"""Download files: resumed where they broke, checked, and under their names only when whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import IO

from orchestrator_client.errors import (
    Conflict,
    DamagedDownload,
    ServerUnavailable,
    UnexpectedAnswer,
)
from orchestrator_client.retries import BrokenAnswers, Sender
from orchestrator_client.transport import PIECE_BYTES, Answer, ConnectionBroken, Request
from orchestrator_client.uploads import Progress

_SHA256_TAG = re.compile(r'"([0-9a-f]{64})"')
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-\d{1,19}/(\d{1,19})")


async def download(
    sender: Sender, path: str, target: Path, progress: Progress | None = None
) -> None:
    """Save what a path of the API gives as a file, which replaces an older one in one step.

    Raises :class:`DamagedDownload` if what came is not what was announced, :class:`Conflict` if
    there is no such file yet, :class:`OSError` if it can't be saved. Then nothing is left.
    """
    file, name = await sender.transport.run(lambda: _open_beside(target))
    try:
        with file:
            await fetch(sender, path, file, progress)
            await sender.transport.run(lambda: _sync(file))
        await sender.transport.run(lambda: os.replace(name, target))
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _open_beside(target: Path) -> tuple[IO[bytes], str]:
    """Open a new file in the directory of ``target``, with the rights that a new file gets."""
    handle, name = tempfile.mkstemp(
        prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent
    )
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(handle, 0o666 & ~mask)
    return os.fdopen(handle, "wb"), name


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


async def fetch(
    sender: Sender, path: str, file: IO[bytes], progress: Progress | None = None
) -> None:
    """Write what a path gives into an empty file, and check it. Raises as :func:`download`."""
    part = _Part(file, progress)
    breaks = BrokenAnswers(sender, "the download")
    while True:
        try:
            async with sender.answer(Request("GET", path, headers=part.headers())) as answer:
                await sender.transport.run(_start_of(part, answer))
                while data := await answer.read(PIECE_BYTES):
                    await sender.transport.run(_write_of(part, data))
            part.check()
            return
        except ConnectionBroken as error:
            await breaks.pause(error, part.done)


def _start_of(part: _Part, answer: Answer) -> Callable[[], None]:
    return lambda: part.start(answer)


def _write_of(part: _Part, data: bytes) -> Callable[[], None]:
    return lambda: part.write(data)


class _Part:
    """What has come of a file."""

    def __init__(self, file: IO[bytes], progress: Progress | None) -> None:
        self.done = 0
        self._file = file
        self._progress = progress
        self._digest = hashlib.sha256()
        self._tag: str | None = None
        self._size: int | None = None

    def headers(self) -> dict[str, str]:
        """Ask for the rest, if it is still of the same file; the server sends all if it is not."""
        if self.done == 0 or self._tag is None or self._tag.startswith("W/"):
            return {}
        return {"Range": f"bytes={self.done}-", "If-Range": self._tag}

    def start(self, answer: Answer) -> None:
        """Take in the head of an answer: begin anew if it is not the rest."""
        if (answer.header("Content-Type") or "").startswith("application/json") and (
            answer.header("Content-Disposition") is None
        ):
            raise Conflict("the job has no result (yet)")
        length = answer.header("Content-Length")
        if answer.status == 206:
            match = _CONTENT_RANGE.fullmatch(answer.header("Content-Range") or "")
            if match is None or int(match[1]) != self.done:
                raise UnexpectedAnswer("the server sends another part than was asked for", 206)
            self._size = int(match[2])
            return
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.done = 0
        self._tag = answer.header("ETag")
        self._size = None if length is None else int(length)

    def write(self, data: bytes) -> None:
        """Take in what came."""
        self._file.write(data)
        self._digest.update(data)
        self.done += len(data)
        if self._progress is not None:
            self._progress(self.done, self.done if self._size is None else self._size)

    def check(self) -> None:
        """Raise :class:`DamagedDownload` if this is not the whole file, byte for byte."""
        if self._size is not None and self.done != self._size:
            raise DamagedDownload(f"{self.done} bytes came, where {self._size} were announced")
        match = _SHA256_TAG.fullmatch(self._tag or "")
        if match is not None and self._digest.hexdigest() != match[1]:
            raise DamagedDownload("the SHA-256 of what came is not the one that was announced")


async def read_pieces(sender: Sender, path: str) -> AsyncGenerator[bytes, None]:
    """Yield what a path gives as it comes; a broken connection is an error once bytes came."""
    async with sender.answer(Request("GET", path)) as answer:
        try:
            while data := await answer.read(PIECE_BYTES):
                yield data
        except ConnectionBroken as error:
            raise ServerUnavailable(f"the download broke: {error}") from None
