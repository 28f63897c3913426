"""What the API answers: one shape for jobs, one for errors, and which error has which status."""

from __future__ import annotations

import datetime
import json
import logging
import re
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from aiohttp import hdrs, web

from config import MAX_UPLOAD_BYTES
from dispatch import AlreadyFinal
from events import Transition
from records import InputGone, JobStatus, KeyReused, QueueFull, StoreError, StoreFull

log = logging.getLogger("orchestrator.api")

_DIGITS = re.compile(r"[0-9]{1,19}")
_LARGEST_INTEGER = 2**63 - 1
_JSON = {hdrs.CONTENT_TYPE: "application/json; charset=utf-8"}
_UPLOAD_RETRY_SECONDS = 2
_QUEUE_RETRY_SECONDS = 30

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BadRequest(Exception):
    """The request can't be understood or obeyed; the message names the field. 400."""


class UnknownJob(Exception):
    """There is no job of the id in the request's path, or none that the asker may see. 404."""


class NotFound(Exception):
    """There is no such thing; the message says what was looked for. 404."""


class Conflict(Exception):
    """The state of things does not allow it; the message says why. 409."""


class Unauthorized(Exception):
    """The asker has to show a valid token. 401."""


class Forbidden(Exception):
    """The asker may not do this; the message says why. 403."""


class TooManyUploads(Exception):
    """As many uploads as allowed are arriving, of this user (429) or of all (503)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ClientStalled(Exception):
    """The client sent nothing for too long in the middle of a request."""


class UploadTooLarge(Exception):
    """The request is longer than the limit. 413."""


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
    }


def job_id_of(request: web.Request) -> int:
    """Return the job id of the path; -1, which no job has, for what can't be one."""
    text = request.match_info["id"]
    job_id = int(text) if _DIGITS.fullmatch(text) else -1
    return job_id if job_id <= _LARGEST_INTEGER else -1


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in the error shape; the one place where errors become statuses."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _of_http_exception(request, error)
    except ConnectionError:
        # nobody reads this (the status is nginx's); aiohttp would log what is raised as an error
        return error_answer(499, "the client is gone")
    except Exception as error:  # noqa: BLE001 - it is answered and, if unknown, logged
        return _of_exception(request, error)


def _of_exception(request: web.Request, error: Exception) -> web.Response:
    match error:
        case BadRequest():
            return error_answer(400, str(error))
        case UnknownJob():
            job_id = max(job_id_of(request), 0)
            return error_answer(404, f"there is no job {request.match_info['id']}", job_id)
        case NotFound():
            return error_answer(404, str(error))
        case Unauthorized():
            answer = error_answer(401, str(error))
            answer.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="orchestrator"'
            return answer
        case Forbidden():
            return error_answer(403, str(error))
        case AlreadyFinal() | Conflict() | KeyReused() | InputGone():
            job_id = max(job_id_of(request), 0) if "id" in request.match_info else 0
            return error_answer(409, str(error), job_id)
        case ClientStalled():
            answer = error_answer(408, str(error))
            answer.force_close()  # the rest of the request would be read as another one
            return answer
        case UploadTooLarge():
            limit = MAX_UPLOAD_BYTES // (1024 * 1024)
            return error_answer(413, f"the request is larger than {limit} MB")
        case TooManyUploads():
            return _come_back(error_answer(error.status, str(error)), _UPLOAD_RETRY_SECONDS)
        case QueueFull():
            return _come_back(error_answer(429, str(error)), _QUEUE_RETRY_SECONDS)
        case StoreFull():
            return error_answer(507, str(error))
        case StoreError():
            log.error("event=store_error path=%s error=%r", request.path, str(error))
            return error_answer(500, str(error))
    log.error(
        "event=internal_error method=%s path=%s", request.method, request.path, exc_info=error
    )
    return error_answer(500, "internal error; see the server's log")


def _come_back(answer: web.Response, seconds: int) -> web.Response:
    """Say when to try again (RFC 9110, 10.2.3)."""
    answer.headers[hdrs.RETRY_AFTER] = str(seconds)
    return answer


def _of_http_exception(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    if error.status < 400:
        raise error
    messages = {
        404: f"there is nothing at {request.path}",
        405: f"{request.path} does not allow {request.method}",
    }
    answer = error_answer(error.status, messages.get(error.status, error.reason))
    if hdrs.ALLOW in error.headers:
        answer.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
    return answer
