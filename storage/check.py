"""Looking for damage in a database or a backup, also while a server runs on it.

What is compared: pages, references, the bytes of every stored file and piece of output, what the
submitter said, every line of history, and what is kept twice. What nothing tells of and so is not
seen is a change that leaves a message, the name of an agent or token, a key, a time of an agent
or a setting well-formed.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jobs import ACTIVE_STATES, FINAL_STATES, TRANSITIONS, JobState
from records import JobRequest
from storage.backup import Progress
from storage.blobs import CHUNK_INDEX_BITS
from storage.checksums import checksum_of_bytes, checksum_of_row
from storage.database import opened_by_command
from storage.schema import MIGRATIONS, damaged_objects, demand_ours
from storage.uploads import checksum_of_request

UNSEEN = (
    "not seen: well-formed changes of messages, exit codes, needs, usage, agents, tokens, keys,"
    " statistics, settings"
)
"""What ``check`` can't find, in a line."""

_MAX_PROBLEMS = 1000
_CHECKSUMS_SINCE = 3


def check(path: str, progress: Progress) -> list[str]:
    """Look for damage, on the state at the beginning; returns what was found, in sentences.

    Raises :class:`StoreRefused` if it is not a database of ours.
    """
    with opened_by_command(path) as db:
        db.text_factory = _text
        db.execute("PRAGMA query_only = ON")
        db.execute("BEGIN")
        demand_ours(db, path)
        problems = _said(_check_pages(db))
        if problems:
            return problems  # what a damaged b-tree says further is noise
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if not 1 <= version <= len(MIGRATIONS):
            return [f"its version is {version}; this program knows 1 to {len(MIGRATIONS)}"]
        has_checksums = version >= _CHECKSUMS_SINCE
        parts = [
            *([_check_schema(db, version)] if has_checksums else []),
            _check_values(db),
            _check_blobs(db, progress, has_checksums),
            _check_files(db),
            _check_output(db, has_checksums),
            _check_histories(db, has_checksums),
            _check_attempts(db),
            *([_check_requests(db), _check_counts(db)] if has_checksums else []),
        ]
        return [problem for part in parts for problem in _said(part)][:_MAX_PROBLEMS]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _said(problems: Iterator[str]) -> list[str]:
    """Return what a part of the check finds; where it can't go on, that is a problem, too."""
    found: list[str] = []
    try:
        for problem in problems:
            found.append(problem.encode("utf-8", "backslashreplace").decode())
            if len(found) >= _MAX_PROBLEMS:
                break
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        found.append(f"it can't be read: {error}")
    return found


def _check_pages(db: sqlite3.Connection) -> Iterator[str]:
    yield from (row[0] for row in db.execute("PRAGMA integrity_check") if row[0] != "ok")
    for table, row_id, parent, _ in db.execute("PRAGMA foreign_key_check"):
        yield f"row {row_id} of {table} refers to a missing {parent}"


def _check_schema(db: sqlite3.Connection, version: int) -> Iterator[str]:
    for name in damaged_objects(db, version):
        yield f"the schema is damaged: {name}"


# --- values -----------------------------------------------------------------------


