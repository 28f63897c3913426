"""Group commit: callers hand operations to one writer and await their own.

All that wait when the writer comes round go into one transaction, which is synced once.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from records import StoreBroken
from storage.database import Connection, Database, translated
from telemetry.logs import event
from telemetry.metrics import Histogram

log = logging.getLogger("orchestrator.store")

T = TypeVar("T")

_BATCH_OPERATIONS = 512
_BATCH_BYTES = 2 * 1024 * 1024  # about 10 ms of writing: short ones never wait longer


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
        before_commit: Callable[[Database, Sequence[Any]], None],
        publish: Callable[[Sequence[Any]], None],
    ) -> None:
        """``publish`` is called with what the operations of a committed batch announced.

        ``before_commit`` is called with the same in the connection's thread, in the transaction:
        between the two other connections may see it although nobody has been told.
        """
        self._connection = connection
        self._before_commit = before_commit
        self._publish = publish
        self._short: deque[_Operation[Any]] = deque()
        self._bulk: deque[_Operation[Any]] = deque()
        self._alone: deque[_Operation[Any]] = deque()
        self._wake = asyncio.Event()
        self._broken: StoreBroken | None = None
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
        """Commit for ever; operations that fail fail alone unless the transaction does.

        Raises :class:`StoreBroken` when a sync failed. The operations of that transaction are
        never answered, since they may be done or not; all that wait or come later fail.
        """
        try:
            await self._run()
        except StoreBroken as error:
            event(log, "sync_failed", level=logging.CRITICAL, error=str(error))
            self._broken = error
            for operation in (*self._alone, *self._short, *self._bulk):
                _fail(operation.future, error)
            raise

    async def _run(self) -> None:
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
        if self._broken is not None:
            future.set_exception(self._broken)
            return future
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
        except StoreBroken:
            raise
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
        except StoreBroken:
            raise
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
    before_commit: Callable[[Database, Sequence[Any]], None],
) -> tuple[list[_Outcome], list[Any]]:
    db.announcements = []
    db.execute("BEGIN IMMEDIATE")
    try:
        # one alone needs no savepoint: if it fails, all of the transaction does
        run = _run_in_savepoint if len(functions) > 1 else _run_alone
        outcomes = [run(db, function) for function in functions]
        if db.announcements:
            before_commit(db, db.announcements)
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
