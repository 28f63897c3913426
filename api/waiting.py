"""Waiting for the end of a job."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from aiohttp import web

from api.connection import ended_by_disconnection
from events import EndSubscription, FeedClosed, Lagged, SmallResult
from jobs import has_ended
from records import JobStatus, StoredResult
from store import Store

_TRANSITIONS_BEHIND = 100


@dataclass(frozen=True, slots=True)
class Awaited:
    """A job as it is after the wait (None: no such job).

    Its ``result`` comes along if it is small and was stored meanwhile.
    """

    job: JobStatus | None
    result: StoredResult | None = None


async def end_within(request: web.Request, store: Store, job_id: int, seconds: float) -> Awaited:
    """Return a job as soon as it has ended, else as it is after ``seconds``.

    A server that stops does not wait. Raises :class:`ConnectionResetError` when the client goes
    away.
    """
    if not seconds:
        return Awaited(await store.jobs.status(job_id))
    # subscribed before the state is read, so that the end can't come unnoticed in between
    with store.feed.end_of(job_id, _TRANSITIONS_BEHIND) as subscription:
        job = await store.jobs.status(job_id)
        if job is None or has_ended(job.state):
            return Awaited(job)
        result: StoredResult | None = None
        with ended_by_disconnection(request), suppress(TimeoutError, FeedClosed, Lagged):
            async with asyncio.timeout(seconds):
                result = await _wait_for_end(subscription)
    return Awaited(await store.jobs.status(job_id), result)


async def _wait_for_end(subscription: EndSubscription) -> StoredResult | None:
    result: StoredResult | None = None
    while True:
        told = await subscription.next()
        if isinstance(told, SmallResult):
            content = told.content
            result = StoredResult(told.blob_id, len(content), told.sha256, content)
        elif has_ended(told.after):
            return result
