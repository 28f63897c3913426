"""What the API answers: one shape for jobs, one for errors."""

from __future__ import annotations

import datetime
import json
from functools import lru_cache
from typing import Any

from aiohttp import hdrs, web

from events import Transition
from jobs import Resources, Usage
from records import JobStatus

_JSON = {hdrs.CONTENT_TYPE: "application/json; charset=utf-8"}


def error_answer(status: int, message: str, job_id: int = 0) -> web.Response:
    """Return an error in the documented shape; ``job_id`` 0 where no job is meant."""
    body = {"id": job_id, "status": "Unknown", "message": message}
    return web.json_response(body, status=status)


def job_answer(job: JobStatus, status: int = 200) -> web.Response:
    """Return a job's status in the documented shape."""
    return web.Response(body=_status_body(job), status=status, headers=_JSON)


@lru_cache(maxsize=256)
def _status_body(job: JobStatus) -> bytes:
    """Return the body, which is asked for again and again while a job waits or runs."""
    return json.dumps({"id": job.id, "status": job.state.value, "message": job.message}).encode()


def rfc3339(at: float | None) -> str | None:
    """Return a time, given in Unix seconds, in UTC as RFC 3339 writes it; None stays None."""
    if at is None:
        return None
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def resources_body(resources: Resources) -> dict[str, int | None]:
    """Return cores, bytes of memory (None: no limit, or not known) and GPUs."""
    return {"cpus": resources.cpus, "memory": resources.memory or None, "gpus": resources.gpus}


def transition_body(transition: Transition) -> dict[str, Any]:
    """Return one line of a job's history as users see it."""
    return {
        "id": transition.job_id,
        "status": transition.after.value,
        "message": transition.reason,
        "previous": None if transition.before is None else transition.before.value,
        "attempt": transition.attempt,
        "user_id": transition.user_id,
        "service": transition.service,
        "at": rfc3339(transition.at),
        "usage": None if transition.usage is None else usage_body(transition.usage),
    }


def usage_body(usage: Usage) -> dict[str, float | None]:
    """Return what an attempt used, as users see it."""
    return {
        "cpu_seconds": usage.cpu_seconds,
        "peak_memory": usage.peak_memory,
        "wall_seconds": usage.wall_seconds,
    }
