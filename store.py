"""The one door to durable state: opens the file, runs its writer and eraser, hands out the rest.

One connection writes, with group commit; readers have connections of their own and never wait
for the writer (WAL). What a commit brought about is published on the store's feed once it is on
the disk. Statements and operations stand in ``storage/``, one module for each aggregate.
"""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from events import Feed
from records import StoreDamaged, StoreError, StoreFull, StoreRefused, StoreUnavailable
from storage.agents import Agents
from storage.attempts import Attempts
from storage.blobs import Blobs
from storage.clock import SteadyClock
from storage.database import HOW_TO_MAKE_WRITABLE, Database, check_sqlite_version, translated
from storage.eraser import Eraser
from storage.file import READERS, DatabaseFile
from storage.history import History
from storage.incarnations import Incarnations
from storage.jobs import POSITION_LIMIT, Jobs
from storage.output import JobOutput
from storage.retention import Retention
from storage.statistics import Statistics
from storage.tokens import Tokens
from storage.uploads import Upload, Uploads
from telemetry import metrics

__all__ = ["POSITION_LIMIT", "READERS", "SQLITE_VERSION", "Store", "Upload"]

SQLITE_VERSION = sqlite3.sqlite_version


_DAMAGED = (
    "; put the last backup in its place (README, Backup), or see what is damaged"
    " with 'orchestrator.py check FILE'"
)


def _advice(error: StoreError) -> str:
    """Say what to do about a file that can't be opened."""
    if isinstance(error, StoreDamaged):
        return _DAMAGED
    match getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return _DAMAGED
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "; " + HOW_TO_MAKE_WRITABLE
        case sqlite3.SQLITE_FULL:
            return "; free some space there"
    return ""


class Store:
    """The durable state of one server. Make it with :meth:`open`; run :meth:`run` beside it.

    Every method of its aggregates that changes something returns once the change is committed
    and synced, and raises :class:`StoreFull` or :class:`StoreUnavailable` when it could not
    be. ``feed`` tells of every transition once it is committed.
    """

    def __init__(self, path: str) -> None:
        self.feed = Feed()
        self._file = DatabaseFile(path, self._before_commit, self._publish)
        self._clock = SteadyClock()
        self.blobs = Blobs(self._file)
        self.jobs = Jobs(self._file, self.blobs)
        self.history = History(self._file)
        self.uploads = Uploads(self._file, self.blobs)
        self.attempts = Attempts(self._file, self.blobs)
        self.output = JobOutput(self._file)
        self.agents = Agents(self._file)
        self.incarnations = Incarnations(self._file)
        self.retention = Retention(self._file, self.blobs, self._clock)
        self.tokens = Tokens(self._file)
        self.statistics = Statistics(self._file)
        self._eraser = Eraser(self._file, self.blobs)

    @classmethod
    async def open(cls, path: str) -> Store:
        """Lock, migrate and tidy the file. Raises :class:`StoreRefused` if it can't be used."""
        check_sqlite_version()
        store = cls(path)
        try:
            with translated():
                await store._file.open(store._begin)
        except (StoreRefused, StoreUnavailable, StoreFull, StoreDamaged) as error:
            await store.close()
            raise StoreRefused(f"{path}: {error}{_advice(error)}") from error
        except BaseException:
            await store.close()
            raise
        return store

    def _begin(self, db: Database) -> None:
        self._clock.begin(db)
        self.blobs.begin(db)
        self.incarnations.begin(db)
        _ensure_setting(db, "agent_token", secrets.token_urlsafe(32))
        _ensure_setting(db, "probe", "")

    async def run(self) -> None:
        """The store's background work: group commit and erasing. Ends by cancellation only."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._file.run(), name="store writer")
            tasks.create_task(self._eraser.run(), name="store eraser")

    def _before_commit(self, db: Database, events: Sequence[Any]) -> None:
        """For the writer, in its thread: readers may see from now on what this tells."""
        self.statistics.count(db, events)
        self.jobs.doubt(events)

    def _publish(self, events: Sequence[Any]) -> None:
        """For the writer: this is committed."""
        self.jobs.take_in(events)
        self.feed.publish(events)

    async def close(self) -> None:
        """Close all connections, then the lock; the store can't be used after."""
        await self._file.close()

    async def probe(self) -> None:
        """Write something durably, to know whether that works and whether jobs can be taken."""
        self._file.check_room(0)
        stamp = str(time.time())
        await self._file.write(
            lambda db: db.execute("UPDATE setting SET value = ? WHERE name = 'probe'", (stamp,))
        )

    def families(self) -> tuple[metrics.Family, ...]:
        """Return what there is to tell of the file, of commits and of bytes that came in."""
        return (
            *self._file.families(),
            self.uploads.uploaded_bytes.family(),
            self.attempts.result_bytes.family(),
        )


def _ensure_setting(db: Database, name: str, value: str) -> None:
    db.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value)
    )
