"""What is asked about jobs: waiting for the end of one."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress

from aiohttp import web

from api_answers import BadRequest
from api_connection import ended_by_disconnection
from events import FeedClosed, Lagged, Subscription, Transition
from protocol import ACTIVE_STATES, JobState
from store import JobStatus, Store

_LONGEST_WAIT_SECONDS = 300
_DECIMAL = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_TRANSITIONS_BEHIND = 100


def wait_seconds_of(request: web.Request) -> float:
    """Return ``?wait`` in seconds, 0 without it. Raises :class:`BadRequest`."""
    text = request.query.get("wait", "0")
    if not _DECIMAL.fullmatch(text) or float(text) > _LONGEST_WAIT_SECONDS:
        raise BadRequest(f"wait: must be a number of seconds from 0 to {_LONGEST_WAIT_SECONDS}")
    return float(text)


async def status_within(
    request: web.Request, store: Store, job_id: int, seconds: float
) -> JobStatus | None:
    """Return a job's status as soon as it has ended, else as it is after ``seconds``.

    None if there is no such job. A server that stops does not wait. Raises
    :class:`ConnectionResetError` when the client goes away.
    """
    if not seconds:
        return await store.job_status(job_id)
    # subscribed before the state is read, so that the end can't come unnoticed in between
    with store.feed.transitions_of(job_id, _TRANSITIONS_BEHIND) as subscription:
        job = await store.job_status(job_id)
        if job is None or _has_ended(job.state):
            return job
        with ended_by_disconnection(request), suppress(TimeoutError, FeedClosed, Lagged):
            async with asyncio.timeout(seconds):
                await _wait_for_end(subscription)
    return await store.job_status(job_id)


async def _wait_for_end(subscription: Subscription) -> None:
    while True:
        event = await subscription.next()
        if isinstance(event, Transition) and _has_ended(event.after):
            return


def _has_ended(state: JobState) -> bool:
    return state is not JobState.QUEUED and state not in ACTIVE_STATES
