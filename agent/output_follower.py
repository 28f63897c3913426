"""A job's output on its way to the server, while the job writes it.

The job writes into files, whatever becomes of the agent. A follower looks at how long
they are, at most a few times a second however much is written, and has the connection
send what is new. It holds no bytes: they are read when there is room to send them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.captured_log import CapturedLog
from agent.inotify import WriteWatch
from wire.frames import CHUNK_BYTES, LIVE_STREAMS, Stream, transfer_id
from wire.outbox import NO_GAP, Outbox

_FIRST_SECONDS = 0.3  # a job that ends sooner is sent as a whole
_PAUSE_SECONDS = 0.25
_PAUSE_BEHIND_SECONDS = 1.0
_BEHIND_BYTES = 256 * 1024
_LATEST_BYTES = 64 * 1024


@dataclass(slots=True)
class _Transfer:
    """One stream as a transfer, and up to where it is given to the connection."""

    id: int
    taken: int = 0


class _Followed:
    """One output of the job: what is kept of it, and the latest while the job runs."""

    def __init__(self, attempt_id: int, stream: Stream, captured: CapturedLog) -> None:
        self.log = captured
        self.kept = _Transfer(transfer_id(attempt_id, stream))
        self.live = _Transfer(transfer_id(attempt_id, LIVE_STREAMS[stream]))
        self._half = captured.limit // 2

    def connect(self, stored: int) -> None:
        """Begin from what the server has."""
        self.kept.taken = stored
        self.live.taken = max(stored, self._half)

    def send_new(self, outbox: Outbox) -> bool:
        """Send what is new, or the latest if that is too much; returns whether it was."""
        size = self.log.size()
        self._extend(outbox, self.kept, min(size, self._half), NO_GAP)
        start = _position(outbox, self.live)
        is_behind = size - start > _BEHIND_BYTES
        gap = range(start, size - _LATEST_BYTES) if is_behind else NO_GAP
        self._extend(outbox, self.live, size, gap)
        return is_behind

    def send_rest(self, outbox: Outbox, on_sent: Callable[[], None]) -> bool:
        """Send the rest of what is kept; False if there is none, and no call then."""
        outbox.close(self.live.id)
        size = self.log.size()
        gap = range(self._half, max(self._half, size - (self.log.limit - self._half)))
        return self._extend(outbox, self.kept, size, gap, on_sent)

    def close(self, outbox: Outbox) -> None:
        """Send no more."""
        outbox.close(self.kept.id)
        outbox.close(self.live.id)

    def _extend(
        self,
        outbox: Outbox,
        transfer: _Transfer,
        end: int,
        gap: range,
        on_sent: Callable[[], None] | None = None,
    ) -> bool:
        start = _position(outbox, transfer)
        if start >= end:
            return False

        async def source(offset: int) -> bytes:
            # no thread: the bytes were written a moment ago, they come out of memory
            return self.log.read(offset, CHUNK_BYTES)

        transfer.taken = end
        outbox.extend(transfer.id, source, start, end, gap, on_sent)
        return True


def _position(outbox: Outbox, transfer: _Transfer) -> int:
    position = outbox.position(transfer.id)
    return transfer.taken if position is None else position


class Follower:
    """Sends the output of one attempt: what is new while the job runs, the rest at its end."""

    def __init__(self, attempt_id: int, logs: Sequence[CapturedLog], watch: WriteWatch) -> None:
        """``logs`` are those of standard output and standard error."""
        self._watch = watch
        self._outbox: Outbox | None = None
        self._is_written = asyncio.Event()
        self._streams = tuple(
            _Followed(attempt_id, stream, captured)
            for stream, captured in zip(LIVE_STREAMS, logs, strict=True)
        )

    def connect(self, outbox: Outbox, stored: tuple[int, int]) -> None:
        """Send by this connection from now on; the server has the streams up to ``stored``."""
        self._outbox = outbox
        for followed, offset in zip(self._streams, stored, strict=True):
            followed.connect(offset)
        self._is_written.set()

    def disconnect(self) -> None:
        """The connection is over."""
        self._outbox = None

    async def run(self) -> None:
        """While the job runs: send what it writes, and keep what it takes on the disk in bounds."""
        await asyncio.sleep(_FIRST_SECONDS)
        try:
            while True:
                self._is_written.clear()
                for followed in self._streams:
                    # before its size is asked for, so that no later write goes unnoticed
                    self._watch.arm(followed.log.path, self._is_written)
                is_behind = self._send_new()
                for followed in self._streams:
                    if followed.log.gap() is not None:
                        await asyncio.to_thread(followed.log.trim)
                await asyncio.sleep(_PAUSE_BEHIND_SECONDS if is_behind else _PAUSE_SECONDS)
                await self._is_written.wait()
        finally:
            self._watch.disarm(self._is_written)

    def _send_new(self) -> bool:
        if self._outbox is None:
            return False
        is_behind = False
        for followed in self._streams:
            is_behind |= followed.send_new(self._outbox)
        return is_behind

    def send_rest(self, then: Callable[[], None]) -> None:
        """The job has ended: send the rest of its output and call ``then`` when that is sent.

        Without a connection nothing happens; the next one begins with this.
        """
        if self._outbox is None:
            return
        left = 0

        def on_sent() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                then()

        for followed in self._streams:
            left += followed.send_rest(self._outbox, on_sent)
        if left == 0:
            then()

    def close(self) -> None:
        """The server wants no more of it."""
        if self._outbox is not None:
            for followed in self._streams:
                followed.close(self._outbox)
