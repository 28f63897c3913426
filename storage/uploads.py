"""Statements that make jobs: uploads, repeated requests, jobs that run again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jobs import Demand, FileSpec, JobState, Resources, Step
from records import (
    InputGone,
    JobIdentity,
    JobRequest,
    KeyReused,
    QueueFull,
    StoredFile,
    StoreError,
    Submission,
)
from storage.blobs import Blobs, insert_chunks, open_blob
from storage.checksums import checksum_of_row
from storage.database import Database
from storage.file import DatabaseFile, is_short_write
from storage.transitions import JobContext, JobRow, announce
from telemetry import metrics
from telemetry.logs import event
from wire.frames import CHUNK_BYTES

log = logging.getLogger("orchestrator.store")

_FLUSH_BYTES = 2 * 1024 * 1024
KEY_SECONDS = 24 * 3600.0


@dataclass(slots=True)
class _OpenFile:
    name: str
    blob_id: int
    size: int
    chunks: int
    buffer: bytearray
    digest: Any


@dataclass(frozen=True, slots=True)
class _PendingChunk:
    blob_id: int
    index: int
    data: memoryview


class Uploads:
    """How jobs are made: from uploads, and from jobs that are run again."""

    def __init__(self, file: DatabaseFile, blobs: Blobs) -> None:
        self._file = file
        self._blobs = blobs
        self.uploaded_bytes = metrics.Counter(
            "orchestrator_uploaded_bytes_total", "Bytes of the files of jobs that were taken in."
        )

    def new(self) -> Upload:
        """Begin to take in the files of a new job."""
        return Upload(self._file, self._blobs, self.uploaded_bytes)

    async def rerun(
        self, source_id: int, request: JobRequest, message: str, queue_limit: int
    ) -> Submission:
        """Make a job from ``request`` and the stored input of another, which both then share.

        Raises :class:`InputGone` if that is no longer stored, and as :meth:`Upload.commit`.
        """
        key = key_of(request, (), source_id)

        def operation(db: Database) -> Submission:
            if repeated := submission_before(db, key):
                return repeated
            check_queue(db, request.user_id, queue_limit)
            job = _insert_rerun(db, source_id, request, message)
            remember_key(db, key, job.id)
            return Submission(job)

        return await self._file.write_bytes(operation, 0)

    async def rerun_many(
        self, source_ids: Sequence[int], queue_limit: int, services: Container[str]
    ) -> list[JobIdentity]:
        """Run some jobs again, in one transaction; returns the new ones.

        Those whose input is no longer stored, whose service is not one of ``services``, or
        whose user has ``queue_limit`` queued jobs are left out.
        """

        def operation(db: Database) -> list[JobIdentity]:
            made: list[JobIdentity] = []
            for source_id in source_ids:
                request = request_of(db, source_id)
                if request is None or request.service not in services:
                    continue
                if not _has_input(db, source_id) or _queued(db, request.user_id) >= queue_limit:
                    continue
                message = f"Job {source_id} successfully submitted again"
                made.append(_insert_rerun(db, source_id, request, message))
            return made

        return await self._file.write_bytes(operation, 0)


class Upload:
    """The files of a job while they arrive. End it with :meth:`commit` or :meth:`abandon`.

    Holds at most about 4 MiB in memory: one flush is written while the next is gathered.
    A small upload never touches the disk before its commit.
    """

    def __init__(self, file: DatabaseFile, blobs: Blobs, uploaded_bytes: metrics.Counter) -> None:
        self._database = file
        self._blobs = blobs
        self._uploaded_bytes = uploaded_bytes
        self._file: _OpenFile | None = None
        self._files: list[StoredFile] = []
        self._pending: list[_PendingChunk] = []
        self._pending_bytes = 0
        self._flushing: asyncio.Future[None] | None = None
        self._flushed: set[int] = set()

    def start_file(self, name: str) -> None:
        """Begin the next file; the one before must have been finished."""
        assert self._file is None
        blob_id = self._blobs.next_id()
        self._file = _OpenFile(name, blob_id, 0, 0, bytearray(), hashlib.sha256())

    async def write(self, data: bytes) -> None:
        """Add bytes to the file; waits while too much is on its way to the disk."""
        file = self._file
        assert file is not None
        file.digest.update(data)
        file.size += len(data)
        file.buffer += data
        if self._pending_bytes + len(file.buffer) >= _FLUSH_BYTES:
            self._cut(file, len(file.buffer) // CHUNK_BYTES * CHUNK_BYTES)
            await self._flush()

    async def finish_file(self) -> None:
        """End the file."""
        file = self._file
        assert file is not None
        self._cut(file, len(file.buffer))
        spec = FileSpec(file.name, file.size, file.digest.hexdigest())
        self._files.append(StoredFile(spec, file.blob_id))
        self._file = None
        if self._pending_bytes >= _FLUSH_BYTES:
            await self._flush()

    async def commit(self, request: JobRequest, message: str, queue_limit: int) -> Submission:
        """Make the job; when this returns, it and all its bytes are on the disk.

        A repeated request gets the job that it made before, and its bytes are not kept.
        Raises :class:`KeyReused`, and :class:`QueueFull` when ``queue_limit`` jobs of the user
        are queued.
        """
        await self._end_flush()
        files, pending = tuple(self._files), self._take_pending()
        key = key_of(request, files)

        def operation(db: Database) -> Submission:
            # decided here, in the one writer: two at the same moment can't both be the first
            if repeated := submission_before(db, key):
                return repeated
            check_queue(db, request.user_id, queue_limit)
            job = insert_job(db, request, message, "uploaded")
            _insert_files(db, job.id, files)
            _insert_chunks(db, pending)
            remember_key(db, key, job.id)
            return Submission(job)

        weight = sum(len(chunk.data) for chunk in pending)
        submission = await self._database.write_bytes(operation, weight)
        if not submission.is_repeated:
            self._flushed.clear()
            self._uploaded_bytes.add(sum(file.spec.size for file in files))
        return submission

    def is_small(self) -> bool:
        """Whether the commit writes all of it, and goes with the short operations."""
        return not self.leaves_bytes() and is_short_write(self._pending_bytes)

    def leaves_bytes(self) -> bool:
        """Whether there is anything on its way to the disk, or there, that no job refers to."""
        return self._flushing is not None or bool(self._flushed)

    async def abandon(self) -> None:
        """Leave nothing behind; does nothing after a commit that made a job."""
        self._pending.clear()
        try:
            await self._end_flush()
        except StoreError as error:
            event(log, "upload_flush_failed", error=str(error))
        self._blobs.abandon(self._flushed)

    def _cut(self, file: _OpenFile, size: int) -> None:
        """Make chunks of the first bytes of the buffer, which are views of it, not copies."""
        data = memoryview(file.buffer)
        for start in range(0, size, CHUNK_BYTES):
            chunk = data[start : min(start + CHUNK_BYTES, size)]
            self._pending.append(_PendingChunk(file.blob_id, file.chunks, chunk))
            file.chunks += 1
        self._pending_bytes += size
        file.buffer = bytearray(data[size:])

    def _take_pending(self) -> list[_PendingChunk]:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        return pending

    async def _end_flush(self) -> None:
        if self._flushing is not None:
            # Who is cancelled here must not cancel the write: it stands in the writer's queue
            # and comes, and what is to be erased can be only after it.
            await asyncio.shield(self._flushing)
            self._flushing = None

    async def _flush(self) -> None:
        await self._end_flush()
        pending, weight = self._pending, self._pending_bytes
        self._take_pending()
        self._flushed.update(chunk.blob_id for chunk in pending)
        write = self._database.write_bytes(lambda db: _write_pending(db, pending), weight)
        self._flushing = asyncio.ensure_future(write)


def _write_pending(db: Database, pending: Sequence[_PendingChunk]) -> None:
    for chunk in pending:
        if chunk.index == 0:
            open_blob(db, chunk.blob_id)
    _insert_chunks(db, pending)


def _insert_chunks(db: Database, pending: Sequence[_PendingChunk]) -> None:
    for chunk in pending:
        insert_chunks(db, chunk.blob_id, chunk.index, [chunk.data])


def insert_job(db: Database, request: JobRequest, message: str, reason: str) -> JobIdentity:
    """Make a queued job with its tags and the first line of its history."""
    now = time.time()
    cursor = db.execute(
        "INSERT INTO job (user_id, service, name, priority, timeout, cpus, memory, gpus,"
        " needed_cpus, needed_memory, needed_gpus, state, message, created_at, changed_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'Queued', ?, ?, ?)",
        (
            *(request.user_id, request.service, request.name, request.priority, request.timeout),
            *(request.cpus, request.memory, request.gpus),
            *(request.resources.cpus, request.resources.memory, request.resources.gpus),
            *(message, now, now),
        ),
    )
    job_id = cast(int, cursor.lastrowid)
    db.executemany(
        "INSERT INTO tag (job_id, key, value) VALUES (?, ?, ?)",
        ((job_id, key, value) for key, value in request.tags),
    )
    db.execute(
        "UPDATE job SET crc32 = ? WHERE id = ?", (checksum_of_request(job_id, request, now), job_id)
    )
    job = JobRow(job_id, request.user_id, request.service, JobState.QUEUED, 0, 0)
    context = JobContext(now, Demand(request.resources))
    announce(db, job, None, Step(JobState.QUEUED, reason, now), context, message=message)
    return JobIdentity(job_id, request.user_id, request.service)


def checksum_of_request(job_id: int, request: JobRequest, created_at: float) -> int:
    """Return the checksum of what the submitter said and when, which never changes."""
    resources = (request.cpus, request.memory, request.gpus)
    tags = (word for tag in sorted(request.tags) for word in tag)
    first = (job_id, request.user_id, request.service, request.name, request.priority)
    return checksum_of_row((*first, request.timeout, *resources, created_at, *tags))


def _insert_rerun(db: Database, source_id: int, request: JobRequest, message: str) -> JobIdentity:
    job = insert_job(db, request, message, f"rerun of job {source_id}")
    share_input(db, source_id, job.id)
    return job


def check_queue(db: Database, user_id: int, limit: int) -> None:
    """Raise :class:`QueueFull` if ``limit`` jobs of the user are queued."""
    queued = _queued(db, user_id)
    if queued >= limit:
        raise QueueFull(f"user {user_id} has {queued} jobs queued, which is the limit")


def _queued(db: Database, user_id: int) -> int:
    ((queued,),) = db.execute(
        "SELECT coalesce(sum(jobs), 0) FROM job_count WHERE user_id = ? AND state = 'Queued'",
        (user_id,),
    ).fetchall()
    return int(queued)


@dataclass(frozen=True, slots=True)
class _Key:
    """An idempotency key and a digest of all that makes two requests of it the same."""

    user_id: int
    text: str
    content_sha256: str


def key_of(
    request: JobRequest, files: Sequence[StoredFile], source_id: int | None = None
) -> _Key | None:
    """Return the key of a request if it has one; the order of files and tags does not matter."""
    if request.idempotency_key is None:
        return None
    parts = (source_id, request.service, request.name, request.priority, request.timeout)
    specs = sorted((file.spec.name, file.spec.size, file.spec.sha256) for file in files)
    canonical: list[object] = [*parts, sorted(request.tags), specs]
    resources = (request.cpus, request.memory, request.gpus)
    if resources != (None, None, None):  # else the digest is that of versions that knew none
        canonical.append(resources)
    digest = hashlib.sha256(json.dumps(canonical).encode()).hexdigest()
    return _Key(request.user_id, request.idempotency_key, digest)


def submission_before(db: Database, key: _Key | None) -> Submission | None:
    """Return what an earlier request of the key made, if any; raises :class:`KeyReused`."""
    if key is None:
        return None
    row = db.execute(
        "SELECT content_sha256, job_id, service FROM idempotency JOIN job ON job.id = job_id"
        " WHERE idempotency.user_id = ? AND key = ? AND idempotency.created_at > steady_now() - ?",
        (key.user_id, key.text, KEY_SECONDS),
    ).fetchone()
    if row is None:
        return None
    if row[0] != key.content_sha256:
        raise KeyReused("Idempotency-Key: it was used for a request with other content")
    return Submission(JobIdentity(row[1], key.user_id, row[2]), is_repeated=True)


def remember_key(db: Database, key: _Key | None, job_id: int) -> None:
    """Remember what a request of this key made; None is no key."""
    if key is not None:
        db.execute(
            "INSERT OR REPLACE INTO idempotency"
            " (user_id, key, content_sha256, job_id, created_at)"
            " VALUES (?, ?, ?, ?, steady_now())",
            (key.user_id, key.text, key.content_sha256, job_id),
        )


def _insert_files(db: Database, job_id: int, files: Sequence[StoredFile]) -> None:
    db.executemany(
        "INSERT INTO blob (id, state, size, sha256) VALUES (?, 'sealed', ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET"
        " state = 'sealed', size = excluded.size, sha256 = excluded.sha256",
        ((file.blob_id, file.spec.size, file.spec.sha256) for file in files),
    )
    db.executemany(
        "INSERT INTO input_file (job_id, position, name, size, sha256, blob_id, crc32)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (job_id, *row, file.blob_id, checksum_of_row(row))
            for position, file in enumerate(files)
            for row in ((position, file.spec.name, file.spec.size, file.spec.sha256),)
        ),
    )


def _has_input(db: Database, job_id: int) -> bool:
    row = db.execute(
        "SELECT 1 FROM input_file WHERE job_id = ? AND blob_id IS NOT NULL", (job_id,)
    ).fetchone()
    return row is not None


def share_input(db: Database, source_id: int, job_id: int) -> None:
    """Give a job the input of another; raises :class:`InputGone`."""
    shared = db.execute(
        "INSERT INTO input_file (job_id, position, name, size, sha256, blob_id, crc32)"
        " SELECT ?, position, name, size, sha256, blob_id, crc32 FROM input_file"
        " WHERE job_id = ? AND blob_id IS NOT NULL",
        (job_id, source_id),
    ).rowcount
    if not shared:
        raise InputGone(f"the input of job {source_id} is no longer stored")


def request_of(db: Database, job_id: int) -> JobRequest | None:
    """Return what was asked for with a job, None if there is no such job."""
    row = db.execute(
        "SELECT user_id, service, name, priority, timeout, cpus, memory, gpus,"
        " needed_cpus, needed_memory, needed_gpus FROM job WHERE id = ?",
        (job_id,),
    ).fetchone()
    if row is None:
        return None
    tags = db.execute("SELECT key, value FROM tag WHERE job_id = ? ORDER BY key", (job_id,))
    user_id, service, name, priority, timeout, cpus, memory, gpus, *needed = row
    return JobRequest(
        *(user_id, service, name, priority, timeout, tuple(tags.fetchall())),
        cpus=cpus,
        memory=memory,
        gpus=gpus,
        resources=Resources(*needed),
    )
