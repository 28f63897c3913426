"""SQLite as we use it: its lock, its connections, its errors. Knows none of our tables."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar, cast

import aiosqlite

from records import StoreBroken, StoreDamaged, StoreFull, StoreRefused, StoreUnavailable

T = TypeVar("T")

_WAL_LIMIT_BYTES = 64 * 1024 * 1024
_VACUUM_PAGES = 512
_OLDEST_SQLITE = (3, 35, 0)  # the first with RETURNING (sqlite.org/lang_returning.html)
BUSY_SECONDS = 5.0
"""How long a connection waits for another one's lock."""

HOW_TO_MAKE_WRITABLE = (
    "the server must be able to write this file and to make others beside it; give its user"
    " that right, or choose another place with --db"
)


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


_SYNC_FAILED = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)


@contextmanager
def translated() -> Iterator[None]:
    """Turn SQLite's environment errors into ours; programming errors pass as they are."""
    try:
        yield
    except UnicodeDecodeError as error:  # in what SQLite says of a damaged schema
        raise StoreDamaged("the database is damaged: its text can't be read") from error
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        extended_code = getattr(error, "sqlite_errorcode", 0)
        if extended_code in _SYNC_FAILED:
            raise StoreBroken(
                f"a sync of the database failed ({error}), so what was written last may be on the"
                " disk or not; the server ends: start it again once the disk is sound"
            ) from error
        code = extended_code & 0xFF
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
        if str(error).startswith("Could not decode to UTF-8"):
            raise StoreDamaged(f"the database is damaged: {error}") from error
        raise


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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except FileNotFoundError as error:
        raise StoreRefused(f"{error.strerror}; make the directory first") from None
    except OSError as error:
        raise StoreRefused(f"{error.strerror}; {HOW_TO_MAKE_WRITABLE}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreRefused("is not a regular file; choose another place with --db")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StoreRefused("another server is running on this file") from None
    return descriptor


def prepare_connection(db: Database) -> None:
    """Demand of a connection what the durability promises need."""
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")


def prepare_writer(db: Database) -> None:
    """For the connection that writes, once it has migrated the file."""
    # What a savepoint keeps for its rollback is small, and would else be a new file each time.
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


# --- for commands, also beside a running server -----------------------------------


@contextmanager
def opened_by_command(path: str) -> Iterator[sqlite3.Connection]:
    """Open a database that has to exist; what SQLite refuses is said with the file's name."""
    if not os.path.exists(path):
        raise StoreRefused(f"{path}: no such file; start the server once to create it")
    if not os.path.isfile(path):
        raise StoreRefused(f"{path}: is not a regular file")
    try:
        with (
            translated(),
            closing(sqlite3.connect(path, isolation_level=None, timeout=BUSY_SECONDS)) as db,
        ):
            yield db
    except (StoreUnavailable, StoreDamaged) as error:
        raise type(error)(f"{path}: {error}") from error