_MALFORMED = {
    "a blob": "SELECT id FROM blob WHERE typeof(size) <> 'integer' OR size < 0 OR id < 1"
    " OR state NOT IN ('open', 'sealed', 'doomed')"
    " OR (state = 'sealed' AND (sha256 IS NULL OR length(sha256) <> 64"
    " OR sha256 GLOB '*[^0-9a-f]*'))",
    "a job": "SELECT id FROM job WHERE typeof(user_id) <> 'integer' OR typeof(service) <> 'text'"
    " OR typeof(message) <> 'text' OR typeof(priority) <> 'integer'"
    " OR typeof(attempts) <> 'integer' OR typeof(lost_starts) <> 'integer'"
    " OR lost_starts < 0 OR lost_starts > attempts"
    " OR typeof(created_at) <> 'real' OR typeof(changed_at) <> 'real'",
    "an input file of job": "SELECT job_id FROM input_file WHERE typeof(name) <> 'text'"
    " OR typeof(size) <> 'integer' OR typeof(sha256) <> 'text' OR position < 0",
    "an attempt": "SELECT id FROM attempt WHERE typeof(number) <> 'integer' OR number < 1"
    " OR typeof(exit_code) NOT IN ('integer', 'null')",
    "an agent": "SELECT id FROM agent WHERE typeof(name) <> 'text' OR typeof(seen_at) <> 'real'",
    "the history of job": "SELECT job_id FROM history WHERE typeof(at) <> 'real'"
    " OR typeof(attempt) <> 'integer' OR typeof(reason) <> 'text'",
}
_MALFORMED_SINCE_2 = {
    "a tag of job": "SELECT job_id FROM tag WHERE typeof(key) <> 'text' OR typeof(value) <> 'text'",
    "a key of job": "SELECT job_id FROM idempotency WHERE typeof(user_id) <> 'integer'"
    " OR length(content_sha256) <> 64 OR content_sha256 GLOB '*[^0-9a-f]*'"
    " OR typeof(created_at) <> 'real'",
    "a token": "SELECT name FROM token WHERE length(sha256) <> 64"
    " OR sha256 GLOB '*[^0-9a-f]*' OR role NOT IN ('read', 'submit', 'admin')"
    " OR typeof(user_id) NOT IN ('integer', 'null')",
    "the history of agent": "SELECT agent_id FROM agent_history WHERE typeof(at) <> 'real'"
    " OR kind NOT IN ('connected', 'disconnected', 'lost', 'draining', 'resumed')",
}


def _check_values(db: sqlite3.Connection) -> Iterator[str]:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    statements = _MALFORMED | (_MALFORMED_SINCE_2 if version >= 2 else {})
    for what, statement in statements.items():
        yield from (f"{what} {row[0]} is malformed" for row in db.execute(statement))
    for (name,) in db.execute("SELECT name FROM setting"):
        if not name.isascii() or not name.replace("_", "").isalnum():
            yield f"a setting has the name {name!r}"


# --- bytes ------------------------------------------------------------------------


def _check_blobs(db: sqlite3.Connection, progress: Progress, has_checksums: bool) -> Iterator[str]:
    total = db.execute("SELECT coalesce(sum(size), 0) FROM blob WHERE state = 'sealed'").fetchone()
    done = 0
    blobs = db.execute("SELECT id, size, sha256 FROM blob WHERE state = 'sealed' ORDER BY id")
    statement = _CHUNKS if has_checksums else _CHUNKS_WITHOUT_CHECKSUM
    for blob_id, size, expected in blobs.fetchall():
        digest, length = hashlib.sha256(), 0
        first = blob_id << CHUNK_INDEX_BITS
        last = first + (1 << CHUNK_INDEX_BITS) - 1
        for chunk_id, data, crc32 in db.execute(statement, (first, last)):
            content = data if isinstance(data, bytes) else b""
            if crc32 is not None and crc32 != checksum_of_bytes(chunk_id, content):
                yield f"chunk {chunk_id - first} of stored file {blob_id} has another checksum"
            digest.update(content)
            length += len(content)
            done += len(content)
            progress(done, total[0])
        if length != size or digest.hexdigest() != expected:
            yield f"stored file {blob_id} has other bytes than were stored ({length} of {size})"
    strays = db.execute(
        "SELECT DISTINCT chunk.id >> ? AS blob_id FROM chunk"
        " WHERE NOT EXISTS (SELECT 1 FROM blob WHERE blob.id = chunk.id >> ?)",
        (CHUNK_INDEX_BITS, CHUNK_INDEX_BITS),
    )
    yield from (f"there are bytes of file {row[0]}, which is not stored" for row in strays)


_CHUNKS = "SELECT id, data, crc32 FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id"
_CHUNKS_WITHOUT_CHECKSUM = "SELECT id, data, NULL FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id"

