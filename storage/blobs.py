"""Blobs: bytes as rows of fixed-size chunks.

A blob is ``open`` while it is written, ``sealed`` once a job refers to it, ``doomed`` when
it waits to be erased chunk by chunk. What is open when the server starts was cut short by a
crash and is doomed, except the partial result of an attempt that may still go on.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from archive.reader import ENDING_BYTES, has_whole_ending
from jobs import FileSpec
from records import ResultMismatch, StoreDamaged, StoredFile, StoredResult
from storage.checksums import checksum_of_bytes
from storage.database import Database
from storage.file import DatabaseFile
from telemetry.logs import event
from wire.frames import CHUNK_BYTES, READ_BYTES
from wire.messages import Finished

log = logging.getLogger("orchestrator.store")

_ERASE_BYTES = 4 * 1024 * 1024
_ERASE_BLOBS = 512
_PAGE_BYTES = 8192
SMALL_BYTES = 64 * 1024
"""What is read along with the row that refers to it, to save the hop; within one chunk."""
CHUNK_INDEX_BITS = 20  # 2**20 chunks of 256 KiB: blobs up to 256 GiB


class Blobs:
    """The stored bytes: reading them, and keeping the eraser from what is read."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._ids: Iterator[int] = iter(())
        self._pinned: Counter[int] = Counter()
        self._abandoned: set[int] = set()
        self.to_erase = asyncio.Event()
        """For the eraser: there may be something doomed."""

    def begin(self, db: Database) -> None:
        """For the start: doom what a crash cut short, and learn which ids are free."""
        doom_what_a_crash_cut_short(db)
        first = db.execute("SELECT coalesce(max(id), 0) + 1 FROM blob").fetchone()[0]
        self._ids = itertools.count(int(first))
        self.to_erase.set()

    def next_id(self) -> int:
        """Return an id that no blob has."""
        return next(self._ids)

    async def result_of_job(self, job_id: int) -> StoredResult | None:
        """Return what an ended job left, whole, None if there is nothing.

        A small one comes with its content: to read that alone would be another hop.
        """
        rows = await self._file.rows(
            "SELECT blob.id, blob.size, blob.sha256, chunk.id, chunk.data, chunk.crc32"
            " FROM job JOIN attempt ON attempt.id = job.attempt_id"
            " JOIN blob ON blob.id = attempt.result_blob"
            " LEFT JOIN chunk ON chunk.id = blob.id << ? AND blob.size <= ?"
            " WHERE job.id = ? AND blob.state = 'sealed'",
            (CHUNK_INDEX_BITS, SMALL_BYTES, job_id),
        )
        if not rows:
            return None
        blob_id, size, sha256, chunk_id, data, crc32 = rows[0]
        content = None if chunk_id is None else _checked(chunk_id, data, crc32)
        if content is not None and hashlib.sha256(content).hexdigest() != sha256:
            raise StoreDamaged(f"the result of job {job_id} is damaged")
        return StoredResult(blob_id, size, sha256, content)

    async def input_of_job(self, job_id: int) -> tuple[StoredFile, ...]:
        """Return a job's input in upload order; nothing once it has been removed."""
        rows = await self._file.rows(
            "SELECT name, size, sha256, blob_id FROM input_file"
            " WHERE job_id = ? AND blob_id IS NOT NULL ORDER BY position",
            (job_id,),
        )
        return tuple(StoredFile(FileSpec(*row[:3]), row[3]) for row in rows)

    async def read(self, blob_id: int, offset: int, size: int) -> list[bytes]:
        """Return ``size`` bytes from ``offset`` on, all within the blob, in one hop.

        They come in the pieces in which they are stored, not copied. Raises
        :class:`StoreDamaged` if they are not what was stored.
        """
        return await self._file.read_bulk(lambda db: read_blob(db, blob_id, offset, size))

    async def read_files(self, files: Sequence[StoredFile], offset: int) -> bytes:
        """Return some of the files' bytes, taken as one stream, from ``offset`` on."""
        return await self._file.read_bulk(lambda db: read_stream(db, files, offset))

    @contextmanager
    def pinned(self, blob_id: int) -> Iterator[None]:
        """Keep the eraser from a blob while it is read."""
        self._pinned[blob_id] += 1
        try:
            yield
        finally:
            self._pinned[blob_id] -= 1
            if not self._pinned[blob_id]:
                del self._pinned[blob_id]
                self.to_erase.set()

    def abandon(self, blob_ids: set[int]) -> None:
        """Have blobs erased that no job will ever refer to."""
        if blob_ids:
            self._abandoned |= blob_ids
            self.to_erase.set()

    async def doom_abandoned(self) -> None:
        """For the eraser: doom what :meth:`abandon` was told."""
        abandoned = frozenset(self._abandoned)
        if abandoned:
            await self._file.write(lambda db: _doom_open(db, abandoned))
            self._abandoned -= abandoned

    def erase_some(self, db: Database) -> bool:
        """For the eraser: erase some doomed blobs, or a part of a large one.

        Returns whether there was any. What one step erases is bounded, so that what is to be
        written waits for it for some ten milliseconds at most.
        """
        rows = db.execute("SELECT id FROM blob WHERE state = 'doomed' ORDER BY id")
        doomed = islice((row[0] for row in rows if row[0] not in self._pinned), _ERASE_BLOBS)
        room = _ERASE_BYTES
        for blob_id in list(doomed):
            room -= _erase_chunks(db, blob_id, room)
            if room <= 0:
                break
        return room < _ERASE_BYTES


