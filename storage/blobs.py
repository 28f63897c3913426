"""Statements on blobs: bytes as rows of fixed-size chunks.

A blob is ``open`` while it is written, ``sealed`` once a job refers to it, ``doomed`` when
it waits to be erased chunk by chunk. What is open when the server starts was cut short by a
crash and is doomed, except the partial result of an attempt that may still go on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

from jobs import FileSpec
from records import ResultMismatch, StoredFile
from storage.database import Database, StoreUnavailable
from wire.frames import CHUNK_BYTES, READ_BYTES
from wire.messages import Finished

log = logging.getLogger("orchestrator.store")

ERASE_CHUNKS = 16
LITTLE_BYTES = 64 * 1024
"""What is read along with the row that refers to it, to save the hop; within one chunk."""
CHUNK_INDEX_BITS = 20  # 2**20 chunks of 256 KiB: blobs up to 256 GiB


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
        log.info("event=unfinished_blobs_doomed count=%d", doomed)


def first_free_blob_id(db: Database) -> int:
    """Return an id above that of every blob."""
    return int(db.execute("SELECT coalesce(max(id), 0) + 1 FROM blob").fetchone()[0])


def has_result(db: Database, attempt_id: int) -> bool:
    """Whether a whole result of the attempt is stored."""
    row = db.execute(
        "SELECT 1 FROM attempt JOIN blob ON blob.id = attempt.result_blob"
        " WHERE attempt.id = ? AND blob.state = 'sealed'",
        (attempt_id,),
    ).fetchone()
    return row is not None


def goes_with_short(size: int) -> bool:
    """Whether so many bytes are written with the short operations: what fits into one chunk."""
    return size <= CHUNK_BYTES


def insert_chunks(
    db: Database, blob_id: int, first: int, chunks: Sequence[bytes | memoryview]
) -> None:
    """Write chunks of a blob, the first one at index ``first``."""
    base = blob_id << CHUNK_INDEX_BITS
    db.executemany(
        "INSERT INTO chunk (id, data) VALUES (?, ?)",
        ((base + index, chunk) for index, chunk in enumerate(chunks, start=first)),
    )


def open_blob(db: Database, blob_id: int) -> None:
    """Make an empty blob; does nothing if it is there."""
    db.execute(
        "INSERT INTO blob (id, state, size) VALUES (?, 'open', 0) ON CONFLICT DO NOTHING",
        (blob_id,),
    )


def drop_partial_result(db: Database, attempt_id: int) -> None:
    """Doom what has arrived of an attempt's result."""
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id = (SELECT result_blob FROM attempt WHERE id = ?)",
        (attempt_id,),
    )
    db.execute("UPDATE attempt SET result_blob = NULL WHERE id = ?", (attempt_id,))


def files_of(db: Database, attempt_id: int) -> tuple[StoredFile, ...]:
    """Return the input of an attempt's job, in upload order."""
    rows = db.execute(
        "SELECT name, size, sha256, blob_id FROM input_file"
        " WHERE job_id = (SELECT job_id FROM attempt WHERE id = ?) ORDER BY position",
        (attempt_id,),
    )
    return tuple(StoredFile(FileSpec(row[0], row[1], row[2]), row[3]) for row in rows)


def seal_result(db: Database, report: Finished) -> None:
    """End an attempt's result; raises :class:`ResultMismatch` if it has another length."""
    sealed = db.execute(
        "UPDATE blob SET state = 'sealed', sha256 = ?"
        " WHERE id = (SELECT result_blob FROM attempt WHERE id = ?) AND size = ?",
        (report.result_sha256, report.attempt_id, report.result_size),
    ).rowcount
    if sealed != 1:
        raise ResultMismatch(f"attempt {report.attempt_id}: not {report.result_size} bytes")


def read_stream(db: Database, files: Sequence[StoredFile], offset: int) -> bytes:
    """Return the next of the files' bytes, taken as one stream, from ``offset``."""
    parts: list[bytes] = []
    room = READ_BYTES
    for file in files:
        if offset >= file.spec.size:
            offset -= file.spec.size
            continue
        while offset < file.spec.size and room > 0:
            part = _read_part(db, file.blob_id, offset)[:room]
            parts.append(part)
            offset += len(part)
            room -= len(part)
        if room == 0:
            break
        offset = 0
    return b"".join(parts)


def _read_part(db: Database, blob_id: int, offset: int) -> bytes:
    index, within = divmod(offset, CHUNK_BYTES)
    row = db.execute(
        "SELECT data FROM chunk WHERE id = ?", ((blob_id << CHUNK_INDEX_BITS) + index,)
    ).fetchone()
    if row is None:
        raise StoreUnavailable(f"blob {blob_id} has no chunk {index}")
    return cast(bytes, row[0][within:])


def doom_blobs(db: Database, blob_ids: frozenset[int]) -> None:
    """Doom those of the blobs that are still open."""
    db.executemany(
        "UPDATE blob SET state = 'doomed' WHERE id = ? AND state = 'open'",
        ((blob_id,) for blob_id in blob_ids),
    )
