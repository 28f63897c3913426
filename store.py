"""Durable state: the schema, every statement on it, blob streams.

One connection writes, with group commit (``database.py``). Readers have connections of
their own and never wait for the writer (WAL). What a commit brought about is published
on the store's feed once it is on the disk.

Bytes live in *blobs*: rows of fixed-size chunks. A blob is ``open`` while it is
written, ``sealed`` once a job refers to it, ``doomed`` when it waits to be erased
chunk by chunk. What is open when the server starts was cut short by a crash and is
doomed, except the partial result of an attempt that may still go on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import hashlib
import itertools
import json
import logging
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import metrics
from access import Role, Token
from database import (
    BUSY_SECONDS,
    HOW_TO_MAKE_WRITABLE,
    Connection,
    Database,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    Writer,
    checkpoint,
    connect,
    in_one_snapshot,
    lock_file,
    prepare_connection,
    prepare_reader,
    translated,
    vacuum_some,
)
from events import AgentChange, AgentChangeKind, Feed, Output, Transition
from protocol import (
    ACTIVE_STATES,
    CHUNK_BYTES,
    FINAL_STATES,
    LIVE_STREAMS,
    TRANSITIONS,
    FileSpec,
    Finished,
    JobState,
    Stream,
)

log = logging.getLogger("orchestrator.store")

T = TypeVar("T")

APPLICATION_ID = 0x4F524348  # "ORCH", so that another program's file is not taken for ours

_PAGE_BYTES = 8192
_READERS = 3
_FLUSH_BYTES = 1024 * 1024
_ERASE_CHUNKS = 16
_OUTPUT_ROW_BYTES = 64 * 1024
_OUTPUT_GROWING_BYTES = 8 * 1024  # a row grows to about a page, which is written as a whole anyway
_OUTPUT_ROWS = 8
_LIVE_BYTES = 1024 * 1024
_CLEAN_JOBS = 100
_FORGET_KEYS = 1000
_KEY_SECONDS = 24 * 3600.0
POSITION_LIMIT = 10_000
"""How far :meth:`Store.queue_position` counts: about a millisecond."""

_CHUNK_INDEX_BITS = 20  # 2**20 chunks of 256 KiB: blobs up to 256 GiB
_RETRY_SECONDS = 1.0
_RESERVE_BYTES = 64 * 1024 * 1024
_RESERVE_SHARE = 0.1

# Statements, not a script: sqlite3's executescript() commits before it runs, and a
# migration must be one transaction.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE setting (
            name TEXT PRIMARY KEY,
            value TEXT NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE blob (
            id INTEGER PRIMARY KEY,
            state TEXT NOT NULL CHECK (state IN ('open', 'sealed', 'doomed')),
            size INTEGER NOT NULL,
            sha256 TEXT
        )""",
        "CREATE INDEX blob_unsealed ON blob (state, id) WHERE state IN ('open', 'doomed')",
        # id = blob id * 2**20 + index: one b-tree, in the order in which it is read
        "CREATE TABLE chunk (id INTEGER PRIMARY KEY, data BLOB NOT NULL)",
        """CREATE TABLE agent (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            seen_at REAL NOT NULL
        ) WITHOUT ROWID""",
        """CREATE TABLE job (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            user_id INTEGER NOT NULL,
            service TEXT NOT NULL,
            state TEXT NOT NULL,
            message TEXT NOT NULL,
            priority INTEGER NOT NULL DEFAULT 0,
            attempt_id INTEGER REFERENCES attempt (id),
            attempts INTEGER NOT NULL DEFAULT 0,
            lost_starts INTEGER NOT NULL DEFAULT 0,
            created_at REAL NOT NULL,
            changed_at REAL NOT NULL
        )""",
        "CREATE INDEX job_queued ON job (id) WHERE state = 'Queued'",
        """CREATE INDEX job_active ON job (id)
            WHERE state IN ('Processing', 'Submitted', 'Running')""",
        """CREATE INDEX job_final ON job (changed_at)
            WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')""",
        """CREATE TABLE input_file (
            job_id INTEGER NOT NULL REFERENCES job (id),
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            size INTEGER NOT NULL,
            sha256 TEXT NOT NULL,
            blob_id INTEGER REFERENCES blob (id),
            PRIMARY KEY (job_id, position),
            UNIQUE (job_id, name)
        ) WITHOUT ROWID""",
        "CREATE INDEX input_file_blob ON input_file (blob_id)",
        """CREATE TABLE attempt (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            number INTEGER NOT NULL,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            exit_code INTEGER,
            result_blob INTEGER REFERENCES blob (id),
            UNIQUE (job_id, number)
        )""",
        "CREATE INDEX attempt_result ON attempt (result_blob) WHERE result_blob IS NOT NULL",
        """CREATE TABLE history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            job_id INTEGER NOT NULL REFERENCES job (id),
            attempt INTEGER NOT NULL,
            at REAL NOT NULL,
            from_state TEXT,
            to_state TEXT NOT NULL,
            reason TEXT NOT NULL
        )""",
        "CREATE INDEX history_job ON history (job_id, id)",
        """CREATE TRIGGER history_is_not_changed BEFORE UPDATE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END""",
        """CREATE TRIGGER history_is_not_deleted BEFORE DELETE ON history
            BEGIN SELECT raise(ABORT, 'history is append-only'); END""",
    ),
    (
        "ALTER TABLE job ADD COLUMN name TEXT NOT NULL DEFAULT ''",
        # seconds that the submitter asked for; NULL: the service's limit alone
        "ALTER TABLE job ADD COLUMN timeout INTEGER",
        "ALTER TABLE job ADD COLUMN started_at REAL",
        "ALTER TABLE job ADD COLUMN finished_at REAL",
        """UPDATE job SET
            started_at = (SELECT max(at) FROM history
                          WHERE job_id = job.id AND to_state = 'Running'),
            finished_at = (SELECT max(at) FROM history WHERE job_id = job.id
                           AND to_state IN ('Completed', 'Failed', 'Invalid', 'Killed'))
            WHERE state NOT IN ('Queued', 'Processing', 'Submitted')""",
        # each line (service, user) in the order in which it is served
        "DROP INDEX job_queued",
        """CREATE INDEX job_queued ON job (service, user_id, priority DESC, id)
            WHERE state = 'Queued'""",
        # a partial index serves a query only if the query repeats its condition word for word
        # (sqlite.org/partialindex.html), so one for both states served neither
        "DROP INDEX blob_unsealed",
        "CREATE INDEX blob_open ON blob (id) WHERE state = 'open'",
        "CREATE INDEX blob_doomed ON blob (id) WHERE state = 'doomed'",
        "CREATE INDEX job_user ON job (user_id, id)",
        "CREATE INDEX job_service ON job (service, id)",
        "CREATE INDEX job_created ON job (created_at)",
        "CREATE INDEX job_waiting ON job (id) WHERE state = 'Queued'",
        """CREATE INDEX job_unsuccessful ON job (id)
            WHERE state IN ('Failed', 'Invalid', 'Killed')""",
        """CREATE TABLE tag (
            job_id INTEGER NOT NULL REFERENCES job (id),
            key TEXT NOT NULL,
            value TEXT NOT NULL,
            PRIMARY KEY (job_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX tag_search ON tag (key, value, job_id)",
        # what a client called its request, so that the same one again makes no second job
        """CREATE TABLE idempotency (
            user_id INTEGER NOT NULL,
            key TEXT NOT NULL,
            content_sha256 TEXT NOT NULL,
            job_id INTEGER NOT NULL REFERENCES job (id),
            created_at REAL NOT NULL,
            PRIMARY KEY (user_id, key)
        ) WITHOUT ROWID""",
        "CREATE INDEX idempotency_age ON idempotency (created_at)",
        # how many jobs of each user wait: asked at every upload, too many to be counted then
        """CREATE TABLE queue_length (
            user_id INTEGER PRIMARY KEY,
            jobs INTEGER NOT NULL
        )""",
        """INSERT INTO queue_length (user_id, jobs)
            SELECT user_id, count(*) FROM job WHERE state = 'Queued' GROUP BY user_id""",
        """CREATE TRIGGER queue_gains_a_new_job AFTER INSERT ON job WHEN NEW.state = 'Queued'
            BEGIN INSERT INTO queue_length (user_id, jobs) VALUES (NEW.user_id, 1)
                ON CONFLICT (user_id) DO UPDATE SET jobs = jobs + 1; END""",
        """CREATE TRIGGER queue_gains_a_job_again AFTER UPDATE OF state ON job
            WHEN NEW.state = 'Queued' AND OLD.state <> 'Queued'
            BEGIN INSERT INTO queue_length (user_id, jobs) VALUES (NEW.user_id, 1)
                ON CONFLICT (user_id) DO UPDATE SET jobs = jobs + 1; END""",
        """CREATE TRIGGER queue_loses_a_job AFTER UPDATE OF state ON job
            WHEN OLD.state = 'Queued' AND NEW.state <> 'Queued'
            BEGIN UPDATE queue_length SET jobs = jobs - 1 WHERE user_id = NEW.user_id; END""",
        # live output; start: where the piece stands in what the process wrote (gaps are allowed)
        """CREATE TABLE output (
            attempt_id INTEGER NOT NULL REFERENCES attempt (id),
            stream INTEGER NOT NULL,
            start INTEGER NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (attempt_id, stream, start)
        )""",
        # its output waits to be erased
        "ALTER TABLE attempt ADD COLUMN is_output_doomed INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX attempt_output_doomed ON attempt (id) WHERE is_output_doomed = 1",
        "ALTER TABLE agent ADD COLUMN is_drained INTEGER NOT NULL DEFAULT 0",
        """CREATE TABLE agent_history (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            agent_id TEXT NOT NULL REFERENCES agent (id),
            name TEXT NOT NULL,
            at REAL NOT NULL,
            kind TEXT NOT NULL
        )""",
        """CREATE TABLE token (
            name TEXT PRIMARY KEY,
            sha256 TEXT NOT NULL UNIQUE,
            user_id INTEGER,
            role TEXT NOT NULL,
            created_at REAL NOT NULL
        ) WITHOUT ROWID""",
    ),
)


# --- errors -----------------------------------------------------------------------


class Superseded(StoreError):
    """The attempt is not the current one of its job, or the job has ended without it."""


class IllegalTransition(StoreError):
    """A change of state that the transition table does not allow."""


class KeyReused(StoreError):
    """The idempotency key stands for another request of this user."""


class QueueFull(StoreError):
    """The user has as many jobs in line as allowed."""


class InputGone(StoreError):
    """The job's input is not stored any more."""


class ResultMismatch(StoreError):
    """A result's bytes do not have the length or the SHA-256 that the agent announced."""


# --- records ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a user sees of a job."""

    id: int
    state: JobState
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """The jobs of one user that wait for one service: highest priority first, then lowest id."""

    service: str
    user_id: int


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """A job and the line in which it waits, or waited."""

    id: int
    user_id: int
    service: str

    @property
    def line(self) -> Line:
        """Where it waits."""
        return Line(self.service, self.user_id)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a submitter asks for, beside the files.

    ``priority`` orders the jobs of the user, the highest first. ``timeout`` in seconds, None
    for the service's limit alone. ``tags`` are pairs of key and value, each key once.
    ``idempotency_key`` names the request, so that it can be repeated without a second job.
    """

    user_id: int
    service: str
    name: str = ""
    priority: int = 0
    timeout: int | None = None
    tags: tuple[tuple[str, str], ...] = ()
    idempotency_key: str | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """The job that a request brought about, now or (``is_repeated``) when it came before."""

    job: QueuedJob
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that an agent holds: the agent, the attempt and how far it is."""

    job: QueuedJob
    attempt_id: int
    number: int
    agent_id: str
    agent_name: str
    state: JobState


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One input file of a job and the blob that holds its bytes."""

    spec: FileSpec
    blob_id: int


class Loss(enum.Enum):
    """How an attempt was lost, which decides whether it counts against the allowed number."""

    AGENT_AWAY = "the agent is gone; counts only if the job may have started"
    REPORTED = "the agent tried and could not go on; counts always"


@dataclass(frozen=True, slots=True)
class Assignment:
    """A new attempt: its job, its id, its number within the job (fencing token), its input.

    ``timeout`` is what the submitter asked for, in seconds.
    """

    job: QueuedJob
    attempt_id: int
    number: int
    timeout: int | None
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A whole result archive; ``size`` in bytes."""

    blob_id: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class KnownAgent:
    """An agent that was here once."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class JobTimes:
    """When a job came, when its last attempt started (None: it never did), when it ended."""

    service: str
    created_at: float
    started_at: float | None
    finished_at: float


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are asked for; None and empty mean any.

    ``states`` are alternatives, all ``tags`` (key, value) must be there, ``agent`` is the
    name of one that had an attempt, ``since`` is the earliest creation in Unix seconds,
    ``text`` stands in the message, in upper or lower case (of ASCII letters).
    """

    user_id: int | None = None
    service: str | None = None
    states: frozenset[JobState] = frozenset()
    agent: str | None = None
    since: float | None = None
    text: str | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job in a list. Times in Unix seconds; attempt and agent are the current or last ones."""

    id: int
    state: JobState
    message: str
    user_id: int
    service: str
    name: str
    priority: int
    timeout: int | None
    created_at: float
    changed_at: float
    started_at: float | None
    finished_at: float | None
    attempt_id: int | None
    agent: str | None
    tags: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of the jobs asked for, newest first; older ones may follow before ``next_before``."""

    jobs: tuple[JobSummary, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt as told afterwards. Times in Unix seconds, None for what has not happened.

    ``outcome`` is the state to which the end of the attempt brought the job: Queued if it was
    lost.
    """

    id: int
    number: int
    agent: str
    exit_code: int | None
    assigned_at: float | None
    started_at: float | None
    ended_at: float | None
    outcome: JobState | None
    message: str


@dataclass(frozen=True, slots=True)
class JobDetails:
    """All that is known of a job but its history."""

    summary: JobSummary
    attempts: tuple[AttemptRecord, ...]
    files: tuple[FileSpec, ...]
    result: StoredResult | None


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """Bytes that stand at ``start`` in what a process wrote to a stream."""

    stream: Stream
    start: int
    data: bytes

    def after(self, position: int) -> OutputPiece:
        """Return what of it lies at or after a position."""
        skipped = min(max(0, position - self.start), len(self.data))
        return OutputPiece(self.stream, self.start + skipped, self.data[skipped:])


@dataclass(frozen=True, slots=True)
class NewOutput:
    """Output to be added; of a stream with more than ``limit`` bytes the middle is not kept."""

    pieces: tuple[OutputPiece, ...]
    limit: int

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return sum(len(piece.data) for piece in self.pieces)


NO_OUTPUT = NewOutput((), 0)


@dataclass(frozen=True, slots=True)
class Writing:
    """A job as the source of output: state, present attempt (None: none) and its number."""

    state: JobState
    attempt_id: int | None
    attempt: int


@dataclass(frozen=True, slots=True)
class _Job:
    id: int
    user_id: int
    service: str
    state: JobState
    attempts: int
    lost_starts: int


# --- opening ----------------------------------------------------------------------


def _migrate(db: Database) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    is_new = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if not is_new and application != APPLICATION_ID:
        raise StoreRefused("the file is a database of another program")
    if version > len(MIGRATIONS):
        raise StoreRefused(
            f"the file has version {version}, written by a newer Orchestrator;"
            f" this one knows up to {len(MIGRATIONS)}: upgrade it, or use another file"
        )
    if is_new:
        # both take effect only before the first page is written
        db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("BEGIN EXCLUSIVE")
    try:
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            log.info("event=migrated version=%d", number)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _active_job_of(row: Sequence[Any]) -> ActiveJob:
    return ActiveJob(QueuedJob(*row[:3]), row[3], row[4], row[5], row[6], JobState(row[7]))


def _doom_what_a_crash_cut_short(db: Database) -> None:
    doomed = db.execute(
        """UPDATE blob SET state = 'doomed' WHERE state = 'open' AND NOT EXISTS (
               SELECT 1 FROM attempt
               JOIN job ON job.id = attempt.job_id AND job.attempt_id = attempt.id
               WHERE attempt.result_blob = blob.id
                 AND job.state IN ('Processing', 'Submitted', 'Running', 'Killed'))"""
    ).rowcount
    if doomed:
        log.info("event=unfinished_blobs_doomed count=%d", doomed)


def _ensure_setting(db: Database, name: str, value: str) -> None:
    db.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value)
    )


def _first_free_blob_id(db: Database) -> int:
    return int(db.execute("SELECT coalesce(max(id), 0) + 1 FROM blob").fetchone()[0])


@contextmanager
def _tokens_beside(path: str) -> Iterator[sqlite3.Connection]:
    """Open a database for its tokens, also while a server runs on it."""
    if not os.path.exists(path):
        raise StoreRefused(f"{path}: no such file; start the server once to create it")
    with translated(), closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as db:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID or version != len(MIGRATIONS):
            raise StoreRefused(f"{path}: start this version of the server on it once")
        db.execute("PRAGMA synchronous = FULL")
        with db:
            yield db


def create_token(path: str, token: Token, sha256: str) -> None:
    """Store an API token by the digest of its secret. Raises :class:`StoreRefused`."""
    try:
        with _tokens_beside(path) as db:
            db.execute(
                "INSERT INTO token (name, sha256, user_id, role, created_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (token.name, sha256, token.user_id, token.role, token.created_at),
            )
    except sqlite3.IntegrityError:
        raise StoreRefused(f"there is a token {token.name} already; revoke it first") from None


def list_tokens(path: str) -> list[Token]:
    """Return the API tokens of a database, by name. Raises :class:`StoreRefused`."""
    with _tokens_beside(path) as db:
        return list(_tokens_by_digest(db).values())


def revoke_token(path: str, name: str) -> None:
    """Remove an API token. Raises :class:`StoreRefused` if there is none of that name."""
    with _tokens_beside(path) as db:
        if not db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount:
            raise StoreRefused(f"there is no token {name}")


def _tokens_by_digest(db: sqlite3.Connection) -> dict[str, Token]:
    rows = db.execute("SELECT sha256, name, role, user_id, created_at FROM token ORDER BY name")
    return {row[0]: Token(row[1], Role(row[2]), row[3], row[4]) for row in rows}


def read_agent_token(path: str) -> str:
    """Return the agent token of the database at ``path``, also while a server runs on it.

    Raises :class:`StoreRefused` when there is no such database or no token in it.
    """
    if not os.path.exists(path):
        raise StoreRefused(f"{path}: no such file; start the server once to create it")
    try:
        with translated():
            db = sqlite3.connect(path, timeout=BUSY_SECONDS)
            try:
                row = db.execute("SELECT value FROM setting WHERE name = 'agent_token'").fetchone()
            finally:
                db.close()
    except (StoreUnavailable, sqlite3.OperationalError) as error:
        raise StoreRefused(f"{path}: {error}") from None
    if row is None:
        raise StoreRefused(f"{path}: there is no agent token in it")
    return str(row[0])


# --- operations that several methods share ----------------------------------------


def _transition(db: Database, job: _Job, after: JobState, reason: str) -> None:
    """Change a job's state and write its history; the caller sees to ``message``."""
    if after not in TRANSITIONS[job.state]:
        raise IllegalTransition(f"job {job.id}: {job.state} can't become {after}")
    now = time.time()
    # fetched to its end: only then is the statement done
    ((created_at, started_at),) = db.execute(_SET_STATE[after], (after, now, job.id)).fetchall()
    line = _write_history(db, job, now, job.state, after, reason)
    db.announce(dataclasses.replace(line, created_at=created_at, started_at=started_at))


_SET_STATE: Mapping[JobState, str] = {
    **dict.fromkeys(
        JobState,
        "UPDATE job SET state = ?1, changed_at = ?2 WHERE id = ?3 RETURNING created_at, started_at",
    ),
    JobState.RUNNING: (
        "UPDATE job SET state = ?1, changed_at = ?2, started_at = ?2 WHERE id = ?3"
        " RETURNING created_at, started_at"
    ),
    JobState.QUEUED: (
        "UPDATE job SET state = ?1, changed_at = ?2, started_at = NULL WHERE id = ?3"
        " RETURNING created_at, started_at"
    ),
    **dict.fromkeys(
        FINAL_STATES,
        "UPDATE job SET state = ?1, changed_at = ?2, finished_at = ?2 WHERE id = ?3"
        " RETURNING created_at, started_at",
    ),
}
"""How each state is entered; the times of a job are those of its last attempt."""


def _write_history(
    db: Database, job: _Job, at: float, before: JobState | None, after: JobState, reason: str
) -> Transition:
    row_id = db.execute(
        "INSERT INTO history (job_id, attempt, at, from_state, to_state, reason)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (job.id, job.attempts, at, before, after, reason),
    ).lastrowid
    return Transition(
        cast(int, row_id),
        job.id,
        job.user_id,
        job.service,
        job.attempts,
        at,
        before,
        after,
        reason,
    )


def _write_agent_change(db: Database, agent_id: str, name: str, kind: AgentChangeKind) -> None:
    at = time.time()
    row_id = db.execute(
        "INSERT INTO agent_history (agent_id, name, at, kind) VALUES (?, ?, ?, ?)",
        (agent_id, name, at, kind),
    ).lastrowid
    db.announce(AgentChange(cast(int, row_id), agent_id, name, at, kind))


def _set_message(db: Database, job_id: int, message: str) -> None:
    db.execute("UPDATE job SET message = ? WHERE id = ?", (message, job_id))


def _job_of_attempt(db: Database, attempt_id: int) -> _Job:
    """Return the job whose current attempt this is; raises :class:`Superseded`."""
    row = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
        " WHERE id = (SELECT job_id FROM attempt WHERE id = ?) AND attempt_id = ?",
        (attempt_id, attempt_id),
    ).fetchone()
    if row is None:
        raise Superseded(f"attempt {attempt_id} was superseded")
    return _job_of(row)


def _first_of_line(db: Database, line: Line) -> _Job | None:
    row = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
        " WHERE state = 'Queued' AND service = ? AND user_id = ?"
        " ORDER BY priority DESC, id LIMIT 1",
        (line.service, line.user_id),
    ).fetchone()
    return None if row is None else _job_of(row)


