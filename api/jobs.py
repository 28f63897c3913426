"""What is asked about jobs: which there are, all about one, its history, and its end."""

from __future__ import annotations

import asyncio
import base64
import re
from contextlib import suppress
from datetime import datetime
from typing import Any

from aiohttp import web

from api.answers import BadRequest, UnknownJob, job_id_of, rfc3339, transition_body
from api.connection import ended_by_disconnection
from api.form import checked_user_id
from api.tokens import check_user, user_restriction
from dispatch import Dispatcher
from events import FeedClosed, Lagged, Subscription, Transition
from jobs import JobState, has_ended
from records import AttemptRecord, JobDetails, JobFilter, JobStatus, JobSummary, UserQueue
from store import Store

_DEFAULT_PAGE, _LARGEST_PAGE = 100, 1000
_LONGEST_WAIT_SECONDS = 300
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{0,9})?")
_TRANSITIONS_BEHIND = 100
_LOST = "Lost"  # how an attempt ended whose job was queued again


class JobHandlers:
    """The handlers for ``/jobs``."""

    def __init__(self, store: Store, dispatcher: Dispatcher) -> None:
        self._store = store
        self._dispatcher = dispatcher

    async def find(self, request: web.Request) -> web.StreamResponse:
        """Answer with the jobs that a filter lets through, newest first, a page at a time."""
        wanted = _filter_of(request)
        page = await self._store.jobs.find(wanted, _before_of(request), _limit_of(request))
        body = {
            "jobs": [_summary_body(job) for job in page.jobs],
            "next_cursor": None if page.next_before is None else _cursor(page.next_before),
        }
        return web.json_response(body)

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Answer with all that is known of a job but its history."""
        job_id = job_id_of(request)
        details = await self._store.jobs.details(job_id)
        if details is None:
            raise UnknownJob
        queue = await self._queue_body(details.summary)
        return web.json_response({**_details_body(details), "queue": queue})

    async def _queue_body(self, job: JobSummary) -> dict[str, Any] | None:
        if job.state is not JobState.QUEUED:
            return None
        # 1: it has left the line since its state was read
        position = await self._store.jobs.queue_position(job.id) or 1
        reason = self._dispatcher.why_waiting(UserQueue(job.service, job.user_id))
        return {"position": position, "reason": reason}

    async def history(self, request: web.Request) -> web.StreamResponse:
        """Answer with the transitions of a job, oldest first."""
        job_id = job_id_of(request)
        transitions = await self._store.history.of_job(job_id)
        if not transitions:
            raise UnknownJob
        history = [transition_body(transition) for transition in transitions]
        return web.json_response({"id": job_id, "history": history})


# --- what is asked for ------------------------------------------------------------


def user_id_of(request: web.Request) -> int | None:
    """Return the user whose jobs alone are asked for, or may be shown; None for all.

    The one place that decides it for lists and streams. Raises :class:`BadRequest`, and
    :class:`Forbidden` if the caller's token is bound to another user.
    """
    if "user_id" not in request.query:
        return user_restriction(request)
    user_id = checked_user_id(request.query["user_id"])
    check_user(request, user_id)
    return user_id


def _filter_of(request: web.Request) -> JobFilter:
    query = request.query
    return JobFilter(
        user_id=user_id_of(request),
        service=query.get("service"),
        states=frozenset(
            _state_of(word) for text in query.getall("status", []) for word in text.split(",")
        ),
        agent=query.get("agent"),
        since=_time_of(query["since"]) if "since" in query else None,
        text=query.get("text"),
        tags=tuple(_tag_of(text) for text in query.getall("tag", [])),
    )


def _state_of(text: str) -> JobState:
    try:
        return JobState(text.strip())
    except ValueError:
        raise BadRequest(f"status: must be some of {', '.join(JobState)}") from None


def _time_of(text: str) -> float:
    """Parse a time as RFC 3339 or in Unix seconds."""
    problem = "since: must be a time, like 2026-01-31T09:00:00Z, or Unix seconds"
    try:
        if _DECIMAL.fullmatch(text):
            return float(text)
        # a + that was not escaped in the URL arrives as a space
        time = datetime.fromisoformat(re.sub(r" (\d\d:\d\d)$", r"+\1", text))
    except ValueError:
        raise BadRequest(problem) from None
    if time.tzinfo is None:
        raise BadRequest(f"{problem}; the Z or the offset is missing")
    return time.timestamp()


def _tag_of(text: str) -> tuple[str, str]:
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise BadRequest("tag: must be key:value")
    return key, value


def _limit_of(request: web.Request) -> int:
    text = request.query.get("limit", str(_DEFAULT_PAGE))
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= _LARGEST_PAGE:
        raise BadRequest(f"limit: must be an integer from 1 to {_LARGEST_PAGE}")
    return int(text)


def _cursor(before: int) -> str:
    """Hide the job id in something that nobody is tempted to compute with."""
    return base64.urlsafe_b64encode(b"before:%d" % before).decode().rstrip("=")


def _before_of(request: web.Request) -> int | None:
    text = request.query.get("cursor")
    if text is None:
        return None
    with suppress(ValueError):
        plain = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        if match := re.fullmatch(b"before:([0-9]{1,18})", plain):
            return int(match[1])
    raise BadRequest("cursor: must be the next_cursor of an earlier answer")


# --- how it is told ---------------------------------------------------------------


def _summary_body(job: JobSummary) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.state.value,
        "message": job.message,
        "user_id": job.user_id,
        "service": job.service,
        "name": job.name,
        "priority": job.priority,
        "timeout": job.timeout,
        "tags": dict(job.tags),
        "dest_id": job.attempt_id,
        "agent": job.agent,
        "created_at": rfc3339(job.created_at),
        "changed_at": rfc3339(job.changed_at),
        "started_at": rfc3339(job.started_at),
        "finished_at": rfc3339(job.finished_at),
    }


def _details_body(job: JobDetails) -> dict[str, Any]:
    result = job.result
    return {
        **_summary_body(job.summary),
        "attempts": [_attempt_body(attempt) for attempt in job.attempts],
        "files": [
            {"name": file.name, "size": file.size, "sha256": file.sha256} for file in job.files
        ],
        "result": None if result is None else {"size": result.size, "sha256": result.sha256},
    }


def _attempt_body(attempt: AttemptRecord) -> dict[str, Any]:
    outcome = attempt.outcome
    return {
        "id": attempt.id,
        "number": attempt.number,
        "agent": attempt.agent,
        "exit_code": attempt.exit_code,
        "message": attempt.message,
        "outcome": _LOST if outcome is JobState.QUEUED else outcome and outcome.value,
        "assigned_at": rfc3339(attempt.assigned_at),
        "started_at": rfc3339(attempt.started_at),
        "ended_at": rfc3339(attempt.ended_at),
    }


# --- waiting for the end ----------------------------------------------------------


def wait_seconds_of(request: web.Request) -> float:
    """Return ``?wait`` in seconds, 0 without it. Raises :class:`BadRequest`."""
    text = request.query.get("wait")
    if text is None:
        return 0.0
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