def _erase_chunks(db: Database, blob_id: int, room: int) -> int:
    """Erase chunks of a blob until ``room`` is used up, and it with its last; returns the bytes.

    A small chunk counts as the page that it takes.
    """
    erased = 0
    first = blob_id << CHUNK_INDEX_BITS
    last = first + (1 << CHUNK_INDEX_BITS) - 1
    chunks = db.execute(
        "SELECT id, length(data) FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id", (first, last)
    )
    for chunk_id, size in chunks.fetchmany(_ERASE_BYTES // CHUNK_BYTES + 1):
        if erased >= room:
            return erased
        db.execute("DELETE FROM chunk WHERE id = ?", (chunk_id,))
        erased += max(size, _PAGE_BYTES)
    if db.execute("SELECT 1 FROM chunk WHERE id BETWEEN ? AND ?", (first, last)).fetchone() is None:
        db.execute("DELETE FROM blob WHERE id = ?", (blob_id,))
    return max(erased, _PAGE_BYTES)


# --- states of blobs --------------------------------------------------------------


def doom_what_a_crash_cut_short(db: Database) -> None:
    """Doom every open blob but the partial results that may still grow."""
    doomed = db.execute(
        """UPDATE blob SET state = 'doomed' WHERE state = 'open' AND NOT EXISTS (
               SELECT 1 FROM attempt
               JOIN job ON job.id = attempt.job_id AND job.attempt_id = attempt.id
               WHERE attempt.result_blob = blob.id
                 AND job.state IN ('Processing', 'Submitted', 'Running', 'Killed'))"""
    ).rowcount
    if doomed:
        event(log, "unfinished_blobs_doomed", count=doomed)


def open_blob(db: Database, blob_id: int) -> None:
    """Make an empty blob; does nothing if it exists."""
    db.execute(
        "INSERT INTO blob (id, state, size) VALUES (?, 'open', 0) ON CONFLICT DO NOTHING",
        (blob_id,),
    )


def _doom_open(db: Database, blob_ids: frozenset[int]) -> None:
    db.executemany(
        "UPDATE blob SET state = 'doomed' WHERE id = ? AND state = 'open'",
        ((blob_id,) for blob_id in blob_ids),
    )


def doom_files_of_job(db: Database, job_id: int) -> None:
    """Doom a job's input, unless another job shares it, and what all its attempts left."""
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id IN (SELECT blob_id FROM input_file WHERE job_id = ?1) AND NOT EXISTS"
        " (SELECT 1 FROM input_file WHERE blob_id = blob.id AND job_id <> ?1)",
        (job_id,),
    )
    db.execute("UPDATE input_file SET blob_id = NULL WHERE job_id = ?", (job_id,))
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id IN (SELECT result_blob FROM attempt WHERE job_id = ?)",
        (job_id,),
    )
    db.execute("UPDATE attempt SET result_blob = NULL WHERE job_id = ?", (job_id,))