def _job_with_id(db: Database, job_id: int) -> _Job:
    """Return a job that is known to be there."""
    row = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts FROM job WHERE id = ?",
        (job_id,),
    ).fetchone()
    return _job_of(row)


def _job_of(row: Sequence[Any]) -> _Job:
    return _Job(row[0], row[1], row[2], JobState(row[3]), row[4], row[5])


def _active_job_of_attempt(db: Database, attempt_id: int) -> _Job:
    job = _job_of_attempt(db, attempt_id)
    if job.state not in ACTIVE_STATES:
        raise Superseded(f"attempt {attempt_id}: its job is {job.state} already")
    return job


def _receiving_job_of_attempt(db: Database, attempt_id: int) -> _Job:
    """Return the job if this attempt may deliver: it is active, or killed without a result yet."""
    job = _job_of_attempt(db, attempt_id)
    if job.state is JobState.KILLED and not _has_result(db, attempt_id):
        return job
    return _active_job_of_attempt(db, attempt_id)


def _has_result(db: Database, attempt_id: int) -> bool:
    row = db.execute(
        "SELECT 1 FROM attempt JOIN blob ON blob.id = attempt.result_blob"
        " WHERE attempt.id = ? AND blob.state = 'sealed'",
        (attempt_id,),
    ).fetchone()
    return row is not None


