"""Statistics: what is counted, how it is folded, and that it stays small."""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
from pathlib import Path

import pytest

from records import StatisticsPeriod, StatisticsPoint
from tests.storage.steps import make_job, opened, report, run_job, zipped

pytestmark = pytest.mark.quick

NOW = 1_800_000_000.0 + 1234


def totals(points: list[StatisticsPoint]) -> tuple[int, int, int, int]:
    """Return how many jobs were submitted, completed, failed and killed."""
    return (
        sum(point.submitted for point in points),
        sum(point.completed for point in points),
        sum(point.failed for point in points),
        sum(point.killed for point in points),
    )


def put(path: Path, *rows: tuple[int, float, int, str]) -> None:
    """Write rows of step, time, completed jobs and service, as counting and folding do."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executemany(
            "INSERT INTO statistic VALUES (?, ?, ?, ?, ?, 0, 0, 0, 1, 2.0, 1, 4.0)",
            [
                (step, int(time), service, completed, completed)
                for step, time, completed, service in rows
            ],
        )


def rows(path: Path) -> list[tuple[int, int]]:
    """Return the step and the completed jobs of each row, in order."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT step, completed FROM statistic ORDER BY step, time").fetchall()


async def test_each_transition_is_counted_with_its_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with opened(path) as store:
        await store.agents.record_connection("agent-1", "one")
        first, second = await make_job(store), await make_job(store)
        attempt_id = await run_job(store, first)
        await store.jobs.kill(second.id, "no longer wanted")
        now = second_of(path)
        (point, *_) = (
            point
            for point in reversed(await store.statistics.of(StatisticsPeriod.HOUR, now, None))
            if point.wait_seconds is not None
        )
        assert point.run_seconds is None
        assert totals(await store.statistics.of(StatisticsPeriod.HOUR, now, None)) == (2, 0, 0, 1)

        result = zipped(b"result")
        await store.attempts.finish("agent-1", report(attempt_id, result), 0, [result])
        points = await store.statistics.of(StatisticsPeriod.HOUR, second_of(path), "example")
        assert totals(points) == (2, 1, 0, 1)
        assert [point for point in points if point.run_seconds is not None]
        assert totals(await store.statistics.of(StatisticsPeriod.HOUR, now, "fold")) == (0, 0, 0, 0)


def second_of(path: Path) -> float:
    """Return when the last line of history was written."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return float(db.execute("SELECT max(at) FROM history").fetchone()[0])


@pytest.mark.parametrize(
    ("period", "points", "step"),
    [
        (StatisticsPeriod.HOUR, 60, 60),
        (StatisticsPeriod.DAY, 96, 900),
        (StatisticsPeriod.WEEK, 168, 3600),
    ],
)
async def test_a_period_has_equal_steps_up_to_now(
    tmp_path: Path, period: StatisticsPeriod, points: int, step: int
) -> None:
    path = tmp_path / "a.db"
    async with opened(path) as store:
        before = (NOW - step * points) // step * step - 60
        now = NOW // 60 * 60
        put(path, (60, now, 3, "example"), (60, now, 4, "other"), (60, before, 100, "example"))
        found = await store.statistics.of(period, NOW, None)
        assert len(found) == points
        assert {later.time - point.time for point, later in itertools.pairwise(found)} == {step}
        assert found[-1].time <= NOW < found[-1].time + step
        assert (found[-1].completed, totals(found)[1]) == (7, 7)
        assert (found[-1].wait_seconds, found[-1].run_seconds) == (2.0, 4.0)


async def test_old_minutes_become_hours_and_old_hours_go(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with opened(path) as store:
        hour = NOW // 3600 * 3600
        put(
            path,
            *((60, hour - minute * 60, 1, "example") for minute in range(3 * 24 * 60)),
            (3600, hour - 2 * 24 * 3600, 5, "example"),
            (3600, hour - 40 * 24 * 3600, 9, "example"),
        )
        before = await store.statistics.of(StatisticsPeriod.WEEK, NOW, None)
        await store.statistics.fold(NOW)
        await store.statistics.fold(NOW)
        assert await store.statistics.of(StatisticsPeriod.WEEK, NOW, None) == before
        kept = rows(path)
        assert sum(completed for _, completed in kept) == 3 * 24 * 60 + 5
        assert sum(step == 60 for step, _ in kept) <= 27 * 60
        day = await store.statistics.of(StatisticsPeriod.DAY, NOW, None)
        assert totals(day)[1] == (int(hour) - day[0].time) // 60 + 1
