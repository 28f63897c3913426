"""The SQLite file: its lock, its connections, group commit. Knows none of our tables.

One connection writes. Callers hand it operations and await their own; all that wait
when the writer comes round go into one transaction, which is synced once.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar, cast

import aiosqlite

from telemetry.metrics import Histogram

T = TypeVar("T")

_WAL_LIMIT_BYTES = 64 * 1024 * 1024
_BATCH_OPERATIONS = 512
_BATCH_BYTES = 2 * 1024 * 1024  # about 10 ms of writing: short ones never wait longer
_VACUUM_PAGES = 512
SQLITE_VERSION = sqlite3.sqlite_version
_OLDEST_SQLITE = (3, 35, 0)  # the first with RETURNING (sqlite.org/lang_returning.html)
BUSY_SECONDS = 5.0
"""How long a connection waits for another one's lock."""

HOW_TO_MAKE_WRITABLE = (
    "the server must be able to write this file and to make others beside it; give its user"
    " that right, or choose another place with --db"
)


# --- errors -----------------------------------------------------------------------


class StoreError(Exception):
    """The store can't do what was asked; the message is for the person who runs it."""


class StoreRefused(StoreError):
    """This file can't be opened: in use, of a newer version, or not ours."""


class StoreFull(StoreError):
    """No space left for the database to grow."""


class StoreUnavailable(StoreError):
    """The file can't be read or written at the moment (I/O error, permission)."""


# --- connections ------------------------------------------------------------------


class Database(sqlite3.Connection):
    """SQLite's connection, with a note of what the open transaction will have brought about."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.announcements: list[Any] = []

    def announce(self, event: object) -> None:
        """Have ``event`` published once the transaction is committed, and only then."""
        self.announcements.append(event)


class Connection(aiosqlite.Connection):
    """aiosqlite's connection and thread, plus a way to run several statements in one hop."""

    async def call(self, function: Callable[[Database], T]) -> T:
        """Run ``function`` in the connection's thread."""
        execute: Callable[[Callable[[], T]], Awaitable[T]] = self._execute
        return await execute(lambda: function(cast(Database, self._conn)))


async def connect(path: str) -> Connection:
    """Open a connection with a thread of its own; transactions are begun by hand."""

    def connector() -> sqlite3.Connection:
        # check_same_thread: aiosqlite uses it from its own thread only, but closes it anywhere
        return sqlite3.connect(
            path,
            isolation_level=None,
            timeout=BUSY_SECONDS,
            check_same_thread=False,
            factory=Database,
        )

    connection = Connection(connector, iter_chunk_size=64)
    await connection
    return connection