def _insert_chunks(db: Database, blob_id: int, first: int, chunks: Sequence[bytes]) -> None:
    base = blob_id << _CHUNK_INDEX_BITS
    db.executemany(
        "INSERT INTO chunk (id, data) VALUES (?, ?)",
        ((base + index, chunk) for index, chunk in enumerate(chunks, start=first)),
    )


def _open_blob(db: Database, blob_id: int) -> None:
    db.execute(
        "INSERT INTO blob (id, state, size) VALUES (?, 'open', 0) ON CONFLICT DO NOTHING",
        (blob_id,),
    )


def _drop_partial_result(db: Database, attempt_id: int) -> None:
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id = (SELECT result_blob FROM attempt WHERE id = ?)",
        (attempt_id,),
    )
    db.execute("UPDATE attempt SET result_blob = NULL WHERE id = ?", (attempt_id,))


def _doom_output(db: Database, job_id: int) -> None:
    """Have the output of all attempts of a job erased."""
    db.execute(
        "UPDATE attempt SET is_output_doomed = 1 WHERE job_id = ?"
        " AND EXISTS (SELECT 1 FROM output WHERE attempt_id = attempt.id)",
        (job_id,),
    )


def _add_output(db: Database, job: _Job, attempt_id: int, output: NewOutput) -> None:
    for piece in output.pieces:
        _add_piece(db, attempt_id, piece, output.limit)
        # a follower cuts off what it has, as is done here
        stream = _STREAM_OF_LIVE.get(piece.stream, piece.stream)
        db.announce(Output(job.id, job.attempts, stream, piece.start, piece.data))


_STREAM_OF_LIVE = {live: stream for stream, live in LIVE_STREAMS.items()}


def _add_piece(db: Database, attempt_id: int, piece: OutputPiece, limit: int) -> None:
    row = db.execute(
        "SELECT start, length(data) FROM output WHERE attempt_id = ? AND stream = ?"
        " ORDER BY start DESC LIMIT 1",
        (attempt_id, piece.stream),
    ).fetchone()
    last_start, last_length = row or (0, 0)
    end = last_start + last_length
    data = piece.data[max(0, end - piece.start) :]  # without what is repeated
    start = piece.start + len(piece.data) - len(data)
    if row and start == end and last_length + len(data) <= _OUTPUT_GROWING_BYTES:
        key = (attempt_id, piece.stream, last_start)
        data = _take_row(db, key) + data
        start = last_start
    # what stands before the half is never removed
    half = 0 if piece.stream in _STREAM_OF_LIVE else limit // 2
    kept = min(_LIVE_BYTES, limit) if piece.stream in _STREAM_OF_LIVE else limit - half
    while data:
        # no row on both sides of the half
        length = min(_OUTPUT_ROW_BYTES, half - start if start < half else len(data))
        db.execute(
            "INSERT INTO output (attempt_id, stream, start, data) VALUES (?, ?, ?, ?)",
            (attempt_id, piece.stream, start, data[:length]),
        )
        data, start = data[length:], start + length
    db.execute(
        "DELETE FROM output WHERE attempt_id = ? AND stream = ?"
        " AND start >= ? AND start + length(data) <= ?",
        (attempt_id, piece.stream, half, start - kept),
    )


def _drop_live_output(db: Database, attempt_id: int) -> None:
    db.executemany(
        "DELETE FROM output WHERE attempt_id = ? AND stream = ?",
        ((attempt_id, stream) for stream in _STREAM_OF_LIVE),
    )


def _take_row(db: Database, key: tuple[int, int, int]) -> bytes:
    row = db.execute(
        "SELECT data FROM output WHERE attempt_id = ? AND stream = ? AND start = ?", key
    ).fetchone()
    db.execute("DELETE FROM output WHERE attempt_id = ? AND stream = ? AND start = ?", key)
    return cast(bytes, row[0])


def _doom_files_of(db: Database, job_id: int) -> None:
    # a rerun shares the input of its job
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
    _doom_output(db, job_id)


# --- uploads ----------------------------------------------------------------------


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
    data: bytes


