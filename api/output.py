"""What jobs print, over HTTP: as far as it is, or followed while it comes."""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import hdrs, web

from api.connection import break_off, ended_by_disconnection
from api.errors import Conflict, UnknownJob
from api.parameters import choice, offset_of
from api.routes import job_id_of
from events import FeedClosed, Lagged, Output, Transition
from jobs import JobState, has_ended
from records import OutputPiece, OutputSource
from store import Store
from wire.frames import Stream

_STREAMS: Mapping[str, Stream] = {"stdout": Stream.STDOUT, "stderr": Stream.STDERR}
_SWITCH: Mapping[str, bool] = {"0": False, "1": True}
_NO_OUTPUT: Mapping[JobState, str] = {
    JobState.INVALID: "the job could not be run, so that it has no output",
    JobState.CLEANED: "the job's output has been removed by retention",
}
_PIECES_BEHIND = 8  # of up to 256 KiB each, which followers share


class OutputHandlers:
    """Handlers of the paths that give what jobs print."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Send what is kept of a stream of a job, from an offset on; with ``follow`` to its end."""
        stream = choice(request, "stream", "stdout", _STREAMS)
        follow = choice(request, "follow", "0", _SWITCH)
        offset = offset_of(request)
        job_id = job_id_of(request)
        writing = await self._store.output.source(job_id)
        if writing is None:
            raise UnknownJob
        if writing.state in _NO_OUTPUT:
            raise Conflict(_NO_OUTPUT[writing.state])
        response = web.StreamResponse(
            headers={
                hdrs.CONTENT_TYPE: "text/plain; charset=utf-8",
                hdrs.CACHE_CONTROL: "no-store",
            }
        )
        end = await self._end_of(writing, stream)
        if not follow:
            response.headers["X-Next-Offset"] = str(end)
        await response.prepare(request)
        if request.method == hdrs.METH_HEAD:
            return response
        writer = _LogWriter(response, offset)
        if follow:
            await self._follow(request, writer, job_id, stream)
        else:
            await self._send_stored(writer, writing, stream, end)
        return response

    async def _end_of(self, writing: OutputSource, stream: Stream) -> int:
        if writing.attempt_id is None:
            return 0
        return await self._store.output.latest_end(writing.attempt_id, stream)

    async def _send_stored(
        self, writer: _LogWriter, writing: OutputSource, stream: Stream, end: int | None
    ) -> None:
        """Send what is stored, up to ``end`` if there is one."""
        if writing.attempt_id is None:
            return
        writer.enter(writing.attempt)
        while end is None or writer.position < end:
            pieces = await self._store.output.read(writing.attempt_id, stream, writer.position)
            if not pieces:
                return
            for piece in pieces:
                await writer.write(piece)

    async def _follow(
        self, request: web.Request, writer: _LogWriter, job_id: int, stream: Stream
    ) -> None:
        """Send what is stored and what comes, until the job has ended or the server stops."""
        with ended_by_disconnection(request):
            try:
                while not await self._follow_a_while(writer, job_id, stream):
                    pass
                return
            except FeedClosed:
                pass
        break_off(request)

    async def _follow_a_while(self, writer: _LogWriter, job_id: int, stream: Stream) -> bool:
        """Catch up from the store, then take what comes from memory; True when the job has ended.

        A follower that is too slow for that gets False, and reads at its own pace again.
        """
        with self._store.feed.output_of(job_id, stream, _PIECES_BEHIND) as news:
            writing = await self._store.output.source(job_id)
            assert writing is not None
            await self._send_stored(writer, writing, stream, None)
            if has_ended(writing.state):
                return True
            while True:
                try:
                    event = await news.next()
                except Lagged:
                    return False
                if isinstance(event, Transition):
                    if has_ended(event.after):
                        return True
                    continue
                writer.enter(event.attempt)
                await writer.write(_piece_of(event))


class _LogWriter:
    """Writes pieces of one stream in their order: each byte once, gaps marked."""

    def __init__(self, response: web.StreamResponse, position: int) -> None:
        self.position = position
        self._response = response
        self._attempt: int | None = None
        self._mark = b""

    def enter(self, attempt: int) -> None:
        """Go on with this attempt; another one than before begins anew."""
        if self._attempt is not None and attempt != self._attempt:
            self.position = 0
            self._mark = b"\n[... attempt %d ...]\n" % attempt
        self._attempt = attempt

    async def write(self, piece: OutputPiece) -> None:
        """Write what of a piece is not written yet, at the client's pace."""
        piece = piece.after(self.position)
        if not piece.data:
            return
        left_out = piece.start - self.position
        mark = b"\n[... %d bytes left out ...]\n" % left_out if left_out else b""
        self.position = piece.start + len(piece.data)
        mark, self._mark = self._mark + mark, b""
        await self._response.write(mark + piece.data if mark else piece.data)


def _piece_of(event: Output) -> OutputPiece:
    return OutputPiece(event.stream, event.start, event.data)