_FILE_PROBLEMS = {
    "job {} has an input file whose size or SHA-256 is not that of its bytes": (
        "SELECT job_id FROM input_file JOIN blob ON blob.id = blob_id"
        " WHERE blob.state <> 'sealed' OR blob.size <> input_file.size"
        " OR blob.sha256 <> input_file.sha256"
    ),
    "job {} is to run, but has no input": (
        "SELECT id FROM job WHERE state IN ('Queued', 'Processing', 'Submitted', 'Running')"
        " AND NOT EXISTS (SELECT 1 FROM input_file WHERE job_id = job.id)"
    ),
    "job {} is to run, but a file of it is gone": (
        "SELECT job.id FROM job JOIN input_file ON job_id = job.id"
        " LEFT JOIN blob ON blob.id = blob_id"
        " WHERE job.state IN ('Queued', 'Processing', 'Submitted', 'Running')"
        " AND blob.state IS NOT 'sealed'"
    ),
    "job {} is Completed, but has no result": (
        "SELECT id FROM job WHERE state = 'Completed' AND NOT EXISTS ("
        " SELECT 1 FROM attempt JOIN blob ON blob.id = attempt.result_blob"
        " WHERE attempt.id = job.attempt_id AND blob.state = 'sealed')"
    ),
    "stored file {} belongs to no job": (
        "SELECT id FROM blob WHERE state = 'sealed'"
        " AND NOT EXISTS (SELECT 1 FROM input_file WHERE blob_id = blob.id)"
        " AND NOT EXISTS (SELECT 1 FROM attempt WHERE result_blob = blob.id)"
    ),
    "stored file {} is both an input and a result, or the result of two attempts": (
        "SELECT result_blob FROM attempt WHERE result_blob IS NOT NULL"
        " AND result_blob IN (SELECT blob_id FROM input_file)"
        " UNION ALL SELECT result_blob FROM attempt WHERE result_blob IS NOT NULL"
        " GROUP BY result_blob HAVING count(*) > 1"
    ),
    "job {} was cleaned, but has files": (
        "SELECT job.id FROM job WHERE state = 'Cleaned' AND (EXISTS (SELECT 1 FROM input_file"
        " WHERE job_id = job.id AND blob_id IS NOT NULL) OR EXISTS (SELECT 1 FROM attempt"
        " WHERE job_id = job.id AND result_blob IS NOT NULL))"
    ),
}


def _check_files(db: sqlite3.Connection) -> Iterator[str]:
    for words, statement in _FILE_PROBLEMS.items():
        yield from (words.format(row[0]) for row in db.execute(statement))


def _check_output(db: sqlite3.Connection, has_checksums: bool) -> Iterator[str]:
    if not has_checksums:
        return
    end: dict[tuple[int, int], int] = {}
    rows = db.execute(
        "SELECT attempt_id, stream, start, data, crc32 FROM output"
        " ORDER BY attempt_id, stream, start"
    )
    for attempt_id, stream, start, data, crc32 in rows:
        content = data if isinstance(data, bytes) else b""
        is_whole = crc32 is None or crc32 == checksum_of_bytes(start, content)
        if not is_whole or not content or stream not in (2, 3, 5, 6):
            yield f"the output of attempt {attempt_id} is damaged at {start}"
        if start < end.get((attempt_id, stream), 0):
            yield f"the output of attempt {attempt_id} is stored twice at {start}"
        end[attempt_id, stream] = start + len(content)


# --- jobs -------------------------------------------------------------------------


@dataclass(slots=True)
class _Told:
    """What a job's lines of history say of it so far."""

    state: JobState | None = None
    created_at: float | None = None
    changed_at: float | None = None
    finished_at: float | None = None
    attempts: int = 0


def _check_histories(db: sqlite3.Connection, has_checksums: bool) -> Iterator[str]:
    told: dict[int, _Told] = {}
    rows = db.execute(_HISTORY if has_checksums else _HISTORY_WITHOUT_CHECKSUM)
    for job_id, attempt, at, before, after, reason, crc32 in rows:
        if crc32 is not None and crc32 != checksum_of_row(
            (job_id, attempt, at, before, after, reason)
        ):
            yield f"a line of the history of job {job_id} has another checksum"
        job = told.setdefault(job_id, _Told())
        if problem := _follow(job, attempt, at, before, after):
            yield f"job {job_id} {problem}"
    for job_id, found in db.execute("SELECT id, state FROM job"):
        state = told.get(job_id, _Told()).state
        if found != state:
            yield f"job {job_id} is {found}, but its history ends with {state}"
    if not has_checksums:
        return
    jobs = db.execute("SELECT id, created_at, changed_at, finished_at, attempts FROM job")
    for job_id, *row in jobs:
        job = told.get(job_id, _Told())
        if row != [job.created_at, job.changed_at, job.finished_at, job.attempts]:
            yield f"job {job_id} has other times or attempts than its history tells"


