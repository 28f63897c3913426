"""The open database file: one connection that writes, a few that read, and room on the disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from records import DiskSpace, StoreFull
from storage.database import (
    Connection,
    Database,
    checkpoint,
    connect,
    in_one_snapshot,
    lock_file,
    prepare_connection,
    prepare_reader,
    prepare_writer,
    translated,
)
from storage.schema import migrate
from storage.writer import Writer
from telemetry import metrics
from wire.frames import CHUNK_BYTES

T = TypeVar("T")

READERS = 3
_RESERVE_BYTES = 64 * 1024 * 1024
_RESERVE_SHARE = 0.1


def is_short_write(size: int) -> bool:
    """Whether so many bytes are written with the short operations: what fits into one chunk."""
    return size <= CHUNK_BYTES


class DatabaseFile:
    """What each aggregate of the store reads and writes with.

    ``before_commit`` and ``publish`` are told of each batch, as :class:`Writer` says;
    ``when_short_of_room`` is called when bytes are refused for want of room on the disk.
    """

    def __init__(
        self,
        path: str,
        before_commit: Callable[[Database, Sequence[Any]], None],
        publish: Callable[[Sequence[Any]], None],
    ) -> None:
        self._path = path
        self._before_commit = before_commit
        self._publish = publish
        self._lock = -1
        self._connections: list[Connection] = []
        self._idle_readers: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._bulk = asyncio.Semaphore(READERS - 1)
        self._long = asyncio.Semaphore(1)
        self._writer: Writer
        self.when_short_of_room: Callable[[], None] = lambda: None

    async def open(self, tidy: Callable[[Database], None]) -> None:
        """Lock and migrate the file, then ``tidy`` it before anybody reads or writes."""
        self._lock = lock_file(self._path)
        connection = await connect(self._path)
        self._connections.append(connection)
        await connection.call(prepare_connection)
        await connection.call(migrate)
        # After a failed sync the WAL may hold what is only in the kernel's memory, and a power
        # cut would tear a hole below what is acknowledged from now on. So all of it is carried
        # into the file, and synced, before anything is built on it.
        await connection.call(checkpoint)
        await connection.call(prepare_writer)
        await connection.call(tidy)
        self._writer = Writer(connection, self._before_commit, self._publish)
        for _ in range(READERS):
            reader = await connect(self._path)
            self._connections.append(reader)
            await reader.call(prepare_reader)
            self._idle_readers.put_nowait(reader)

    async def run(self) -> None:
        """Commit what is to be written; ends by cancellation only."""
        await self._writer.run()

    async def close(self) -> None:
        """Close all connections, then the lock."""
        while self._connections:
            await self._connections.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # --- reading

    async def rows(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        """Return what one statement gives."""
        return await self.read(lambda db: db.execute(sql, parameters).fetchall())

    async def read(self, function: Callable[[Database], T]) -> T:
        """Run a function that reads."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(function)

    async def read_snapshot(self, function: Callable[[Database], T]) -> T:
        """Run a function whose statements all see one and the same state."""
        return await self.read(in_one_snapshot(function))

    async def read_long(self, function: Callable[[Database], T]) -> T:
        """Run one step of what takes many, such as a search: one at a time, the others first."""
        async with self._long:
            return await self.read_bulk(in_one_snapshot(function))

    async def read_bulk(self, function: Callable[[Database], T]) -> T:
        """Run a function that reads much, such as a download's: a reader stays free for others."""
        async with self._bulk:
            return await self.read(function)

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Connection]:
        reader = await self._idle_readers.get()
        try:
            yield reader
        finally:
            self._idle_readers.put_nowait(reader)

    # --- writing

    async def write(self, operation: Callable[[Database], T], weight: int = 0) -> T:
        """Run an operation in a transaction; returns once that is committed and synced."""
        return await self._writer.write(operation, weight)

    async def write_bytes(self, operation: Callable[[Database], T], size: int) -> T:
        """Write ``size`` bytes of files or results, unless that would use up the reserve.

        The reserve is what transitions, erasing and retention need when nothing else may be
        written: deleting takes space too, in the WAL.
        """
        self.check_room(size)
        return await self._writer.write(operation, 0 if is_short_write(size) else size)

    async def write_outside_transaction(self, operation: Callable[[Database], T]) -> T:
        """Run an operation on the connection that writes, with no transaction open."""
        return await self._writer.outside_transaction(operation)

    def check_room(self, size: int) -> None:
        """Raise :class:`StoreFull` if ``size`` more bytes would use up the reserve."""
        volume = os.statvfs(self._path)
        reserve = min(_RESERVE_BYTES, _RESERVE_SHARE * volume.f_blocks * volume.f_frsize)
        # bytes stand in the WAL and, after the checkpoint, in the file; what is in the WAL now
        # will make the file grow, too
        needed = reserve + 2 * size + self._wal_size()
        if volume.f_bavail * volume.f_frsize < needed:
            self.when_short_of_room()
            raise StoreFull("the disk that holds the database is full")

    # --- telling

    def families(self) -> tuple[metrics.Family, ...]:
        """Return what there is to tell of the file and of commits."""
        return (
            metrics.gauge("orchestrator_database_bytes", "Size of the file.", _size_of(self._path)),
            metrics.gauge(
                "orchestrator_wal_bytes", "Size of the write-ahead log.", self._wal_size()
            ),
            self._writer.batch_sizes.family(),
            self._writer.commit_seconds.family(),
        )

    def disk_space(self) -> DiskSpace:
        """Return how full the disk is that holds the file."""
        volume = os.statvfs(self._path)
        return DiskSpace(
            free=volume.f_bavail * volume.f_frsize,
            total=volume.f_blocks * volume.f_frsize,
            database=_size_of(self._path) + self._wal_size(),
        )

    def _wal_size(self) -> int:
        return _size_of(f"{self._path}-wal")


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
