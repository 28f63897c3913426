"""The files of jobs over HTTP: whole results, parts of them, single members."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from aiohttp import hdrs, web

from api.answers import error_answer, job_answer
from api.connection import break_off, ended_by_disconnection
from api.errors import BadRequest, Conflict, NotFound, UnknownJob
from api.parameters import place_of, wait_seconds_of
from api.ranges import RangeNotSatisfiable, failed_condition, requested_part
from api.routes import job_id_of
from api.waiting import end_within
from archive.reader import Archive, DamagedArchive, Member
from archive.stream import Source, zip_of
from dispatch import Dispatcher
from fleet.snapshot_relay import SnapshotUnavailable
from jobs import JobState
from records import JobStatus, StoredFile, StoredResult
from store import Store

_STEP_BYTES = 512 * 1024
_PAGE_FILES = 1000

_CONTENT_TYPES: Mapping[str, str] = {
    **dict.fromkeys((".txt", ".log", ".out", ".err", ".md"), "text/plain; charset=utf-8"),
    ".csv": "text/csv; charset=utf-8",
    ".gif": "image/gif",
    ".gz": "application/gzip",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".json": "application/json",
    ".pdb": "chemical/x-pdb",
    ".pdf": "application/pdf",
    ".png": "image/png",
    ".tar": "application/x-tar",
    ".tsv": "text/tab-separated-values; charset=utf-8",
    ".zip": "application/zip",
}
"""What browsers show or hand on without running it; everything else is plain bytes to them."""


@dataclass(frozen=True, slots=True)
class _StoredDownload:
    """A stored blob as a client gets it; ``tag`` changes with its bytes (RFC 9110, 8.8.3).

    ``content`` is all of it, if that is here already.
    """

    blob_id: int
    size: int
    tag: str
    name: str
    content_type: str
    content: bytes | None = None


class FileHandlers:
    """Handlers of the paths that give files."""

    def __init__(self, store: Store, dispatcher: Dispatcher, long_reads: asyncio.Semaphore) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._long_reads = long_reads

    async def download(self, request: web.Request) -> web.StreamResponse:
        """Answer with a completed job's result, with the status of any other."""
        seconds = wait_seconds_of(request)
        awaited = await end_within(request, self._store, job_id_of(request), seconds)
        job = awaited.job
        if job is None:
            raise UnknownJob
        if job.state is not JobState.COMPLETED:
            return job_answer(job)
        result = awaited.result or await self._store.blobs.result_of_job(job.id)
        if result is None:  # retention came between
            return job_answer(JobStatus(job.id, JobState.CLEANED, ""))
        return await self._send_stored(request, _download_of(job.id, result))

    async def download_partial(self, request: web.Request) -> web.StreamResponse:
        """Answer with a ZIP of the job's files as they are now, whatever its state."""
        job = await self._job(request)
        if job.state is JobState.RUNNING:
            try:
                return await self._send_snapshot(request, job.id)
            except SnapshotUnavailable as error:
                job = await self._job(request)
                if job.state is JobState.RUNNING:
                    raise Conflict(str(error)) from None
        result = await self._store.blobs.result_of_job(job.id)
        if result is not None:
            return await self._send_stored(request, _download_of(job.id, result))
        return await self._send_input(request, job, await self._input(job))

    async def list_files(self, request: web.Request) -> web.StreamResponse:
        """List what a job left, or what was uploaded while (or if) it left nothing."""
        job = await self._job(request)
        start = place_of(request)
        result = await self._store.blobs.result_of_job(job.id)
        if result is None:
            files = await self._input(job)
            return web.json_response(_page_of_input(job.id, files, start))
        archive = self._archive_of(result)
        with self._store.blobs.pinned(result.blob_id):
            page = await _page_of_result(job.id, archive, start)
        return web.json_response(page)

    async def get_file(self, request: web.Request) -> web.StreamResponse:
        """Send one file of those that :meth:`list_files` lists."""
        job = await self._job(request)
        path = request.match_info["path"]
        result = await self._store.blobs.result_of_job(job.id)
        if result is not None:
            return await self._send_member(request, result, path)
        for file in await self._input(job):
            if file.spec.name == path:
                return await self._send_stored(request, _download_of_input(file))
        raise NotFound(f"job {job.id} has no file {path!r:.300}")

    async def _job(self, request: web.Request) -> JobStatus:
        job = await self._store.jobs.status(job_id_of(request))
        if job is None:
            raise UnknownJob
        return job

    async def _input(self, job: JobStatus) -> tuple[StoredFile, ...]:
        files = await self._store.blobs.input_of_job(job.id)
        if not files:
            raise Conflict("the job's files have been removed by retention")
        return files

    def _archive_of(self, result: StoredResult) -> Archive:
        async def read(offset: int, size: int) -> bytes:
            async with self._long_reads:
                return b"".join(await self._store.blobs.read(result.blob_id, offset, size))

        return Archive(read, result.size)

    # --- sending

    async def _send_stored(
        self, request: web.Request, download: _StoredDownload
    ) -> web.StreamResponse:
        """Send a blob or the part of it that is asked for."""
        headers = {
            **_attachment(download.name, download.tag),
            hdrs.ACCEPT_RANGES: "bytes",
            hdrs.CONTENT_TYPE: download.content_type,
        }
        if refusal := _refusal(request, download.tag):
            return refusal
        try:
            part = requested_part(request, download.tag, download.size)
        except RangeNotSatisfiable:
            answer = error_answer(416, f"the file has {download.size} bytes")
            answer.headers[hdrs.CONTENT_RANGE] = f"bytes */{download.size}"
            return answer
        start, end = (0, download.size) if part is None else (part.start, part.end)
        status = 200 if part is None else 206
        if part is not None:
            headers[hdrs.CONTENT_RANGE] = part.content_range
        if download.content is not None:
            body = download.content[start:end]
            return web.Response(body=body, status=status, headers=headers)
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = end - start
        with self._store.blobs.pinned(download.blob_id):
            await response.prepare(request)
            pieces = _read_ahead(self._store, download.blob_id, start, end)
            await _write_all(request, response, pieces)
        return response

    async def _send_snapshot(self, request: web.Request, job_id: int) -> web.StreamResponse:
        """Send the files of a job that runs, as its agent has them.

        Raises :class:`SnapshotUnavailable` if nothing can be sent. What breaks off later ends
        the connection, short of the announced length.
        """
        response = web.StreamResponse(headers=_partial_headers(job_id))
        if request.method == hdrs.METH_HEAD:  # to know the length would take all the work
            await response.prepare(request)
            return response
        async with self._dispatcher.snapshot(job_id) as snapshot:
            with ended_by_disconnection(request):
                response.content_length = await snapshot.size()
                snapshot.when_broken(partial(break_off, request))
                await response.prepare(request)
                await _write_all(request, response, snapshot.pieces())
        return response

    async def _send_input(
        self, request: web.Request, job: JobStatus, files: tuple[StoredFile, ...]
    ) -> web.StreamResponse:
        """Send what was uploaded, packed on the way."""
        uploaded = (await self._store.history.of_job(job.id))[0]
        sources = [
            Source(
                file.spec.name,
                file.spec.size,
                partial(_read_ahead, self._store, file.blob_id, 0, file.spec.size),
            )
            for file in files
        ]
        response = web.StreamResponse(headers=_partial_headers(job.id))
        with ExitStack() as pins:
            for file in files:
                pins.enter_context(self._store.blobs.pinned(file.blob_id))
            await response.prepare(request)
            await _write_all(request, response, zip_of(sources, uploaded.at))
        return response

    async def _send_member(
        self, request: web.Request, result: StoredResult, path: str
    ) -> web.StreamResponse:
        """Send one member of a result, unpacked."""
        archive = self._archive_of(result)
        with self._store.blobs.pinned(result.blob_id):
            member = await archive.find(path)
            if member is None or member.is_directory or member.is_link:
                raise NotFound(f"the result has no file {path!r:.300}")
            tag = f"{result.sha256}-{member.header}"
            if refusal := _refusal(request, tag):
                return refusal
            name = PurePosixPath(path).name
            headers = {**_attachment(name, tag), hdrs.CONTENT_TYPE: _content_type_of(name)}
            response = web.StreamResponse(headers=headers)
            response.content_length = member.size
            await response.prepare(request)
            await _write_all(request, response, archive.content(member))
        return response