# --- results of attempts ----------------------------------------------------------


def has_result(db: Database, attempt_id: int) -> bool:
    """Whether a whole result of the attempt is stored."""
    row = db.execute(
        "SELECT 1 FROM attempt JOIN blob ON blob.id = attempt.result_blob"
        " WHERE attempt.id = ? AND blob.state = 'sealed'",
        (attempt_id,),
    ).fetchone()
    return row is not None


def drop_partial_result(db: Database, attempt_id: int) -> None:
    """Doom what has arrived of an attempt's result."""
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id = (SELECT result_blob FROM attempt WHERE id = ?)",
        (attempt_id,),
    )
    db.execute("UPDATE attempt SET result_blob = NULL WHERE id = ?", (attempt_id,))


def seal_result(db: Database, blob_id: int, size: int, report: Finished) -> None:
    """End the result of ``size`` bytes that an attempt reports.

    Raises :class:`ResultMismatch` if it has another length or does not end as a whole ZIP does.
    """
    if size != report.result_size:
        raise ResultMismatch(f"attempt {report.attempt_id}: not {report.result_size} bytes")
    length = min(size, ENDING_BYTES)
    if not has_whole_ending(b"".join(read_blob(db, blob_id, size - length, length)), size):
        raise ResultMismatch(f"attempt {report.attempt_id}: the result is no whole archive")
    db.execute(
        "UPDATE blob SET state = 'sealed', size = ?, sha256 = ? WHERE id = ?",
        (size, report.result_sha256, blob_id),
    )


# --- chunks -----------------------------------------------------------------------


def insert_chunks(
    db: Database, blob_id: int, first: int, chunks: Sequence[bytes | memoryview]
) -> None:
    """Write chunks of a blob, the first one at index ``first``."""
    base = blob_id << CHUNK_INDEX_BITS
    db.executemany(
        "INSERT INTO chunk (id, data, crc32) VALUES (?, ?, ?)",
        (
            (chunk_id, chunk, checksum_of_bytes(chunk_id, chunk))
            for chunk_id, chunk in enumerate(chunks, start=base + first)
        ),
    )


def read_blob(db: Database, blob_id: int, offset: int, size: int) -> list[bytes]:
    """Return a part of a blob in the pieces in which it is stored."""
    if size == 0:
        return []
    first, within = divmod(offset, CHUNK_BYTES)
    last = (offset + size - 1) // CHUNK_BYTES
    base = blob_id << CHUNK_INDEX_BITS
    rows = db.execute(
        "SELECT id, data, crc32 FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id",
        (base + first, base + last),
    )
    pieces = [_checked(*row) for row in rows]
    excess = sum(map(len, pieces)) - within - size
    if excess < 0:
        raise StoreDamaged(f"blob {blob_id} has not {size} bytes at {offset}")
    pieces[-1] = pieces[-1][: len(pieces[-1]) - excess]
    pieces[0] = pieces[0][within:]
    return pieces


def _checked(chunk_id: int, data: object, crc32: int | None) -> bytes:
    """Return a chunk's bytes if they are those that were stored; raises :class:`StoreDamaged`."""
    if not isinstance(data, bytes) or (
        crc32 is not None and crc32 != checksum_of_bytes(chunk_id, data)
    ):
        blob_id, index = divmod(chunk_id, 1 << CHUNK_INDEX_BITS)
        raise StoreDamaged(f"chunk {index} of blob {blob_id} is damaged")
    return data


def read_stream(db: Database, files: Sequence[StoredFile], offset: int) -> bytes:
    """Return the next of the files' bytes, taken as one stream, from ``offset``."""
    pieces: list[bytes] = []
    room = READ_BYTES
    for file in files:
        size = min(max(0, file.spec.size - offset), room)
        pieces += read_blob(db, file.blob_id, offset, size)
        offset = max(0, offset - file.spec.size)
        room -= size
        if room == 0:
            break
    return b"".join(pieces)
