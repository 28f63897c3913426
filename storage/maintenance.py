"""What works on a database beside its running server: tokens, backup, check."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TypeAlias

from jobs import TRANSITIONS, JobState
from storage.blobs import CHUNK_INDEX_BITS
from storage.database import (
    BUSY_SECONDS,
    StoreError,
    StoreRefused,
    StoreUnavailable,
    translated,
)
from storage.schema import APPLICATION_ID, MIGRATIONS
from storage.tokens import Role, Token


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Say of which file it is that it can't be used."""
    try:
        with translated():
            yield
    except StoreUnavailable as error:
        raise StoreUnavailable(f"{path}: {error}") from error


@contextmanager
def _tokens_beside(path: str) -> Iterator[sqlite3.Connection]:
    """Open a database for its tokens, also while a server runs on it."""
    if not os.path.exists(path):
        raise StoreRefused(f"{path}: no such file; start the server once to create it")
    with _named(path), closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as db:
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
        return list(tokens_by_digest(db).values())


def revoke_token(path: str, name: str) -> None:
    """Remove an API token. Raises :class:`StoreRefused` if there is none of that name."""
    with _tokens_beside(path) as db:
        if not db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount:
            raise StoreRefused(f"there is no token {name}")


def tokens_by_digest(db: sqlite3.Connection) -> dict[str, Token]:
    """Return all API tokens by the digests of their secrets."""
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


Progress: TypeAlias = Callable[[int, int], None]
"""Told how much is done, of how much in all."""


_BACKUP_PAGES = 512


def back_up(path: str, target: str, progress: Progress) -> None:
    """Copy the database to ``target``, whole and checked, also while a server runs on it.

    Raises :class:`StoreRefused` if there is no database, or something at ``target`` already,
    and :class:`StoreError` if the copy could not be made or is damaged.
    """
    if os.path.exists(target):
        raise StoreRefused(f"{target}: is there already; choose another name")
    if not os.access(os.path.dirname(os.path.abspath(target)), os.W_OK | os.X_OK):
        raise StoreRefused(f"{target}: its directory is not there, or can't be written to")
    unfinished = f"{target}.unfinished"
    try:
        with _named(path), closing(_connect_beside(path)) as source:
            # A read transaction of the source's own pins one snapshot. Without it the backup
            # begins anew at every write of the server (sqlite.org/c3ref/backup_finish.html).
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            _demand_ours(source, path)
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
    with _named(path), closing(_connect_beside(path)) as db:
        db.execute("BEGIN")
        _demand_ours(db, path)
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


def _demand_ours(db: sqlite3.Connection, path: str) -> None:
    if db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise StoreRefused(f"{path}: not a database of Orchestrator")


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
                f"user {user_id} has {counted.get(user_id, 0)} jobs in line,"
                f" noted are {noted.get(user_id, 0)}"
            )