def _partial_headers(job_id: int) -> dict[str, str]:
    return {
        hdrs.CONTENT_TYPE: "application/zip",
        hdrs.CONTENT_DISPOSITION: f'attachment; filename="job-{job_id}-partial.zip"',
        hdrs.CACHE_CONTROL: "no-store",
    }


def _download_of(job_id: int, result: StoredResult) -> _StoredDownload:
    name = f"job-{job_id}.zip"
    return _StoredDownload(
        *(result.blob_id, result.size, result.sha256, name, "application/zip", result.content)
    )


def _download_of_input(file: StoredFile) -> _StoredDownload:
    name = PurePosixPath(file.spec.name).name
    return _StoredDownload(
        file.blob_id, file.spec.size, file.spec.sha256, name, _content_type_of(name)
    )


def _content_type_of(name: str) -> str:
    return _CONTENT_TYPES.get(PurePosixPath(name).suffix.lower(), "application/octet-stream")


def _attachment(name: str, tag: str) -> dict[str, str]:
    """Return the fields of a file that browsers must save, not show: a job may have made it."""
    if name.isascii() and name.isprintable() and not {'"', "\\"} & set(name):
        parameter = f'filename="{name}"'
    else:
        parameter = f"filename*=UTF-8''{quote(name, safe='', errors='replace')}"  # RFC 8187
    return {hdrs.CONTENT_DISPOSITION: f"attachment; {parameter}", hdrs.ETAG: f'"{tag}"'}


