"""What is done to many jobs at once: those that a filter lets through, some at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from api.callers import caller_name
from api.filters import demanded_filter_of
from config import SettingsInForce
from dispatch import Dispatcher
from records import JobFilter
from store import Store
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")

_JOBS_AT_A_TIME = 200  # in one transaction, which everybody else's writes wait for


@dataclass(slots=True)
class _Tally:
    """How many jobs there were, and to how many it was done; the new jobs, if it makes some."""

    matched: int = 0
    done: int = 0
    jobs: list[int] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """Return what is answered."""
        return {"matched": self.matched, "done": self.done, "skipped": self.matched - self.done}


class ManyJobsHandlers:
    """The handlers for many jobs. What was begun goes on when the client goes away."""

    def __init__(self, store: Store, dispatcher: Dispatcher, settings: SettingsInForce) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._settings = settings

    async def terminate(self, request: web.Request) -> web.StreamResponse:
        """``POST /jobs/terminate``: end those that have not ended."""
        wanted = demanded_filter_of(request)
        tally = await asyncio.shield(self._terminate_all(wanted))
        event(log, "terminated_many", caller=caller_name(request), **tally.body())
        return web.json_response(tally.body())

    async def _terminate_all(self, wanted: JobFilter) -> _Tally:
        tally = _Tally()
        async for ids in self._some_ids(wanted):
            tally.matched += len(ids)
            tally.done += await self._dispatcher.terminate_many(ids)
        return tally

    async def rerun(self, request: web.Request) -> web.StreamResponse:
        """``POST /jobs/rerun``: make a new job of each whose input is still stored."""
        wanted = demanded_filter_of(request)
        tally = await asyncio.shield(self._rerun_all(wanted))
        event(log, "rerun_many", caller=caller_name(request), **tally.body())
        return web.json_response({**tally.body(), "jobs": tally.jobs})

    async def _rerun_all(self, wanted: JobFilter) -> _Tally:
        tally = _Tally()
        settings = self._settings.current
        async for ids in self._some_ids(wanted):
            made = await self._store.uploads.rerun_many(
                ids, settings.max_queued_jobs, settings.services
            )
            tally.matched += len(ids)
            tally.done += len(made)
            tally.jobs += [job.id for job in made]
        return tally

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """``POST /jobs/delete``: free the bytes of those that have ended."""
        wanted = demanded_filter_of(request)
        tally = await asyncio.shield(self._delete_all(wanted))
        event(log, "deleted_many", caller=caller_name(request), **tally.body())
        return web.json_response(tally.body())

    async def _delete_all(self, wanted: JobFilter) -> _Tally:
        tally = _Tally()
        async for ids in self._some_ids(wanted):
            tally.matched += len(ids)
            tally.done += await self._store.jobs.delete_many(ids)
        return tally

    async def _some_ids(self, wanted: JobFilter) -> AsyncIterator[Sequence[int]]:
        """Yield the ids of all jobs that match, newest first; jobs made meanwhile are not met."""
        before: int | None = None
        while True:
            page = await self._store.jobs.find_ids(wanted, before, _JOBS_AT_A_TIME)
            if page.ids:
                yield page.ids
            before = page.next_before
            if before is None:
                return
