"""The benchmarks' own look into the database file: to watch jobs end, and to fill it.

Only here is SQL. The product's rule (SQL in ``store.py`` only) is about the product; a million
queued jobs can't be made through its API within a benchmark's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import BenchmarkError

_WATCH_SECONDS = 0.05
_STALL_SECONDS = 120.0


async def completion_time(database: Path, first: int, last: int) -> float:
    """Wait until the jobs ``first`` to ``last`` have completed; returns when, in Unix seconds.

    The time is the one that the server wrote, so it does not depend on how often this looks.
    """
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        waiting, moved = first, time.monotonic()
        while (left := _first_unfinished(db, waiting, last)) is not None:
            if left != waiting:
                waiting, moved = left, time.monotonic()
            if time.monotonic() - moved > _STALL_SECONDS:
                raise BenchmarkError(f"job {left} did not end within {_STALL_SECONDS:g} s")
            await asyncio.sleep(_WATCH_SECONDS)
        completed, at = db.execute(
            "SELECT count(*), max(changed_at) FROM job"
            " WHERE id BETWEEN ? AND ? AND state = 'Completed'",
            (first, last),
        ).fetchone()
    if completed != last - first + 1:
        raise BenchmarkError(f"{completed} of {last - first + 1} jobs completed")
    return float(at)


def _first_unfinished(db: sqlite3.Connection, first: int, last: int) -> int | None:
    row = db.execute(
        "SELECT id FROM job WHERE id BETWEEN ? AND ?"
        " AND state NOT IN ('Completed', 'Failed', 'Invalid', 'Killed') ORDER BY id LIMIT 1",
        (first, last),
    ).fetchone()
    return None if row is None else int(row[0])


def multiply_job(database: Path, count: int, users: int) -> None:
    """Make the only job of a database into ``count`` queued ones of ``users`` users.

    The job was uploaded through the API, so its rows are as the server makes them. They are
    copied with all the columns that the file has, in every table that refers to a job, so this
    outlives changes of the schema. The copies share the blobs of the original.
    No server may use the file.
    """
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        # not a durable write: the file can be made again
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -200000")
        db.execute("BEGIN")
        (original,) = db.execute("SELECT min(id) FROM job").fetchone()
        _copy_rows(db, "job", "id", original, count, f"copy.turn % {users} + 1")
        for table, column in _references_to_job(db):
            _copy_rows(db, table, column, original, count, "original.user_id")
        db.execute("COMMIT")
    with open(database, "rb") as file:
        os.fsync(file.fileno())  # or else the server's first commit would pay for it


def _copy_rows(
    db: sqlite3.Connection, table: str, key: str, original: int, count: int, user: str
) -> None:
    """Copy the rows of the original job for the jobs after it."""
    values = {column: f'original."{column}"' for column in _columns_to_copy(db, table, key)}
    values[key] = f"{original} + copy.turn"
    if "user_id" in values:
        values["user_id"] = user
    names = ", ".join(f'"{column}"' for column in values)
    db.execute(
        "WITH RECURSIVE copy (turn) AS"
        f" (SELECT 1 UNION ALL SELECT copy.turn + 1 FROM copy WHERE copy.turn < {count - 1})"
        f' INSERT INTO "{table}" ({names}) SELECT {", ".join(values.values())}'
        f' FROM copy CROSS JOIN "{table}" AS original WHERE original."{key}" = ?',
        (original,),
    )


def _columns_to_copy(db: sqlite3.Connection, table: str, key: str) -> Iterator[str]:
    """Name a table's columns but for a row id of its own, which each copy gets anew."""
    columns = db.execute(f'PRAGMA table_info("{table}")').fetchall()
    is_composite = sum(1 for column in columns if column[5]) > 1
    for _, name, kind, _, _, is_key in columns:
        if name == key or is_composite or not (is_key and kind.upper() == "INTEGER"):
            yield name


def _references_to_job(db: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    """Find the columns that refer to a job's id."""
    tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
    for (table,) in tables:
        for reference in db.execute(f'PRAGMA foreign_key_list("{table}")').fetchall():
            if reference[2] == "job" and table != "job":
                yield table, str(reference[3])
