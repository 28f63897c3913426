"""What can go wrong in a request, and the one place where that becomes a status.

The store's and the dispatcher's errors are in the mapping, too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from aiohttp import hdrs, web

from api.answers import error_answer
from api.connection import break_off
from api.routes import Handler, job_id_of
from archive.reader import DamagedArchive
from config import MAX_UPLOAD_BYTES
from fleet.termination import AlreadyFinal
from records import InputGone, KeyReused, NotEnded, QueueFull, StoreError, StoreFull
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")

_UPLOAD_RETRY_SECONDS = 2
_QUEUE_RETRY_SECONDS = 30
_IS_BEGUN = "is_begun"
_CLIENT_GONE = 499  # nginx's; nobody reads it but the log


class ApiError(Exception):
    """A request that is refused with ``status``; the message is for the asker."""

    status = 500


class BadRequest(ApiError):
    """The request can't be understood or obeyed; the message names the field."""

    status = 400


class Unauthorized(ApiError):
    """The asker has to show a valid token."""

    status = 401


class Forbidden(ApiError):
    """The asker may not do this."""

    status = 403


class NotFound(ApiError):
    """There is no such thing; the message says what was looked for."""

    status = 404


class UnknownJob(ApiError):
    """There is no job of the id in the path, or none that the asker may see."""

    status = 404


class ClientStalled(ApiError):
    """The client sent nothing for too long in the middle of a request."""

    status = 408


class Conflict(ApiError):
    """The state of things does not allow it; the message says why."""

    status = 409


class PreconditionFailed(ApiError):
    """The file is not the one that the request is about (RFC 9110, 13.1.1)."""

    status = 412


class UploadTooLarge(ApiError):
    """The request is longer than the limit."""

    status = 413

    def __init__(self) -> None:
        super().__init__(f"the request is larger than {MAX_UPLOAD_BYTES // 1024**2} MB")


class UnsupportedMedia(ApiError):
    """The request's body is in a form that is not understood."""

    status = 415


class ExpectationFailed(ApiError):
    """The client expects what the server does not do (RFC 9110, 10.1.1)."""

    status = 417


class TooManyUploadsOfUser(ApiError):
    """As many uploads of this user as allowed are arriving."""

    status = 429


class TooManyUploads(ApiError):
    """As many uploads of all users as allowed are arriving."""

    status = 503


_STATUSES: Mapping[type[Exception], int] = {
    AlreadyFinal: 409,
    KeyReused: 409,
    InputGone: 409,
    NotEnded: 409,
    QueueFull: 429,
    StoreFull: 507,
    StoreError: 500,
    DamagedArchive: 500,
}
"""What is answered with its own message, and how; the first that fits counts."""

_RETRY_SECONDS: Mapping[type[Exception], int] = {
    TooManyUploadsOfUser: _UPLOAD_RETRY_SECONDS,
    TooManyUploads: _UPLOAD_RETRY_SECONDS,
    QueueFull: _QUEUE_RETRY_SECONDS,
}
"""When to try again (RFC 9110, 10.2.3)."""


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every failure in the error shape; one within an answer ends the connection.

    What is written after the start of an answer is its body to the client, whatever it says.
    """
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = _of_http_exception(request, error)
    except ConnectionError:
        # nobody reads this; aiohttp would log what is raised as an error
        return error_answer(_CLIENT_GONE, "the client is gone")
    except Exception as error:  # noqa: BLE001 - it is answered and, if unknown, logged
        answer = _of_exception(request, error)
    if request.get(_IS_BEGUN):
        event(log, "answer_broken_off", level=logging.WARNING, path=request.path)
        break_off(request)
    return answer


async def note_beginning(request: web.Request, _: web.StreamResponse) -> None:
    """For aiohttp's signal before an answer is sent."""
    request[_IS_BEGUN] = True


def _of_exception(request: web.Request, error: Exception) -> web.Response:
    status = _status_of(error)
    if status is None:
        where = {"method": request.method, "path": request.path}
        event(log, "internal_error", level=logging.ERROR, exc_info=error, **where)
        return error_answer(500, "internal error; see the server's log")
    if status == 500:
        event(log, "store_error", level=logging.ERROR, path=request.path, error=str(error))
    job_id = max(job_id_of(request), 0) if _means_the_job(request, error, status) else 0
    message = (
        f"there is no job {request.match_info['id']}"
        if isinstance(error, UnknownJob)
        else str(error)
    )
    answer = error_answer(status, message, job_id)
    if isinstance(error, Unauthorized):
        answer.headers[hdrs.WWW_AUTHENTICATE] = 'Bearer realm="orchestrator"'
    if isinstance(error, ClientStalled):
        answer.force_close()  # the rest of the request would be read as another one
    if (seconds := _RETRY_SECONDS.get(type(error))) is not None:
        answer.headers[hdrs.RETRY_AFTER] = str(seconds)
    return answer


def _status_of(error: Exception) -> int | None:
    if isinstance(error, ApiError):
        return error.status
    return next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), None)


def _message_of(request: web.Request, error: Exception) -> str:
    if isinstance(error, UnknownJob):
        return f"there is no job {request.match_info['id']}"
    return str(error)


def _means_the_job(request: web.Request, error: Exception, status: int) -> bool:
    return isinstance(error, UnknownJob) or (status == 409 and "id" in request.match_info)


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
