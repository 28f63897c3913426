"""What a job prints, followed over broken connections: each byte once."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from orchestrator_client.operations import show
from orchestrator_client.retries import BrokenAnswers, Sender
from orchestrator_client.transport import PIECE_BYTES, ConnectionBroken, Request

_MARK = re.compile(rb"\n\[\.\.\. (?:(\d{1,18}) bytes left out|attempt (\d{1,9})) \.\.\.\]\n")
_LONGEST_MARK_BYTES = 64
# a job may print nothing for long; then the stream is opened once more where it was
_SILENCE_SECONDS = 120.0
_PAUSE_SECONDS = 0.2
_BEYOND_ALL = 10**17


async def read_output(
    sender: Sender, job_id: int, stream: str, offset: int = 0
) -> AsyncGenerator[bytes, None]:
    """Yield what a job has printed so far to ``stdout`` or ``stderr``."""
    position = Position(offset)
    breaks = BrokenAnswers(sender, "the output")
    while True:
        query = (("stream", stream), ("offset", str(position.offset)))
        try:
            async with sender.answer(Request("GET", f"/jobs/{job_id}/logs", query)) as answer:
                while data := await answer.read(PIECE_BYTES):
                    position.pass_over(data)
                    yield data
                return
        except ConnectionBroken as error:
            await breaks.pause(error, position.offset)


async def read_end(sender: Sender, job_id: int, stream: str, size: int) -> bytes:
    """Return the last bytes that a job has printed so far, ``size`` of them at most."""
    query = (("stream", stream), ("offset", str(_BEYOND_ALL)))
    async with sender.answer(Request("GET", f"/jobs/{job_id}/logs", query)) as answer:
        end = int(answer.header("X-Next-Offset") or 0)
    content = b""
    pieces = read_output(sender, job_id, stream, max(0, end - size))
    async with aclosing(pieces):
        async for piece in pieces:
            content = (content + piece)[-size:]
    return content


async def follow_output(
    sender: Sender, job_id: int, stream: str, offset: int = 0
) -> AsyncGenerator[bytes, None]:
    """Yield what a job prints until it has ended, also over restarts of the server.

    A line ``[... attempt N ...]`` stands where the job was started again.
    """
    position = Position(offset)
    attempt = await _attempt(sender, job_id)
    while True:
        query = (("stream", stream), ("follow", "1"), ("offset", str(position.offset)))
        request = Request("GET", f"/jobs/{job_id}/logs", query, silence=_SILENCE_SECONDS)
        try:
            async with sender.answer(request) as answer:
                while data := await answer.read(PIECE_BYTES):
                    position.pass_over(data)
                    yield data
                return
        except ConnectionBroken:
            await sender.transport.sleep(_PAUSE_SECONDS)
        now = await _attempt(sender, job_id)
        known = position.attempt or attempt
        if now > known > 0:
            yield b"\n[... attempt %d ...]\n" % now
            position = Position(0)
        attempt = now


async def _attempt(sender: Sender, job_id: int) -> int:
    attempts = (await show(sender, job_id)).raw.get("attempts") or ()
    return int(attempts[-1]["number"]) if attempts else 0


class Position:
    """How many bytes of a job's output were seen; marks of the server are not the job's bytes.

    A job that prints a line that looks like a mark misleads it, at worst to a line that is seen
    twice or not at all after a broken connection.
    """

    def __init__(self, offset: int) -> None:
        self.attempt = 0
        self._seen = offset
        self._open = b""  # the end of what was seen, which may be the start of a mark

    @property
    def offset(self) -> int:
        """Return the offset of what comes next."""
        return self._seen + len(self._open)

    def pass_over(self, data: bytes) -> None:
        """Move on by what the server sent."""
        text = self._open + data
        end = 0
        for mark in _MARK.finditer(text):
            self._seen += mark.start() - end
            left_out, attempt = mark.groups()
            if attempt is not None:
                self.attempt, self._seen = int(attempt), 0
            else:
                self._seen += int(left_out)
            end = mark.end()
        rest = text[end:]
        start = rest.rfind(b"\n[", max(0, len(rest) - _LONGEST_MARK_BYTES))
        if start < 0:
            start = len(rest) - (1 if rest.endswith(b"\n") else 0)
        self._seen += start
        self._open = rest[start:]


async def lines_of(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    """Yield the lines of an output, without their ends; what is not UTF-8 is replaced."""
    async with aclosing(pieces):
        async for line in _split(pieces):
            yield line.decode("utf-8", "replace")


async def _split(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for piece in pieces:
        rest += piece
        *whole, last = rest.split(b"\n")
        for line in whole:
            yield bytes(line)
        rest = bytearray(last)
    if rest:
        yield bytes(rest)