def _refusal(request: web.Request, tag: str) -> web.Response | None:
    match failed_condition(request, tag):
        case 304:
            return web.Response(status=304, headers={hdrs.ETAG: f'"{tag}"'})
        case 412:
            return error_answer(412, "the file is not, or no longer, the one of If-Match")
    return None


async def _read_ahead(
    store: Store, blob_id: int, start: int, end: int
) -> AsyncGenerator[bytes, None]:
    """Yield a part of a blob; the next step is read while the taker has the one before."""

    def read() -> asyncio.Task[list[bytes]]:
        # up to a multiple of the step, so that no chunk is read twice
        stop = min(end, (start // _STEP_BYTES + 1) * _STEP_BYTES)
        return asyncio.create_task(store.blobs.read(blob_id, start, stop - start))

    if start == end:
        return
    reading = read()
    try:
        while True:
            pieces = await reading
            start += sum(map(len, pieces))
            if start < end:
                reading = read()
            for piece in pieces:
                yield piece
            if start == end:
                return
    finally:
        reading.cancel()


async def _write_all(
    request: web.Request, response: web.StreamResponse, pieces: AsyncGenerator[bytes, None]
) -> None:
    """Write a prepared answer's body at the client's pace, none for HEAD (RFC 9110, 9.3.2)."""
    if request.method == hdrs.METH_GET:
        async with aclosing(pieces):
            async for piece in pieces:
                await response.write(piece)
    await response.write_eof()


# --- lists ------------------------------------------------------------------------


def _page_of_input(job_id: int, files: tuple[StoredFile, ...], start: int) -> dict[str, Any]:
    page = [
        {
            "path": file.spec.name,
            "type": "file",
            "size": file.spec.size,
            "sha256": file.spec.sha256,
        }
        for file in files[start : start + _PAGE_FILES]
    ]
    end = start + len(page)
    return {
        "id": job_id,
        "source": "input",
        "files": page,
        "next_cursor": str(end) if end < len(files) else None,
    }


async def _page_of_result(job_id: int, archive: Archive, start: int) -> dict[str, Any]:
    page: list[dict[str, Any]] = []
    following: str | None = None
    try:
        async with aclosing(archive.members(start)) as members:
            async for member in members:
                if len(page) == _PAGE_FILES:
                    following = str(member.start)
                    break
                page.append(_described(member))
    except DamagedArchive:
        if start == 0:
            raise
        raise BadRequest("cursor: not one that an earlier page gave") from None
    return {"id": job_id, "source": "result", "files": page, "next_cursor": following}


def _described(member: Member) -> dict[str, Any]:
    moment = datetime.fromtimestamp(member.modified, UTC)
    return {
        "path": member.name,
        "type": "link" if member.is_link else "directory" if member.is_directory else "file",
        "size": member.size,
        "modified": moment.isoformat().replace("+00:00", "Z"),
        "mode": f"{stat.S_IMODE(member.mode):04o}",
    }
