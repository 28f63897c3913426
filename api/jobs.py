"""What is asked about jobs: which there are, all about one, its history, and its end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from aiohttp import web

from api.answers import job_answer, resources_body, rfc3339, transition_body, usage_body
from api.callers import caller_name
from api.errors import UnknownJob
from api.filters import filter_of
from api.parameters import before_of, cursor_before, limit_of
from api.routes import job_id_of
from dispatch import Dispatcher
from jobs import JobState, Usage
from records import AttemptRecord, JobDetails, JobSummary, UserQueue
from store import Store
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")

_NOTHING_KNOWN = Usage(None, None, None)
_LOST = "Lost"  # how an attempt ended whose job was queued again


class JobHandlers:
    """The handlers for ``/jobs``."""

    def __init__(self, store: Store, dispatcher: Dispatcher) -> None:
        self._store = store
        self._dispatcher = dispatcher

    async def find(self, request: web.Request) -> web.StreamResponse:
        """Answer with the jobs that a filter lets through, newest first, a page at a time."""
        wanted = filter_of(request)
        page = await self._store.jobs.find(wanted, before_of(request), limit_of(request))
        body = {
            "jobs": [_summary_body(job) for job in page.jobs],
            "next_cursor": None if page.next_before is None else cursor_before(page.next_before),
        }
        return web.json_response(body)

    async def counts(self, request: web.Request) -> web.StreamResponse:
        """Answer with how many of the jobs that a filter lets through are in each state."""
        counts = await self._store.jobs.counts(filter_of(request))
        states = {state.value: counts[state] for state in JobState}
        return web.json_response({"total": counts.total(), "states": states})

    async def show(self, request: web.Request) -> web.StreamResponse:
        """Answer with all that is known of a job but its history."""
        job_id = job_id_of(request)
        details = await self._store.jobs.details(job_id)
        if details is None:
            raise UnknownJob
        queue = await self._queue_body(details.summary)
        reason = None if queue is None else queue["reason"]
        if details.summary.state is JobState.SUBMITTED:
            reason = self._dispatcher.why_not_running(job_id)
        return web.json_response(
            {**_details_body(details), "queue": queue, "waiting_reason": reason}
        )

    async def _queue_body(self, job: JobSummary) -> dict[str, Any] | None:
        if job.state is not JobState.QUEUED:
            return None
        # 1: it has left the line since its state was read
        position = await self._store.jobs.queue_position(job.id) or 1
        reason = self._dispatcher.why_waiting(UserQueue(job.service, job.user_id), job.resources)
        return {"position": position, "reason": reason}

    async def history(self, request: web.Request) -> web.StreamResponse:
        """Answer with the transitions of a job, oldest first."""
        job_id = job_id_of(request)
        transitions = await self._store.history.of_job(job_id)
        if not transitions:
            raise UnknownJob
        history = [transition_body(transition) for transition in transitions]
        return web.json_response({"id": job_id, "history": history})

    async def terminate(self, request: web.Request) -> web.StreamResponse:
        """End a job that has not ended."""
        # a client that goes away does not take back what it asked for
        job = await asyncio.shield(self._dispatcher.terminate(job_id_of(request)))
        if job is None:
            raise UnknownJob
        return job_answer(job)

    async def delete(self, request: web.Request) -> web.StreamResponse:
        """Free the bytes of a job that has ended."""
        job = await asyncio.shield(self._store.jobs.delete(job_id_of(request)))
        if job is None:
            raise UnknownJob
        event(log, "deleted", job=job.id, caller=caller_name(request))
        return job_answer(job)


# --- how it is told ---------------------------------------------------------------


def _summary_body(job: JobSummary) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.state.value,
        "message": job.message,
        "outcome": job.outcome and job.outcome.value,
        "user_id": job.user_id,
        "service": job.service,
        "name": job.name,
        "priority": job.priority,
        "timeout": job.timeout,
        "resources": resources_body(job.resources),
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
        "usage": usage_body(job.attempts[-1].usage if job.attempts else _NOTHING_KNOWN),
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
        "usage": usage_body(attempt.usage),
        "outcome": _LOST if outcome is JobState.QUEUED else outcome and outcome.value,
        "assigned_at": rfc3339(attempt.assigned_at),
        "started_at": rfc3339(attempt.started_at),
        "ended_at": rfc3339(attempt.ended_at),
    }
