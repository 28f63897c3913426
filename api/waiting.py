"""Waiting for the end of a job."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aiohttp import web

from api.connection import ended_by_disconnection
from events import FeedClosed, Lagged, Subscription, Transition
from jobs import has_ended
from records import JobStatus
from store import Store

_TRANSITIONS_BEHIND = 100


async def status_within(
    request: web.Request, store: Store, job_id: int, seconds: float
) -> JobStatus | None:
    """Return a job's status as soon as it has ended, else as it is after ``seconds``.

    None if there is no such job. A server that stops does not wait. Raises
    :class:`ConnectionResetError` when the client goes away.
    """
    if not seconds:
        return await store.jobs.status(job_id)
    # subscribed before the state is read, so that the end can't come unnoticed in between
    with store.feed.transitions_of(job_id, _TRANSITIONS_BEHIND) as subscription:
        job = await store.jobs.status(job_id)
        if job is None or has_ended(job.state):
            return job
        with ended_by_disconnection(request), suppress(TimeoutError, FeedClosed, Lagged):
            async with asyncio.timeout(seconds):
                await _wait_for_end(subscription)
    return await store.jobs.status(job_id)


async def _wait_for_end(subscription: Subscription) -> None:
    while True:
        event = await subscription.next()
        if isinstance(event, Transition) and has_ended(event.after):
            return
