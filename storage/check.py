"""Looking for damage in a database or a backup, also while a server runs on it."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator

from jobs import TRANSITIONS, JobState
from storage.backup import Progress
from storage.blobs import CHUNK_INDEX_BITS
from storage.database import opened_by_command
from storage.schema import demand_ours


def check(path: str, progress: Progress) -> list[str]:
    """Look for damage: pages, references, the SHA-256 of every stored file, every history.

    Works beside a running server, on the state at its beginning. Returns what was found, in
    sentences; raises :class:`StoreRefused` if it is not a database of ours.
    """
    with opened_by_command(path) as db:
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")
        demand_ours(db, path)
        problems = [row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [
            f"row {row[1]} of {row[0]} refers to a missing {row[2]}"
            for row in db.execute("PRAGMA foreign_key_check")
        ]
        if problems:
            return problems  # what a damaged b-tree says further is noise
        return [
            *_check_blobs(db, progress),
            *_check_histories(db),
            *_check_results(db),
            *_check_queue_lengths(db),
        ]


def _check_blobs(db: sqlite3.Connection, progress: Progress) -> Iterator[str]:
    total = db.execute("SELECT coalesce(sum(size), 0) FROM blob WHERE state = 'sealed'").fetchone()
    done = 0
    blobs = db.execute("SELECT id, size, sha256 FROM blob WHERE state = 'sealed' ORDER BY id")
    for blob_id, size, expected in blobs.fetchall():
        digest, length = hashlib.sha256(), 0
        first = blob_id << CHUNK_INDEX_BITS
        chunks = db.execute(
            "SELECT data FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id",
            (first, first + (1 << CHUNK_INDEX_BITS) - 1),
        )
        for (data,) in chunks:
            digest.update(data)
            length += len(data)
            done += len(data)
            progress(done, total[0])
        if length != size or digest.hexdigest() != expected:
            yield f"stored file {blob_id} has other bytes than were stored ({length} of {size})"


def _check_histories(db: sqlite3.Connection) -> Iterator[str]:
    last: dict[int, JobState] = {}
    rows = db.execute("SELECT job_id, from_state, to_state FROM history ORDER BY id")
    for job_id, before, after in rows:
        known = last.get(job_id)
        allowed = {JobState.QUEUED} if known is None else TRANSITIONS[known]
        if (known and known.value) != before or after not in allowed:
            yield f"job {job_id} went from {known} to {after}, which can't be"
        last[job_id] = JobState(after)
    for job_id, state in db.execute("SELECT id, state FROM job"):
        if last.get(job_id) != state:
            yield f"job {job_id} is {state}, but its history ends with {last.get(job_id)}"


def _check_results(db: sqlite3.Connection) -> Iterator[str]:
    without_result = db.execute(
        "SELECT id FROM job WHERE state = 'Completed' AND NOT EXISTS ("
        " SELECT 1 FROM attempt JOIN blob ON blob.id = attempt.result_blob"
        " WHERE attempt.id = job.attempt_id AND blob.state = 'sealed')"
    )
    yield from (f"job {row[0]} is Completed, but has no result" for row in without_result)
    without_input = db.execute(
        "SELECT id FROM job WHERE state IN ('Queued', 'Processing', 'Submitted', 'Running')"
        " AND NOT EXISTS (SELECT 1 FROM input_file WHERE job_id = job.id)"
    )
    yield from (f"job {row[0]} is to run, but has no input" for row in without_input)
    lost_input = db.execute(
        "SELECT job.id, input_file.name FROM job JOIN input_file ON job_id = job.id"
        " LEFT JOIN blob ON blob.id = blob_id"
        " WHERE job.state IN ('Queued', 'Processing', 'Submitted', 'Running')"
        " AND blob.state IS NOT 'sealed'"
    )
    yield from (f"job {row[0]} is to run, but its file {row[1]} is gone" for row in lost_input)


def _check_queue_lengths(db: sqlite3.Connection) -> Iterator[str]:
    if db.execute("PRAGMA user_version").fetchone()[0] < 2:
        return  # a backup of an older version, which kept no such number
    noted = dict(db.execute("SELECT user_id, jobs FROM queue_length WHERE jobs <> 0"))
    counted = dict(
        db.execute("SELECT user_id, count(*) FROM job WHERE state = 'Queued' GROUP BY user_id")
    )
    for user_id in sorted(noted.keys() | counted.keys()):
        if noted.get(user_id) != counted.get(user_id):
            yield (
                f"user {user_id} has {counted.get(user_id, 0)} queued jobs,"
                f" noted are {noted.get(user_id, 0)}"
            )