class Upload:
    """The files of a job while they arrive. End it with :meth:`commit` or :meth:`abandon`.

    Holds at most about 3 MiB in memory: one flush is written while the next is gathered.
    A small upload never touches the disk before its commit.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: _OpenFile | None = None
        self._files: list[StoredFile] = []
        self._pending: list[_PendingChunk] = []
        self._pending_bytes = 0
        self._flushing: asyncio.Future[None] | None = None
        self._flushed: set[int] = set()

    def start_file(self, name: str) -> None:
        """Begin the next file; the one before must have been finished."""
        assert self._file is None
        blob_id = self._store.next_blob_id()
        self._file = _OpenFile(name, blob_id, 0, 0, bytearray(), hashlib.sha256())

    async def write(self, data: bytes) -> None:
        """Add bytes to the file; waits while too much is on its way to the disk."""
        file = self._file
        assert file is not None
        file.digest.update(data)
        file.size += len(data)
        file.buffer += data
        while len(file.buffer) >= CHUNK_BYTES:
            self._cut_chunk(file, bytes(file.buffer[:CHUNK_BYTES]))
            del file.buffer[:CHUNK_BYTES]
        if self._pending_bytes >= _FLUSH_BYTES:
            await self._flush()

    async def finish_file(self) -> None:
        """End the file."""
        file = self._file
        assert file is not None
        if file.buffer:
            self._cut_chunk(file, bytes(file.buffer))
        spec = FileSpec(file.name, file.size, file.digest.hexdigest())
        self._files.append(StoredFile(spec, file.blob_id))
        self._file = None
        if self._pending_bytes >= _FLUSH_BYTES:
            await self._flush()

    async def commit(self, request: JobRequest, message: str, queue_limit: int) -> Submission:
        """Make the job; when this returns, it and all its bytes are on the disk.

        A repeated request gets the job that it made before, and its bytes are not kept.
        Raises :class:`KeyReused`, and :class:`QueueFull` when ``queue_limit`` jobs of the user
        are in line.
        """
        await self._settle()
        files, pending = tuple(self._files), self._take_pending()
        key = _key_of(request, files)

        def operation(db: Database) -> Submission:
            # decided here, in the one writer: two at the same moment can't both be the first
            if repeated := _submission_before(db, key):
                return repeated
            _check_queue(db, request.user_id, queue_limit)
            _write_pending(db, pending)
            job = _insert_job(db, request, message, "uploaded")
            _insert_files(db, job.id, files)
            _note_key(db, key, job.id)
            return Submission(job)

        weight = sum(len(chunk.data) for chunk in pending)
        submission = await self._store.write_bytes(operation, weight)
        if not submission.is_repeated:
            self._flushed.clear()
            self._store.uploaded_bytes.add(sum(file.spec.size for file in files))
        return submission

    async def abandon(self) -> None:
        """Leave nothing behind; does nothing after a commit that made a job."""
        self._pending.clear()
        try:
            await self._settle()
        except StoreError as error:
            log.info("event=upload_flush_failed error=%r", str(error))
        self._store.erase_later(self._flushed)

    def _cut_chunk(self, file: _OpenFile, data: bytes) -> None:
        self._pending.append(_PendingChunk(file.blob_id, file.chunks, data))
        self._pending_bytes += len(data)
        file.chunks += 1

    def _take_pending(self) -> list[_PendingChunk]:
        pending, self._pending, self._pending_bytes = self._pending, [], 0
        return pending

    async def _settle(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            await flushing

    async def _flush(self) -> None:
        await self._settle()
        pending, weight = self._pending, self._pending_bytes
        self._take_pending()
        self._flushed.update(chunk.blob_id for chunk in pending)
        write = self._store.write_bytes(lambda db: _write_pending(db, pending), weight)
        self._flushing = asyncio.ensure_future(write)


def _write_pending(db: Database, pending: Sequence[_PendingChunk]) -> None:
    for chunk in pending:
        if chunk.index == 0:
            _open_blob(db, chunk.blob_id)
        _insert_chunks(db, chunk.blob_id, chunk.index, [chunk.data])


def _insert_job(db: Database, request: JobRequest, message: str, reason: str) -> QueuedJob:
    now = time.time()
    cursor = db.execute(
        "INSERT INTO job (user_id, service, name, priority, timeout, state, message,"
        " created_at, changed_at) VALUES (?, ?, ?, ?, ?, 'Queued', ?, ?, ?)",
        (
            *(request.user_id, request.service, request.name, request.priority, request.timeout),
            *(message, now, now),
        ),
    )
    job_id = cast(int, cursor.lastrowid)
    db.executemany(
        "INSERT INTO tag (job_id, key, value) VALUES (?, ?, ?)",
        ((job_id, key, value) for key, value in request.tags),
    )
    job = _Job(job_id, request.user_id, request.service, JobState.QUEUED, 0, 0)
    line = _write_history(db, job, now, None, JobState.QUEUED, reason)
    db.announce(dataclasses.replace(line, created_at=now))
    return QueuedJob(job_id, request.user_id, request.service)


def _check_queue(db: Database, user_id: int, limit: int) -> None:
    row = db.execute("SELECT jobs FROM queue_length WHERE user_id = ?", (user_id,)).fetchone()
    if row is not None and row[0] >= limit:
        raise QueueFull(f"user {user_id} has {row[0]} jobs in line, which is the limit")


@dataclass(frozen=True, slots=True)
class _Key:
    """An idempotency key and a digest of all that makes two requests of it the same."""

    user_id: int
    text: str
    content_sha256: str


def _key_of(
    request: JobRequest, files: Sequence[StoredFile], source_id: int | None = None
) -> _Key | None:
    """Return the key of a request if it has one; the order of files and tags does not matter."""
    if request.idempotency_key is None:
        return None
    parts = (source_id, request.service, request.name, request.priority, request.timeout)
    specs = sorted((file.spec.name, file.spec.size, file.spec.sha256) for file in files)
    canonical = json.dumps([*parts, sorted(request.tags), specs])
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    return _Key(request.user_id, request.idempotency_key, digest)


def _submission_before(db: Database, key: _Key | None) -> Submission | None:
    """Return what an earlier request of the key made, if any; raises :class:`KeyReused`."""
    if key is None:
        return None
    row = db.execute(
        "SELECT content_sha256, job_id, service FROM idempotency JOIN job ON job.id = job_id"
        " WHERE idempotency.user_id = ? AND key = ? AND idempotency.created_at > ?",
        (key.user_id, key.text, time.time() - _KEY_SECONDS),
    ).fetchone()
    if row is None:
        return None
    if row[0] != key.content_sha256:
        raise KeyReused("Idempotency-Key: it was used for a request with other content")
    return Submission(QueuedJob(row[1], key.user_id, row[2]), is_repeated=True)


def _note_key(db: Database, key: _Key | None, job_id: int) -> None:
    if key is not None:
        db.execute(
            "INSERT OR REPLACE INTO idempotency"
            " (user_id, key, content_sha256, job_id, created_at) VALUES (?, ?, ?, ?, ?)",
            (key.user_id, key.text, key.content_sha256, job_id, time.time()),
        )


def _insert_files(db: Database, job_id: int, files: Sequence[StoredFile]) -> None:
    db.executemany(
        "INSERT INTO blob (id, state, size, sha256) VALUES (?, 'sealed', ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET"
        " state = 'sealed', size = excluded.size, sha256 = excluded.sha256",
        ((file.blob_id, file.spec.size, file.spec.sha256) for file in files),
    )
    db.executemany(
        "INSERT INTO input_file (job_id, position, name, size, sha256, blob_id)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            (job_id, position, file.spec.name, file.spec.size, file.spec.sha256, file.blob_id)
            for position, file in enumerate(files)
        ),
    )


def _share_input(db: Database, source_id: int, job_id: int) -> None:
    """Give a job the input of another; raises :class:`InputGone`."""
    shared = db.execute(
        "INSERT INTO input_file (job_id, position, name, size, sha256, blob_id)"
        " SELECT ?, position, name, size, sha256, blob_id FROM input_file"
        " WHERE job_id = ? AND blob_id IS NOT NULL",
        (job_id, source_id),
    ).rowcount
    if not shared:
        raise InputGone(f"the input of job {source_id} was removed by retention")


def _request_of(db: Database, job_id: int) -> JobRequest | None:
    row = db.execute(
        "SELECT user_id, service, name, priority, timeout FROM job WHERE id = ?", (job_id,)
    ).fetchone()
    if row is None:
        return None
    tags = db.execute("SELECT key, value FROM tag WHERE job_id = ? ORDER BY key", (job_id,))
    user_id, service, name, priority, timeout = row
    return JobRequest(user_id, service, name, priority, timeout, tuple(tags.fetchall()))


# --- the store --------------------------------------------------------------------


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _advice(error: StoreError) -> str:
    """Say what to do about a file that can't be opened."""
    match getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                "; put the last backup in its place (README, Backup), or see what is damaged"
                " with 'orchestrator.py check FILE'"
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "; " + HOW_TO_MAKE_WRITABLE
        case sqlite3.SQLITE_FULL:
            return "; free some space there"
    return ""


