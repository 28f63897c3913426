"""How it went: numbers of jobs, waits and run times over an hour, a day, a week."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from api.errors import BadRequest
from records import StatisticsPeriod, StatisticsPoint
from store import Store

_PERIODS: Mapping[str, StatisticsPeriod] = {period.label: period for period in StatisticsPeriod}


class StatisticsHandlers:
    """The handler for ``/stats``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def show(self, request: web.Request) -> web.StreamResponse:
        """``GET /stats``: points of a period that ends now, and how full the disk is."""
        period, service = _asked_for(request)
        points = await self._store.statistics.of(period, time.time(), service)
        disk = self._store.statistics.disk_space()
        body = {
            "period": period.label,
            "step_seconds": period.step_seconds,
            "points": [_point_body(point) for point in points],
            "disk": {"free": disk.free, "total": disk.total, "database": disk.database},
        }
        return web.json_response(body)


def _asked_for(request: web.Request) -> tuple[StatisticsPeriod, str | None]:
    label = request.query.get("period", StatisticsPeriod.HOUR.label)
    if label not in _PERIODS:
        raise BadRequest(f"period: must be {' or '.join(_PERIODS)}")
    return _PERIODS[label], request.query.get("service")


def _point_body(point: StatisticsPoint) -> dict[str, Any]:
    return {
        "time": point.time,
        "submitted": point.submitted,
        "completed": point.completed,
        "failed": point.failed,
        "killed": point.killed,
        "invalid": point.invalid,
        "wait_seconds": _rounded(point.wait_seconds),
        "run_seconds": _rounded(point.run_seconds),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