@contextmanager
def translated() -> Iterator[None]:
    """Turn SQLite's environment errors into ours; programming errors pass as they are."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise StoreFull("the disk that holds the database is full") from error
        if code in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        ):
            raise StoreUnavailable(f"the database can't be used: {error}") from error
        raise


@dataclass(slots=True)
class _Operation(Generic[T]):
    function: Callable[[Database], T]
    weight: int
    future: asyncio.Future[T]


class Writer:
    """Group commit: one thread, one transaction for all operations that wait."""

    def __init__(
        self,
        connection: Connection,
        before_commit: Callable[[Sequence[Any]], None],
        publish: Callable[[Sequence[Any]], None],
    ) -> None:
        """``publish`` is called with what the operations of a committed batch announced.

        ``before_commit`` is called with the same in the connection's thread: between the two
        other connections may see it although nobody has been told.
        """
        self._connection = connection
        self._before_commit = before_commit
        self._publish = publish
        self._short: deque[_Operation[Any]] = deque()
        self._bulk: deque[_Operation[Any]] = deque()
        self._alone: deque[_Operation[Any]] = deque()
        self._wake = asyncio.Event()
        self.batch_sizes = Histogram(
            "orchestrator_commit_operations",
            "Operations that were committed together.",
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        )
        self.commit_seconds = Histogram(
            "orchestrator_commit_seconds",
            "Time for one transaction, its sync to the disk included.",
            (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
        )

    async def write(self, function: Callable[[Database], T], weight: int = 0) -> T:
        """Run ``function`` in a transaction; returns when it is committed and synced.

        ``weight`` is the number of bytes it writes; operations with a weight keep their
        order among themselves, and those without one go before them.
        """
        return await self._enqueue(self._bulk if weight else self._short, function, weight)

    async def outside_transaction(self, function: Callable[[Database], T]) -> T:
        """Run ``function`` on the writer's connection with no transaction open."""
        return await self._enqueue(self._alone, function, 0)

    async def run(self) -> None:
        """Commit for ever; operations that fail fail alone unless the transaction does."""
        while True:
            if self._alone:
                await self._run_alone(self._alone.popleft())
                continue
            batch = self._next_batch()
            if batch:
                await self._commit(batch)
                continue
            self._wake.clear()
            await self._wake.wait()

    def _enqueue(
        self,
        queue: deque[_Operation[Any]],
        function: Callable[[Database], T],
        weight: int,
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        queue.append(_Operation(function, weight, future))
        self._wake.set()
        return future

    def _next_batch(self) -> list[_Operation[Any]]:
        batch: list[_Operation[Any]] = []
        budget = _BATCH_BYTES
        while self._short and len(batch) < _BATCH_OPERATIONS:
            batch.append(self._short.popleft())
        while self._bulk and budget > 0 and len(batch) < _BATCH_OPERATIONS:
            operation = self._bulk.popleft()
            budget -= operation.weight
            batch.append(operation)
        return batch

    async def _run_alone(self, operation: _Operation[Any]) -> None:
        try:
            with translated():
                result = await self._connection.call(operation.function)
        except Exception as error:  # noqa: BLE001 - it is the caller's, who awaits it
            _fail(operation.future, error)
        else:
            _fulfil(operation.future, result)

    async def _commit(self, batch: list[_Operation[Any]]) -> None:
        functions = [operation.function for operation in batch]
        started_at = time.monotonic()
        try:
            with translated():
                batch_outcome = await self._connection.call(
                    lambda db: _run_batch(db, functions, self._before_commit)
                )
        except Exception as error:  # noqa: BLE001 - it is the callers', who await it
            for operation in batch:
                _fail(operation.future, error)
            return
        self.batch_sizes.observe(len(batch))
        self.commit_seconds.observe(time.monotonic() - started_at)
        outcomes, announcements = batch_outcome
        if announcements:
            self._publish(announcements)
        for operation, (result, error_or_none) in zip(batch, outcomes, strict=True):
            if error_or_none is None:
                _fulfil(operation.future, result)
            else:
                _fail(operation.future, error_or_none)


def _fulfil(future: asyncio.Future[T], result: T) -> None:
    if not future.done():  # its caller may have been cancelled meanwhile
        future.set_result(result)


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


_Outcome: TypeAlias = tuple[Any, Exception | None]


def _run_batch(
    db: Database,
    functions: Sequence[Callable[[Database], Any]],
    before_commit: Callable[[Sequence[Any]], None],
) -> tuple[list[_Outcome], list[Any]]:
    db.announcements = []
    db.execute("BEGIN IMMEDIATE")
    try:
        # one alone needs no savepoint: if it fails, all of the transaction does
        run = _run_in_savepoint if len(functions) > 1 else _run_alone
        outcomes = [run(db, function) for function in functions]
        if db.announcements:
            before_commit(db.announcements)
        db.execute("COMMIT")
        return outcomes, db.announcements
    except BaseException:
        # SQLite may have rolled back by itself (SQLITE_FULL, SQLITE_IOERR)
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _run_alone(db: Database, function: Callable[[Database], Any]) -> _Outcome:
    return function(db), None


def _run_in_savepoint(db: Database, function: Callable[[Database], Any]) -> _Outcome:
    announced = len(db.announcements)
    db.execute("SAVEPOINT operation")
    try:
        result = function(db)
    except Exception as error:
        if isinstance(error, sqlite3.OperationalError) or not db.in_transaction:
            raise  # the environment failed, not this operation
        db.execute("ROLLBACK TO operation")
        db.execute("RELEASE operation")
        del db.announcements[announced:]
        return None, error
    db.execute("RELEASE operation")
    return result, None


# --- opening ----------------------------------------------------------------------


def check_sqlite_version() -> None:
    """Raise :class:`StoreRefused` if the SQLite that Python has can't do what we ask of it."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        oldest = ".".join(map(str, _OLDEST_SQLITE))
        raise StoreRefused(
            f"this Python has SQLite {sqlite3.sqlite_version}, at least {oldest} is needed;"
            " use a newer Python, or one built with a newer SQLite"
        )


def lock_file(path: str) -> int:
    """Take the lock that keeps a second server off the file, and hold it until close.

    flock(2) on the database file itself, since the server writes no other file. SQLite
    uses fcntl(2) locks, which on a local file system do not meet flock's. Closing *any*
    descriptor of the file drops SQLite's locks (sqlite.org/howtocorrupt.html, 2.2), so
    this one is closed only after SQLite has closed all of its own.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise StoreRefused(f"{path}: {error.strerror}; make the directory first") from None
    except OSError as error:
        raise StoreRefused(f"{path}: {error.strerror}; {HOW_TO_MAKE_WRITABLE}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreRefused(f"{path}: another server is running on this file") from None
    return descriptor


def prepare_connection(db: Database) -> None:
    """Demand of a connection what the durability promises need."""
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")


def prepare_writer(db: Database) -> None:
    """For the connection that writes, once it has migrated the file."""
    # What a savepoint keeps for its rollback is little, and would else be a new file each time.
    # Not before a migration: to make the index of a large table takes as much as the table.
    db.execute("PRAGMA temp_store = MEMORY")


def prepare_reader(db: Database) -> None:
    """For a connection that only reads."""
    db.execute("PRAGMA query_only = ON")


def in_one_snapshot(function: Callable[[Database], T]) -> Callable[[Database], T]:
    """Let all statements of a reader's ``function`` see one and the same state."""

    def read(db: Database) -> T:
        db.execute("BEGIN")
        try:
            return function(db)
        finally:
            db.execute("ROLLBACK")

    return read


def vacuum_some(db: Database) -> bool:
    """Give some free pages back to the file system; returns whether more are left."""
    before = int(db.execute("PRAGMA freelist_count").fetchone()[0])
    # the pragma does its work while its (empty) rows are stepped through
    db.execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
    left = int(db.execute("PRAGMA freelist_count").fetchone()[0])
    return 0 < left < before  # a file without incremental vacuum keeps them all


def checkpoint(db: Database) -> bool:
    """Carry the WAL into the file, which shrinks only then, and empty it (sqlite.org/wal.html).

    Does what it can without waiting for other connections; returns whether that was all, so
    False if one of them was reading.
    """
    db.execute("PRAGMA busy_timeout = 0")
    try:
        ((busy, _, _),) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    finally:
        db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
    return not busy