class Store:
    """The durable state of one server. Make it with :meth:`open`; run :meth:`run` beside it.

    Every method that changes something returns once the change is committed and synced,
    and raises :class:`StoreFull` or :class:`StoreUnavailable` when it could not be. ``feed``
    tells of every transition once it is committed.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.feed = Feed()
        self.uploaded_bytes = metrics.Counter(
            "orchestrator_uploaded_bytes_total", "Bytes of the files of jobs that were taken in."
        )
        self._result_bytes = metrics.Counter(
            "orchestrator_result_bytes_total", "Bytes of results that agents delivered."
        )
        self._path = path
        self._lock = lock
        self._connections: list[Connection] = []
        self._idle_readers: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._writer: Writer
        self._blob_ids: Iterator[int]
        self._pinned: Counter[int] = Counter()
        self._orphans: set[int] = set()
        self._erase_wake = asyncio.Event()
        self._may_have_free_pages = True  # a crash may have come between erasing and vacuum

    @classmethod
    async def open(cls, path: str) -> Store:
        """Lock, migrate and tidy the file. Raises :class:`StoreRefused` if it can't be used."""
        store = cls(path, lock_file(path))
        try:
            with translated():
                await store._set_up()
        except (StoreRefused, StoreUnavailable, StoreFull) as error:
            await store.close()
            raise StoreRefused(f"{path}: {error}{_advice(error)}") from error
        except BaseException:
            await store.close()
            raise
        return store

    async def _set_up(self) -> None:
        connection = await connect(self._path)
        self._connections.append(connection)
        await connection.call(prepare_connection)
        await connection.call(_migrate)
        await connection.call(_doom_what_a_crash_cut_short)
        token = secrets.token_urlsafe(32)
        await connection.call(lambda db: _ensure_setting(db, "agent_token", token))
        await connection.call(lambda db: _ensure_setting(db, "probe", ""))
        self._blob_ids = itertools.count(await connection.call(_first_free_blob_id))
        self._writer = Writer(connection, self.feed.publish)
        for _ in range(_READERS):
            reader = await connect(self._path)
            self._connections.append(reader)
            await reader.call(prepare_reader)
            self._idle_readers.put_nowait(reader)
        self._erase_wake.set()

    async def run(self) -> None:
        """The store's background work: group commit and erasing. Ends by cancellation only."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._writer.run(), name="store writer")
            tasks.create_task(self._erase_for_ever(), name="store eraser")

    async def close(self) -> None:
        """Close all connections, then the lock; the store can't be used after."""
        while self._connections:
            await self._connections.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def write_bytes(self, operation: Callable[[Database], T], size: int) -> T:
        """Write ``size`` bytes of files or results, unless that would use up the reserve.

        The reserve is what transitions, erasing and retention need when nothing else may be
        written any more: deleting takes space too, in the WAL.
        """
        self._check_room(size)
        # what fits into one chunk goes with the short operations
        return await self._writer.write(operation, size if size > CHUNK_BYTES else 0)

    def _check_room(self, size: int) -> None:
        volume = os.statvfs(self._path)
        reserve = min(_RESERVE_BYTES, _RESERVE_SHARE * volume.f_blocks * volume.f_frsize)
        # bytes stand in the WAL and, after the checkpoint, in the file; what is in the WAL now
        # will make the file grow, too
        needed = reserve + 2 * size + self._wal_size()
        if volume.f_bavail * volume.f_frsize < needed:
            raise StoreFull("the disk that holds the database is full")

    def _wal_size(self) -> int:
        return _size_of(f"{self._path}-wal")

    def next_blob_id(self) -> int:
        """For :class:`Upload`: an id that no blob has."""
        return next(self._blob_ids)

    def erase_later(self, blob_ids: set[int]) -> None:
        """For :class:`Upload`: blobs that no job will ever refer to."""
        if blob_ids:
            self._orphans |= blob_ids
            self._erase_wake.set()

    async def _read(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
    ) -> list[Any]:
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: db.execute(sql, parameters).fetchall())

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Connection]:
        reader = await self._idle_readers.get()
        try:
            yield reader
        finally:
            self._idle_readers.put_nowait(reader)

    # --- settings and health

    async def agent_token(self) -> str:
        """Return the token that the database was given when it was made."""
        rows = await self._read("SELECT value FROM setting WHERE name = 'agent_token'")
        return str(rows[0][0])

    async def tokens(self) -> Mapping[str, Token]:
        """Return all API tokens, by the digests of their secrets."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(_tokens_by_digest)

    async def probe(self) -> None:
        """Write something durably, to know whether that works and whether jobs can be taken."""
        self._check_room(0)
        stamp = str(time.time())
        await self._writer.write(
            lambda db: db.execute("UPDATE setting SET value = ? WHERE name = 'probe'", (stamp,))
        )

    def families(self) -> tuple[metrics.Family, ...]:
        """Return what there is to tell of the file, of commits and of bytes that came in."""
        return (
            metrics.gauge("orchestrator_database_bytes", "Size of the file.", _size_of(self._path)),
            metrics.gauge(
                "orchestrator_wal_bytes", "Size of the write-ahead log.", self._wal_size()
            ),
            self._writer.batch_sizes.family(),
            self._writer.commit_seconds.family(),
            self.uploaded_bytes.family(),
            self._result_bytes.family(),
        )

    # --- jobs

    def new_upload(self) -> Upload:
        """Begin to take in the files of a new job."""
        return Upload(self)

    async def job_status(self, job_id: int) -> JobStatus | None:
        """Return a job's state and message, None if there is no such job."""
        rows = await self._read("SELECT id, state, message FROM job WHERE id = ?", (job_id,))
        return JobStatus(rows[0][0], JobState(rows[0][1]), rows[0][2]) if rows else None

    async def owner_of(self, job_id: int) -> int | None:
        """Return the user of a job, None if there is no such job."""
        rows = await self._read("SELECT user_id FROM job WHERE id = ?", (job_id,))
        return int(rows[0][0]) if rows else None

    async def history(self, job_id: int) -> list[Transition]:
        """Return all transitions of a job, oldest first."""
        return [_transition_of(row) for row in await self._read(_HISTORY, (job_id,))]

    async def transitions_after(self, last_id: int, limit: int) -> list[Transition]:
        """Return the transitions of all jobs that follow one, oldest first."""
        rows = await self._read(
            "SELECT history.id, job_id, user_id, service, attempt, at, from_state, to_state, reason"
            " FROM history JOIN job ON job.id = history.job_id"
            " WHERE history.id > ? ORDER BY history.id LIMIT ?",
            (last_id, limit),
        )
        return [_transition_of(row) for row in rows]

    async def last_event_ids(self) -> tuple[int, int]:
        """Return the ids of the last transition and the last agent change, 0 for none."""
        rows = await self._read(
            "SELECT (SELECT coalesce(max(id), 0) FROM history),"
            " (SELECT coalesce(max(id), 0) FROM agent_history)"
        )
        return (rows[0][0], rows[0][1])

    async def find_jobs(self, wanted: JobFilter, before: int | None, limit: int) -> JobPage:
        """Return the newest jobs of those asked for whose id is below ``before`` (None: any).

        Looks at a bounded number of jobs, so a page may hold few or none and yet have a next.
        """
        top = _LARGEST_ID if before is None else before
        async with self._reader() as reader:
            with translated():
                return await reader.call(
                    in_one_snapshot(lambda db: _find_jobs(db, wanted, top, limit))
                )

    async def job_details(self, job_id: int) -> JobDetails | None:
        """Return all that is known of a job but its history, None if there is no such job."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(in_one_snapshot(lambda db: _job_details(db, job_id)))

    async def job_request(self, job_id: int) -> JobRequest | None:
        """Return what the submitter of a job asked for, None if there is no such job."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: _request_of(db, job_id))

    async def rerun(
        self, source_id: int, request: JobRequest, message: str, queue_limit: int
    ) -> Submission:
        """Make a job from ``request`` and the stored input of another, which both then share.

        Raises :class:`InputGone` if that is not there any more, and as :meth:`Upload.commit`.
        """
        key = _key_of(request, (), source_id)

        def operation(db: Database) -> Submission:
            if repeated := _submission_before(db, key):
                return repeated
            _check_queue(db, request.user_id, queue_limit)
            job = _insert_job(db, request, message, f"rerun of job {source_id}")
            _share_input(db, source_id, job.id)
            _note_key(db, key, job.id)
            return Submission(job)

        return await self.write_bytes(operation, 0)

    async def queued_lines(self) -> dict[Line, int]:
        """Return how many jobs wait in each line. Takes about 0.1 s for a million jobs."""
        rows = await self._read(
            "SELECT service, user_id, count(*) FROM job WHERE state = 'Queued'"
            " GROUP BY service, user_id"
        )
        return {Line(service, user_id): waiting for service, user_id, waiting in rows}

    async def queue_position(self, job_id: int) -> int | None:
        """Return a job's place in its line, the first being 1; None if it does not wait.

        Counts up to ``POSITION_LIMIT``, which also stands for every place further back.
        """
        rows = await self._read(_QUEUE_POSITION, {"job": job_id, "limit": POSITION_LIMIT})
        return int(rows[0][0]) if rows else None

    async def active_jobs(self) -> list[ActiveJob]:
        """Return all jobs that an agent holds."""
        rows = await self._read(
            """SELECT job.id, job.user_id, job.service, attempt.id, attempt.number,
                      agent.id, agent.name, job.state
               FROM job JOIN attempt ON attempt.id = job.attempt_id
                        JOIN agent ON agent.id = attempt.agent_id
               WHERE job.state IN ('Processing', 'Submitted', 'Running') ORDER BY job.id"""
        )
        return [_active_job_of(row) for row in rows]

    async def times_of_last_jobs(self, limit: int) -> list[JobTimes]:
        """Return the times of the jobs that ended last, oldest first."""
        rows = await self._read(
            """SELECT service, created_at, started_at, finished_at FROM job
               WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')
               ORDER BY changed_at DESC LIMIT ?""",
            (limit,),
        )
        return [JobTimes(*row) for row in reversed(rows)]

    # --- agents

    async def note_agent(self, agent_id: str, name: str) -> None:
        """Remember an agent's name and that it connected."""
        now = time.time()

        def operation(db: Database) -> None:
            db.execute(
                "INSERT INTO agent (id, name, seen_at) VALUES (?, ?, ?) ON CONFLICT (id)"
                " DO UPDATE SET name = excluded.name, seen_at = excluded.seen_at",
                (agent_id, name, now),
            )
            _write_agent_change(db, agent_id, name, AgentChangeKind.CONNECTED)

        await self._writer.write(operation)

    async def note_agent_change(self, agent_id: str, name: str, kind: AgentChangeKind) -> None:
        """Write down what happened to an agent, if it has ever connected."""

        def operation(db: Database) -> None:
            if db.execute("SELECT 1 FROM agent WHERE id = ?", (agent_id,)).fetchone():
                _write_agent_change(db, agent_id, name, kind)

        await self._writer.write(operation)

    async def agent_changes_after(self, last_id: int, limit: int) -> list[AgentChange]:
        """Return the agent changes that follow one, oldest first."""
        rows = await self._read(
            "SELECT id, agent_id, name, at, kind FROM agent_history WHERE id > ?"
            " ORDER BY id LIMIT ?",
            (last_id, limit),
        )
        return [AgentChange(*(*row[:4], AgentChangeKind(row[4]))) for row in rows]

    async def drained_agents(self) -> list[KnownAgent]:
        """Return the agents that get no jobs because an operator said so."""
        rows = await self._read("SELECT id, name FROM agent WHERE is_drained")
        return [KnownAgent(*row) for row in rows]

    async def set_drained(self, name: str, is_drained: bool) -> list[KnownAgent]:
        """Let the agents of this name or id get no jobs, or get them again.

        Returns all of them, the one that connected last first.
        """
        kind = AgentChangeKind.DRAINING if is_drained else AgentChangeKind.RESUMED

        def operation(db: Database) -> list[KnownAgent]:
            rows = db.execute(
                "SELECT id, name, is_drained FROM agent WHERE id = ?1 OR name = ?1"
                " ORDER BY seen_at DESC",
                (name,),
            ).fetchall()
            for agent_id, agent_name, was_drained in rows:
                if bool(was_drained) is not is_drained:
                    db.execute(
                        "UPDATE agent SET is_drained = ? WHERE id = ?", (is_drained, agent_id)
                    )
                    _write_agent_change(db, agent_id, agent_name, kind)
            return [KnownAgent(row[0], row[1]) for row in rows]

        return await self._writer.write(operation)

    # --- attempts

    async def begin_next(self, line: Line, agent_id: str, reason: str) -> Assignment | None:
        """Give the first job of a line to an agent; returns None if no job waits there."""

        def operation(db: Database) -> Assignment | None:
            before = _first_of_line(db, line)
            if before is None:
                return None
            job = dataclasses.replace(before, attempts=before.attempts + 1)
            attempt_id = cast(
                int,
                db.execute(
                    "INSERT INTO attempt (job_id, number, agent_id) VALUES (?, ?, ?)",
                    (job.id, job.attempts, agent_id),
                ).lastrowid,
            )
            db.execute(
                "UPDATE job SET attempts = ?, attempt_id = ?, message = '' WHERE id = ?",
                (job.attempts, attempt_id, job.id),
            )
            _transition(db, job, JobState.PROCESSING, reason)
            row = db.execute("SELECT timeout FROM job WHERE id = ?", (job.id,)).fetchone()
            return Assignment(
                QueuedJob(job.id, job.user_id, job.service),
                attempt_id,
                job.attempts,
                row[0],
                _files_of(db, attempt_id),
            )

        return await self._writer.write(operation)

    async def input_files(self, attempt_id: int) -> tuple[StoredFile, ...]:
        """Return the input of an attempt's job, in upload order."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: _files_of(db, attempt_id))

    async def advance(self, attempt_id: int, target: JobState, reason: str) -> None:
        """Move a job on to an active state; does nothing if it is there or further already.

        Raises :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> None:
            job = _active_job_of_attempt(db, attempt_id)
            if ACTIVE_STATES.index(job.state) < ACTIVE_STATES.index(target):
                _transition(db, job, target, reason)

        await self._writer.write(operation)

    async def result_size(self, attempt_id: int) -> int:
        """Return how many bytes of an attempt's result are safe."""
        rows = await self._read(
            "SELECT blob.size FROM attempt JOIN blob ON blob.id = attempt.result_blob"
            " WHERE attempt.id = ?",
            (attempt_id,),
        )
        return int(rows[0][0]) if rows else 0

    async def append_result(self, attempt_id: int, offset: int, chunks: Sequence[bytes]) -> None:
        """Add chunks to an attempt's result at ``offset``, which must be its present size.

        All chunks but the last of the whole result have the standard length. Raises
        :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> None:
            _receiving_job_of_attempt(db, attempt_id)
            self._append(db, attempt_id, offset, chunks)

        size = sum(map(len, chunks))
        await self.write_bytes(operation, size)
        self._result_bytes.add(size)

    async def discard_result(self, attempt_id: int) -> None:
        """Forget what has arrived of an attempt's result, for a transfer that starts anew."""

        def operation(db: Database) -> None:
            _receiving_job_of_attempt(db, attempt_id)
            _drop_partial_result(db, attempt_id)

        await self._writer.write(operation)
        self._erase_wake.set()

    async def finish(
        self,
        report: Finished,
        offset: int,
        tail: Sequence[bytes],
        output: NewOutput = NO_OUTPUT,
    ) -> None:
        """End a job with its result, whole, and the last of its output in one transaction.

        ``tail`` are the last chunks, from ``offset`` on. A job that was killed while its agent
        was away stays so, and gets the result as what it left. A repeated call for a job that
        this very attempt has ended does nothing. Raises :class:`Superseded` if the attempt no
        longer counts, :class:`ResultMismatch` if the lengths don't add up.
        """

        def operation(db: Database) -> None:
            job = _job_of_attempt(db, report.attempt_id)
            is_killed = job.state is JobState.KILLED and not _has_result(db, report.attempt_id)
            if job.state not in ACTIVE_STATES and not is_killed:
                return
            _add_output(db, job, report.attempt_id, output)
            _drop_live_output(db, report.attempt_id)
            self._append(db, report.attempt_id, offset, tail)
            _seal_result(db, report)
            db.execute(
                "UPDATE attempt SET exit_code = ? WHERE id = ?",
                (report.exit_code, report.attempt_id),
            )
            if not is_killed:
                _set_message(db, job.id, report.message)
                _transition(db, job, report.state, report.message or "finished")

        size = sum(map(len, tail))
        await self.write_bytes(operation, size + output.size)
        self._result_bytes.add(size)

    async def append_output(self, attempt_id: int, output: NewOutput) -> None:
        """Add to what is kept of an attempt's output, and tell its followers.

        What is there already is passed over. Raises :class:`Superseded` if the attempt no
        longer counts.
        """

        def operation(db: Database) -> None:
            job = _receiving_job_of_attempt(db, attempt_id)
            _add_output(db, job, attempt_id, output)

        await self.write_bytes(operation, output.size)

    async def output_end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is stored."""
        rows = await self._read(
            "SELECT start + length(data) FROM output WHERE attempt_id = ? AND stream = ?"
            " ORDER BY start DESC LIMIT 1",
            (attempt_id, stream),
        )
        return int(rows[0][0]) if rows else 0

    async def latest_output_end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is there, the latest of it included."""
        stored = await self.output_end(attempt_id, stream)
        return max(stored, await self.output_end(attempt_id, LIVE_STREAMS[stream]))

    async def read_output(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        """Return the next pieces that are kept of a stream, from ``start`` on; none at its end."""
        # what is stored for good first: at the end of a job it takes the place of the other
        return await self._read_pieces(attempt_id, stream, start) or await self._read_pieces(
            attempt_id, LIVE_STREAMS[stream], start
        )

    async def _read_pieces(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        rows = await self._read(
            "SELECT start, data FROM output WHERE attempt_id = ?1 AND stream = ?2"
            " AND start >= coalesce((SELECT max(start) FROM output"
            "  WHERE attempt_id = ?1 AND stream = ?2 AND start <= ?3), 0)"
            " ORDER BY start LIMIT ?4",
            (attempt_id, stream, start, _OUTPUT_ROWS),
        )
        pieces = (OutputPiece(stream, row[0], row[1]) for row in rows)
        cut = (piece.after(start) for piece in pieces)
        return [piece for piece in cut if piece.data]

    async def writing(self, job_id: int) -> Writing | None:
        """Return a job as the source of output, None if there is no such job."""
        rows = await self._read(
            "SELECT state, attempt_id, attempts FROM job WHERE id = ?", (job_id,)
        )
        return Writing(JobState(rows[0][0]), *rows[0][1:]) if rows else None

    async def requeue(
        self, attempt_id: int, loss: Loss, reason: str, max_attempts: int
    ) -> JobState:
        """Take a job from an agent that lost it; returns Queued, or Failed if it was the last try.

        An attempt that was lost on its way to the agent is not held against the job. Raises
        :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> JobState:
            job = _active_job_of_attempt(db, attempt_id)
            is_undelivered = loss is Loss.AGENT_AWAY and job.state is JobState.PROCESSING
            lost_starts = job.lost_starts + (not is_undelivered)
            _drop_partial_result(db, attempt_id)
            if lost_starts >= max_attempts:
                message = f"{reason}; given up after {lost_starts} attempts"
                _set_message(db, job.id, message)
                _transition(db, job, JobState.FAILED, message)
                return JobState.FAILED
            db.execute(
                "UPDATE job SET attempt_id = NULL, lost_starts = ?, message = ? WHERE id = ?",
                (lost_starts, f"{reason}; queued again", job.id),
            )
            _doom_output(db, job.id)
            _transition(db, job, JobState.QUEUED, reason)
            return JobState.QUEUED

        state = await self._writer.write(operation)
        self._erase_wake.set()
        return state

    async def kill(self, job_id: int, message: str) -> None:
        """End a job that has not ended. Raises :class:`IllegalTransition` if it has.

        Its attempt, if it has one, may still deliver what the job left.
        """

        def operation(db: Database) -> None:
            _transition(db, _job_with_id(db, job_id), JobState.KILLED, message)
            _set_message(db, job_id, message)

        await self._writer.write(operation)

    async def killed_without_result(self, attempt_id: int) -> ActiveJob | None:
        """Return the job if it was killed in this attempt, which has not delivered it yet."""
        rows = await self._read(
            """SELECT job.id, job.user_id, job.service, attempt.id,
                      attempt.number, agent.id, agent.name, job.state
               FROM attempt JOIN job ON job.id = attempt.job_id AND job.attempt_id = attempt.id
                        JOIN agent ON agent.id = attempt.agent_id
                        LEFT JOIN blob ON blob.id = attempt.result_blob
               WHERE attempt.id = ? AND job.state = 'Killed' AND blob.state IS NOT 'sealed'""",
            (attempt_id,),
        )
        return _active_job_of(rows[0]) if rows else None

    async def withdraw(self, job_id: int, message: str) -> bool:
        """Kill a job if it waits in line; returns whether it did."""

        def operation(db: Database) -> bool:
            job = _job_with_id(db, job_id)
            if job.state is not JobState.QUEUED:
                return False
            _transition(db, job, JobState.KILLED, message)
            _set_message(db, job_id, message)
            return True

        return await self._writer.write(operation)

    async def reject(self, attempt_id: int, reason: str) -> None:
        """End a job that an agent found can never run. Raises :class:`Superseded`."""

        def operation(db: Database) -> None:
            job = _active_job_of_attempt(db, attempt_id)
            _set_message(db, job.id, reason)
            _transition(db, job, JobState.INVALID, reason)

        await self._writer.write(operation)

    def _append(self, db: Database, attempt_id: int, offset: int, chunks: Sequence[bytes]) -> None:
        row = db.execute(
            "SELECT blob.id, blob.size FROM attempt JOIN blob ON blob.id = attempt.result_blob"
            " WHERE attempt.id = ?",
            (attempt_id,),
        ).fetchone()
        if row is None:
            row = (self.next_blob_id(), 0)
            _open_blob(db, row[0])
            db.execute("UPDATE attempt SET result_blob = ? WHERE id = ?", (row[0], attempt_id))
        blob_id, size = row
        if offset != size:
            raise ResultMismatch(f"attempt {attempt_id}: bytes at {offset}, {size} stored")
        _insert_chunks(db, blob_id, offset // CHUNK_BYTES, chunks)
        size += sum(map(len, chunks))
        db.execute("UPDATE blob SET size = ? WHERE id = ?", (size, blob_id))

    # --- blobs

    async def result(self, job_id: int) -> StoredResult | None:
        """Return what an ended job left, whole, None if there is nothing (any more)."""
        rows = await self._read(
            "SELECT blob.id, blob.size, blob.sha256"
            " FROM job JOIN attempt ON attempt.id = job.attempt_id"
            " JOIN blob ON blob.id = attempt.result_blob"
            " WHERE job.id = ? AND blob.state = 'sealed'",
            (job_id,),
        )
        return StoredResult(*rows[0]) if rows else None

    async def input_of_job(self, job_id: int) -> tuple[StoredFile, ...]:
        """Return a job's input in upload order; nothing once retention has removed it."""
        rows = await self._read(
            "SELECT name, size, sha256, blob_id FROM input_file"
            " WHERE job_id = ? AND blob_id IS NOT NULL ORDER BY position",
            (job_id,),
        )
        return tuple(StoredFile(FileSpec(*row[:3]), row[3]) for row in rows)

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
                self._erase_wake.set()

    async def read_chunk(self, blob_id: int, offset: int) -> bytes:
        """Return the bytes from ``offset`` to the end of the chunk that holds it."""
        index, within = divmod(offset, CHUNK_BYTES)
        rows = await self._read(
            "SELECT data FROM chunk WHERE id = ?", ((blob_id << _CHUNK_INDEX_BITS) + index,)
        )
        if not rows:
            raise StoreUnavailable(f"blob {blob_id} has no chunk {index}")
        return cast(bytes, rows[0][0][within:])

    async def read_blob(self, blob_id: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a blob from ``offset`` on, all within it, in one hop."""
        first, within = divmod(offset, CHUNK_BYTES)
        last = (offset + size - 1) // CHUNK_BYTES
        base = blob_id << _CHUNK_INDEX_BITS
        rows = await self._read(
            "SELECT data FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id",
            (base + first, base + last),
        )
        data = b"".join(row[0] for row in rows)
        if len(data) - within < size:
            raise StoreUnavailable(f"blob {blob_id} has not {size} bytes at {offset}")
        return data if len(data) == size else data[within : within + size]

    async def read_files(self, files: Sequence[StoredFile], offset: int) -> bytes:
        """Return up to one chunk of the files' bytes, taken as one stream, from ``offset``."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: _read_stream(db, files, offset))

    async def result_digest(self, attempt_id: int, size: int) -> Any:
        """Return a SHA-256 object fed with the stored start of an attempt's result."""
        rows = await self._read("SELECT result_blob FROM attempt WHERE id = ?", (attempt_id,))
        digest = hashlib.sha256()
        offset = 0
        while offset < size:
            data = await self.read_chunk(rows[0][0], offset)
            digest.update(data)
            offset += len(data)
        return digest

    # --- retention

    async def oldest_final_change(self) -> float | None:
        """Return when the job that retention reaches first became final, in Unix seconds."""
        rows = await self._read(
            "SELECT min(changed_at) FROM job"
            " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
        )
        return cast("float | None", rows[0][0])

    async def clean_jobs_final_since(self, cutoff: float) -> int:
        """Mark some jobs that became final before ``cutoff`` as Cleaned, and doom their bytes.

        Returns how many; the caller asks again until it gets none.
        """

        def operation(db: Database) -> int:
            rows = db.execute(
                "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
                " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
                " AND changed_at <= ? ORDER BY changed_at LIMIT ?",
                (cutoff, _CLEAN_JOBS),
            ).fetchall()
            for row in rows:
                job = _job_of(row)
                _doom_files_of(db, job.id)
                _set_message(db, job.id, f"files of the {job.state} job removed by retention")
                _transition(db, job, JobState.CLEANED, "retention")
            return len(rows)

        cleaned = await self._writer.write(operation)
        self._erase_wake.set()
        return cleaned

    async def forget_old_keys(self) -> int:
        """Remove some idempotency keys that count no more; returns how many, to be repeated."""
        cutoff = time.time() - _KEY_SECONDS
        return await self._writer.write(
            lambda db: (
                db.execute(
                    "DELETE FROM idempotency WHERE (user_id, key) IN"
                    " (SELECT user_id, key FROM idempotency WHERE created_at <= ?"
                    " ORDER BY created_at LIMIT ?)",
                    (cutoff, _FORGET_KEYS),
                ).rowcount
            )
        )

    async def _erase_for_ever(self) -> None:
        while True:
            await self._erase_wake.wait()
            self._erase_wake.clear()
            try:
                await self._erase_all()
            except (StoreFull, StoreUnavailable) as error:
                log.warning("event=erase_failed error=%r retry_s=%g", str(error), _RETRY_SECONDS)
                await asyncio.sleep(_RETRY_SECONDS)
                self._erase_wake.set()

    async def _erase_all(self) -> None:
        orphans = frozenset(self._orphans)
        if orphans:
            await self._writer.write(lambda db: _doom(db, orphans))
            self._orphans -= orphans
        erased = 0
        while await self._writer.write(self._erase_some, 1):
            erased += 1
        while await self._writer.write(_erase_some_output, 1):
            erased += 1
        if erased or self._may_have_free_pages:
            while await self._writer.write(vacuum_some, 1):
                pass
            await self._writer.outside_transaction(checkpoint)
            self._may_have_free_pages = False

    def _erase_some(self, db: Database) -> bool:
        """Erase a few chunks of one doomed blob; returns whether there was one."""
        rows = db.execute("SELECT id FROM blob WHERE state = 'doomed' ORDER BY id")
        blob_id = next((row[0] for row in rows if row[0] not in self._pinned), None)
        if blob_id is None:
            return False
        first = blob_id << _CHUNK_INDEX_BITS
        last = first + (1 << _CHUNK_INDEX_BITS) - 1
        erased = db.execute(
            "DELETE FROM chunk WHERE id IN"
            " (SELECT id FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?)",
            (first, last, _ERASE_CHUNKS),
        ).rowcount
        if erased < _ERASE_CHUNKS:
            db.execute("DELETE FROM blob WHERE id = ?", (blob_id,))
        return True


def _erase_some_output(db: Database) -> bool:
    """Erase a few rows of one attempt's doomed output; returns whether there was any."""
    row = db.execute("SELECT id FROM attempt WHERE is_output_doomed = 1 LIMIT 1").fetchone()
    if row is None:
        return False
    erased = db.execute(
        "DELETE FROM output WHERE rowid IN (SELECT rowid FROM output WHERE attempt_id = ? LIMIT ?)",
        (row[0], _ERASE_CHUNKS),
    ).rowcount
    if erased < _ERASE_CHUNKS:
        db.execute("UPDATE attempt SET is_output_doomed = 0 WHERE id = ?", row)
    return True


_QUEUE_POSITION = """
    SELECT 1 + (SELECT count(*) FROM (
        SELECT 1 FROM job AS other WHERE other.state = 'Queued'
            AND other.service = job.service AND other.user_id = job.user_id
            AND other.priority > job.priority
        UNION ALL
        SELECT 1 FROM job AS other WHERE other.state = 'Queued'
            AND other.service = job.service AND other.user_id = job.user_id
            AND other.priority = job.priority AND other.id < job.id
        LIMIT :limit - 1))
    FROM job WHERE id = :job AND state = 'Queued'"""


# --- questions about jobs ---------------------------------------------------------

_LARGEST_ID = 2**63 - 1
_EXAMINE_JOBS = 10_000
_EXAMINE_AT_ONCE = 1000

_FLOOR_OF_TIME = """SELECT min(id) FROM (
    SELECT id FROM job INDEXED BY job_created WHERE created_at >= ?
    ORDER BY created_at LIMIT 1000)"""
"""The first job since then. More than one are looked at since clocks are set back at times."""

_ANY_JOBS = """SELECT id FROM job WHERE id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""
_JOBS_OF_USER = """SELECT id FROM job INDEXED BY job_user
    WHERE user_id = :user_id AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""
_JOBS_OF_SERVICE = """SELECT id FROM job INDEXED BY job_service
    WHERE service = :service AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""
_TAGGED_JOBS = """SELECT job_id FROM tag INDEXED BY tag_search
    WHERE key = :tag_key AND value = :tag_value AND job_id < :before AND job_id >= :floor
    ORDER BY job_id DESC LIMIT :step"""
_WAITING_JOBS = """SELECT id FROM job INDEXED BY job_waiting
    WHERE state = 'Queued' AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""
_ACTIVE_JOBS = """SELECT id FROM job INDEXED BY job_active
    WHERE state IN ('Processing', 'Submitted', 'Running') AND id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""
_UNSUCCESSFUL_JOBS = """SELECT id FROM job INDEXED BY job_unsuccessful
    WHERE state IN ('Failed', 'Invalid', 'Killed') AND id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""

_MATCHING_JOBS = """
    SELECT job.id, job.state, job.message, job.user_id, job.service, job.name, job.priority,
        job.timeout, job.created_at, job.changed_at, job.started_at, job.finished_at,
        job.attempt_id, agent.name
    FROM json_each(:ids) AS candidate CROSS JOIN job ON job.id = candidate.value
        LEFT JOIN attempt ON attempt.id = job.attempt_id
        LEFT JOIN agent ON agent.id = attempt.agent_id
    WHERE (:user_id IS NULL OR job.user_id = :user_id)
        AND (:service IS NULL OR job.service = :service)
        AND (:states IS NULL OR job.state IN (SELECT value FROM json_each(:states)))
        AND (:since IS NULL OR job.created_at >= :since)
        AND (:text IS NULL OR instr(lower(job.message), lower(:text)))
        AND (:agent IS NULL OR EXISTS (
            SELECT 1 FROM attempt AS tried JOIN agent AS trier ON trier.id = tried.agent_id
            WHERE tried.job_id = job.id AND trier.name = :agent))
        AND (:tags IS NULL OR NOT EXISTS (
            SELECT 1 FROM json_each(:tags) AS asked WHERE NOT EXISTS (
                SELECT 1 FROM tag WHERE tag.job_id = job.id
                    AND tag.key = json_extract(asked.value, '$[0]')
                    AND tag.value = json_extract(asked.value, '$[1]'))))
    ORDER BY job.id DESC LIMIT :limit"""


def _find_jobs(db: Database, wanted: JobFilter, before: int, limit: int) -> JobPage:
    """Go through candidates of the most selective index, newest first, and pick what matches."""
    candidates = _candidates_for(wanted)
    parameters = _parameters_of(wanted)
    floor = 0
    if wanted.since is not None:
        oldest = db.execute(_FLOOR_OF_TIME, (wanted.since,)).fetchone()[0]
        floor = _LARGEST_ID if oldest is None else oldest
    found: list[Sequence[Any]] = []
    examined, step, has_more = 0, limit + 1, True
    while has_more and len(found) <= limit and examined < _EXAMINE_JOBS:
        place = {"before": before, "floor": floor, "step": step}
        ids = [row[0] for row in db.execute(candidates, {**parameters, **place})]
        here = {"ids": json.dumps(ids), "limit": limit + 1 - len(found)}
        found += db.execute(_MATCHING_JOBS, {**parameters, **here})
        examined += len(ids)
        has_more = len(ids) == step
        before = ids[-1] if ids else before
        step = _EXAMINE_AT_ONCE
    if len(found) > limit:
        found = found[:limit]
        before, has_more = found[-1][0], True
    return JobPage(tuple(_summaries_of(db, found)), before if has_more else None)


def _candidates_for(wanted: JobFilter) -> str:
    if wanted.states and wanted.states <= frozenset(ACTIVE_STATES):
        return _ACTIVE_JOBS
    if wanted.tags:
        return _TAGGED_JOBS
    if wanted.user_id is not None:
        return _JOBS_OF_USER
    if wanted.states and wanted.states <= {JobState.FAILED, JobState.INVALID, JobState.KILLED}:
        return _UNSUCCESSFUL_JOBS
    if wanted.service is not None:
        return _JOBS_OF_SERVICE
    if wanted.states == {JobState.QUEUED}:
        return _WAITING_JOBS
    return _ANY_JOBS


def _parameters_of(wanted: JobFilter) -> dict[str, Any]:
    tag = wanted.tags[0] if wanted.tags else (None, None)
    return {
        "user_id": wanted.user_id,
        "service": wanted.service,
        "states": json.dumps(sorted(wanted.states)) if wanted.states else None,
        "agent": wanted.agent,
        "since": wanted.since,
        "text": wanted.text,
        "tags": json.dumps(wanted.tags) if wanted.tags else None,
        "tag_key": tag[0],
        "tag_value": tag[1],
    }


def _summaries_of(db: Database, rows: Sequence[Sequence[Any]]) -> list[JobSummary]:
    tags: dict[int, list[tuple[str, str]]] = {}
    found = db.execute(
        "SELECT tag.job_id, tag.key, tag.value"
        " FROM json_each(?) AS asked JOIN tag ON tag.job_id = asked.value"
        " ORDER BY tag.job_id, tag.key",
        (json.dumps([row[0] for row in rows]),),
    )
    for job_id, key, value in found:
        tags.setdefault(job_id, []).append((key, value))
    return [
        JobSummary(*(row[0], JobState(row[1]), *row[2:], tuple(tags.get(row[0], ()))))
        for row in rows
    ]


def _job_details(db: Database, job_id: int) -> JobDetails | None:
    parameters = _parameters_of(JobFilter())
    rows = db.execute(_MATCHING_JOBS, {**parameters, "ids": f"[{job_id}]", "limit": 1}).fetchall()
    if not rows:
        return None
    files = db.execute(
        "SELECT name, size, sha256 FROM input_file WHERE job_id = ? ORDER BY position", (job_id,)
    )
    result = db.execute(
        "SELECT blob.id, blob.size, blob.sha256 FROM job"
        " JOIN attempt ON attempt.id = job.attempt_id JOIN blob ON blob.id = attempt.result_blob"
        " WHERE job.id = ? AND blob.state = 'sealed'",
        (job_id,),
    ).fetchone()
    return JobDetails(
        _summaries_of(db, rows)[0],
        _attempts_of(db, job_id),
        tuple(FileSpec(*row) for row in files),
        None if result is None else StoredResult(*result),
    )


def _attempts_of(db: Database, job_id: int) -> tuple[AttemptRecord, ...]:
    history = [_transition_of(row) for row in db.execute(_HISTORY, (job_id,))]
    attempts = db.execute(
        "SELECT attempt.id, number, agent.name, exit_code"
        " FROM attempt JOIN agent ON agent.id = attempt.agent_id WHERE job_id = ? ORDER BY number",
        (job_id,),
    )
    return tuple(
        _attempt_record(row, [line for line in history if line.attempt == row[1]])
        for row in attempts
    )


def _attempt_record(row: Sequence[Any], history: Sequence[Transition]) -> AttemptRecord:
    """Tell an attempt from its lines of the history, of which those after its end may be many."""
    reached = {line.after: line.at for line in history}
    end = next((line for line in history if line.after not in ACTIVE_STATES), None)
    attempt_id, number, agent, exit_code = row
    return AttemptRecord(
        id=attempt_id,
        number=number,
        agent=agent,
        exit_code=exit_code,
        assigned_at=reached.get(JobState.PROCESSING),
        started_at=reached.get(JobState.RUNNING),
        ended_at=None if end is None else end.at,
        outcome=None if end is None else end.after,
        message="" if end is None else end.reason,
    )


_HISTORY = """
    SELECT history.id, job_id, user_id, service, attempt, at, from_state, to_state, reason
    FROM history JOIN job ON job.id = history.job_id
    WHERE job_id = ? ORDER BY history.id"""


def _transition_of(row: Sequence[Any]) -> Transition:
    row_id, job_id, user_id, service, attempt, at, before, after, reason = row
    return Transition(
        row_id,
        job_id,
        user_id,
        service,
        attempt,
        at,
        None if before is None else JobState(before),
        JobState(after),
        reason,
    )


def _files_of(db: Database, attempt_id: int) -> tuple[StoredFile, ...]:
    rows = db.execute(
        "SELECT name, size, sha256, blob_id FROM input_file"
        " WHERE job_id = (SELECT job_id FROM attempt WHERE id = ?) ORDER BY position",
        (attempt_id,),
    )
    return tuple(StoredFile(FileSpec(row[0], row[1], row[2]), row[3]) for row in rows)


def _seal_result(db: Database, report: Finished) -> None:
    sealed = db.execute(
        "UPDATE blob SET state = 'sealed', sha256 = ?"
        " WHERE id = (SELECT result_blob FROM attempt WHERE id = ?) AND size = ?",
        (report.result_sha256, report.attempt_id, report.result_size),
    ).rowcount
    if sealed != 1:
        raise ResultMismatch(f"attempt {report.attempt_id}: not {report.result_size} bytes")


def _read_stream(db: Database, files: Sequence[StoredFile], offset: int) -> bytes:
    parts: list[bytes] = []
    room = CHUNK_BYTES
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
        "SELECT data FROM chunk WHERE id = ?", ((blob_id << _CHUNK_INDEX_BITS) + index,)
    ).fetchone()
    if row is None:
        raise StoreUnavailable(f"blob {blob_id} has no chunk {index}")
    return cast(bytes, row[0][within:])


def _doom(db: Database, blob_ids: frozenset[int]) -> None:
    db.executemany(
        "UPDATE blob SET state = 'doomed' WHERE id = ? AND state = 'open'",
        ((blob_id,) for blob_id in blob_ids),
    )


# --- backup and check, from outside of a server -----------------------------------

Progress: TypeAlias = Callable[[int, int], None]
"""Told how much is done, of how much in all."""

_BACKUP_PAGES = 512


def back_up(path: str, target: str, progress: Progress) -> None:
    """Copy the database to ``target``, whole and checked, also while a server runs on it.

    Raises :class:`StoreRefused` if there is no database, or something at ``target`` already,
    and :class:`StoreError` if the copy could not be made or is damaged.
    """
    if os.path.exists(target):
        raise StoreRefused(f"{target}: is there already")
    unfinished = f"{target}.unfinished"
    try:
        with translated(), closing(_connect_beside(path)) as source:
            # A read transaction of the source's own pins one snapshot. Without it the backup
            # begins anew at every write of the server (sqlite.org/c3ref/backup_finish.html).
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            with closing(sqlite3.connect(unfinished)) as copy:
                source.backup(
                    copy,
                    pages=_BACKUP_PAGES,
                    progress=lambda _, left, total: progress(total - left, total),
                )
                found = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"{target}: the copy is damaged: {found}")
        _sync(unfinished)
        os.rename(unfinished, target)
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def check(path: str, progress: Progress) -> list[str]:
    """Look for damage: pages, references, the SHA-256 of every stored file, every history.

    Works beside a running server, on the state at its beginning. Returns what was found, in
    sentences; raises :class:`StoreRefused` if it is not a database of ours.
    """
    with translated(), closing(_connect_beside(path)) as db:
        db.execute("BEGIN")
        if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise StoreRefused(f"{path}: not a database of Orchestrator")
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


def _connect_beside(path: str) -> sqlite3.Connection:
    if not os.path.exists(path):
        raise StoreRefused(f"{path}: no such file")
    db = sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)
    db.execute("PRAGMA query_only = ON")
    return db


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_blobs(db: sqlite3.Connection, progress: Progress) -> Iterator[str]:
    total = db.execute("SELECT coalesce(sum(size), 0) FROM blob WHERE state = 'sealed'").fetchone()
    done = 0
    blobs = db.execute("SELECT id, size, sha256 FROM blob WHERE state = 'sealed' ORDER BY id")
    for blob_id, size, expected in blobs.fetchall():
        digest, length = hashlib.sha256(), 0
        first = blob_id << _CHUNK_INDEX_BITS
        chunks = db.execute(
            "SELECT data FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id",
            (first, first + (1 << _CHUNK_INDEX_BITS) - 1),
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
                f"user {user_id} has {counted.get(user_id, 0)} jobs in line,"
                f" noted are {noted.get(user_id, 0)}"
            )


assert {
    JobState.COMPLETED,
    JobState.FAILED,
    JobState.INVALID,
    JobState.KILLED,
} == FINAL_STATES, "the SQL above names the final states"