def _follow(job: _Told, attempt: Any, at: Any, before: Any, after: Any) -> str | None:
    """Take in a line of history; returns what is wrong with it, if anything."""
    allowed = frozenset({JobState.QUEUED}) if job.state is None else TRANSITIONS[job.state]
    known = None if job.state is None else job.state.value
    problem = None
    if after not in [state.value for state in JobState]:
        return f"went to a state that is none: {after!r}"
    if known != before or after not in allowed:
        problem = f"went from {known} to {after}, which can't be"
    job.state = JobState(after)
    job.created_at = at if job.created_at is None else job.created_at
    job.changed_at = at
    if job.state in FINAL_STATES:
        job.finished_at = at
    job.attempts += job.state is JobState.PROCESSING
    if attempt != job.attempts:
        problem = problem or f"is at attempt {job.attempts}, but its history says {attempt}"
    return problem


_HISTORY = (
    "SELECT job_id, attempt, at, from_state, to_state, reason, crc32 FROM history ORDER BY id"
)
_HISTORY_WITHOUT_CHECKSUM = (
    "SELECT job_id, attempt, at, from_state, to_state, reason, NULL FROM history ORDER BY id"
)


def _check_attempts(db: sqlite3.Connection) -> Iterator[str]:
    active = [state.value for state in ACTIVE_STATES]
    rows = db.execute(
        "SELECT job.id, job.state, job.attempts, attempt_id, attempt.job_id, number,"
        " (SELECT count(*) FROM attempt WHERE job_id = job.id)"
        " FROM job LEFT JOIN attempt ON attempt.id = job.attempt_id"
    )
    for job_id, state, attempts, attempt_id, attempt_of, number, count in rows:
        if count != attempts:
            yield f"job {job_id} had {attempts} attempts, but {count} are stored"
        if attempt_id is None:
            is_right = state not in active
        else:
            is_right = (attempt_of, number) == (job_id, attempts) and state != "Queued"
        if not is_right:
            yield f"job {job_id} is {state} with an attempt that is not its last"


def _check_requests(db: sqlite3.Connection) -> Iterator[str]:
    tags: dict[int, list[tuple[str, str]]] = {}
    for job_id, key, value in db.execute("SELECT job_id, key, value FROM tag"):
        tags.setdefault(job_id, []).append((key, value))
    jobs = db.execute(
        "SELECT id, crc32, created_at, user_id, service, name, priority, timeout, cpus, memory,"
        " gpus, state, outcome, aged_from FROM job"
    )
    for job_id, crc32, created_at, *said, cpus, memory, gpus, state, outcome, aged_from in jobs:
        user_id, service, name, priority, timeout = said
        request = JobRequest(
            *(user_id, service, name, priority, timeout, tuple(tags.get(job_id, ()))),
            cpus=cpus,
            memory=memory,
            gpus=gpus,
        )
        if crc32 is not None and crc32 != checksum_of_request(job_id, request, created_at):
            yield f"job {job_id} is not what was submitted"
        has_ended = state in FINAL_STATES
        if (has_ended and outcome != state) or (outcome is None) != (aged_from is None):
            yield f"job {job_id} is {state}, but its outcome is {outcome}"
    files = db.execute(
        "SELECT job_id, crc32, position, name, size, sha256 FROM input_file WHERE crc32 IS NOT NULL"
    )
    for job_id, crc32, *row in files:
        if crc32 != checksum_of_row(row):
            yield f"an input file of job {job_id} is not what was submitted"


def _check_counts(db: sqlite3.Connection) -> Iterator[str]:
    def counted(statement: str) -> dict[Sequence[Any], int]:
        return {tuple(key): jobs for *key, jobs in db.execute(statement)}

    kept = counted("SELECT user_id, state, service, jobs FROM job_count WHERE jobs <> 0")
    found = counted(
        "SELECT user_id, state, service, count(*) FROM job GROUP BY user_id, state, service"
    )
    for key in sorted(kept.keys() | found.keys(), key=str):
        if kept.get(key) != found.get(key):
            user_id, state, service = key
            yield (
                f"user {user_id} has {found.get(key, 0)} jobs {state} for {service},"
                f" counted were {kept.get(key, 0)}"
            )
