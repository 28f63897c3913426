"""How many jobs came and ended, and how long they waited and ran, minute by minute.

What a transaction brings about is counted at its end and with it, so that a crash loses nothing.
Minutes are folded to hours after a day, hours are forgotten after a month: there are never more
than some 1,600 minutes and 800 hours of a service.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

from events import Transition
from jobs import FINAL_STATES, JobState
from records import DiskSpace, StatisticsPeriod, StatisticsPoint
from storage.database import Database
from storage.file import DatabaseFile

_MINUTE, _HOUR = 60, 3600
_KEPT_MINUTES_SECONDS = 26 * _HOUR  # a day, and the hours that are cut at its ends
_KEPT_HOURS_SECONDS = 32 * 24 * _HOUR


class Statistics:
    """What is known of how jobs went, and of the disk that holds it all."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    def disk_space(self) -> DiskSpace:
        """Return how full the disk is that holds the database."""
        return self._file.disk_space()

    def count(self, db: Database, events: Sequence[object]) -> None:
        """For the writer: add what a transaction brings about to its minutes, before its commit."""
        counts: dict[tuple[int, str], _Counts] = {}
        for event in events:
            if isinstance(event, Transition) and (event.before is None or event.after in _COUNTED):
                minute = int(event.at) // _MINUTE * _MINUTE
                counts.setdefault((minute, event.service), _Counts()).add(event)
        db.executemany(_ADD, [(*key, *astuple(sums)) for key, sums in counts.items()])

    async def of(
        self, period: StatisticsPeriod, now: float, service: str | None
    ) -> list[StatisticsPoint]:
        """Return a point for every step of the period that ends ``now`` (Unix seconds).

        ``service`` None sums all services up. The last point is of the step that goes on.
        """
        step = period.step_seconds
        last = int(now // step) * step
        first = last - step * (period.points - 1)
        rows = await self._file.rows(
            _POINTS, {"step": step, "first": first, "last": last, "service": service}
        )
        points = {row[0]: _point(row) for row in rows}
        times = range(first, last + step, step)
        return [points.get(time, StatisticsPoint(time)) for time in times]

    async def fold(self, now: float) -> None:
        """Make hours of old minutes, and forget old hours. ``now`` in Unix seconds."""
        minutes = int((now - _KEPT_MINUTES_SECONDS) // _HOUR) * _HOUR
        hours = int((now - _KEPT_HOURS_SECONDS) // _HOUR) * _HOUR

        def operation(db: Database) -> None:
            db.execute(_FOLD, (minutes,))
            db.execute("DELETE FROM statistic WHERE step = 60 AND time < ?", (minutes,))
            db.execute("DELETE FROM statistic WHERE step = 3600 AND time < ?", (hours,))

        await self._file.write(operation)


_COUNTED = {JobState.RUNNING, *FINAL_STATES}


@dataclass(slots=True)
class _Counts:
    """What a row of the table counts, in the order of its columns."""

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    killed: int = 0
    invalid: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    runs: int = 0
    run_seconds: float = 0.0

    def add(self, event: Transition) -> None:
        """Count one transition."""
        self.submitted += event.before is None
        self.completed += event.after is JobState.COMPLETED
        self.failed += event.after is JobState.FAILED
        self.killed += event.after is JobState.KILLED
        self.invalid += event.after is JobState.INVALID
        if event.after is JobState.RUNNING and event.created_at is not None:
            self.waits += 1
            self.wait_seconds += max(event.at - event.created_at, 0)
        elif event.before is JobState.RUNNING and event.started_at is not None:
            self.runs += 1
            self.run_seconds += max(event.at - event.started_at, 0)


_NAMES = tuple(field.name for field in fields(_Counts))
_COLUMNS = ", ".join(_NAMES)
_SUMS = ", ".join(f"sum({name})" for name in _NAMES)
_MORE = "ON CONFLICT (step, time, service) DO UPDATE SET " + ", ".join(
    f"{name} = {name} + excluded.{name}" for name in _NAMES
)

_ADD = f"""INSERT INTO statistic (step, time, service, {_COLUMNS})
    VALUES ({_MINUTE}, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) {_MORE}"""

_POINTS = f"""SELECT time - time % :step AS point, {_SUMS} FROM statistic
    WHERE step IN (60, 3600) AND time >= :first AND time < :last + :step
        AND (:service IS NULL OR service = :service)
    GROUP BY point"""
"""Steps go one into the other, so a minute or an hour lies in one point whole."""

_FOLD = f"""INSERT INTO statistic (step, time, service, {_COLUMNS})
    SELECT {_HOUR}, time - time % {_HOUR} AS hour, service, {_SUMS} FROM statistic
    WHERE step = {_MINUTE} AND time < ? GROUP BY hour, service {_MORE}"""


def _point(row: Sequence[Any]) -> StatisticsPoint:
    time, submitted, completed, failed, killed, invalid, waits, waited, runs, ran = row
    return StatisticsPoint(
        time,
        submitted,
        completed,
        failed,
        killed,
        invalid,
        waited / waits if waits else None,
        ran / runs if runs else None,
    )
