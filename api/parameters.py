"""Parameters of requests: parsed into what they mean, or refused by their names."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import TypeVar

from aiohttp import web
from aiohttp.typedefs import Middleware

from api.errors import BadRequest
from api.routes import Handler, Policy
from config import ServiceLimits
from jobs import JobState

T = TypeVar("T")

_INTEGER = re.compile(r"[+-]?[0-9]{1,20}")
_DECIMAL = re.compile(r"[0-9]{1,12}(\.[0-9]{0,9})?")
_MAX_INTEGER = 2**63 - 1
_MAX_KEY_CHARACTERS = 255
_DEFAULT_PAGE, _MAX_PAGE = 100, 1000
_MAX_WAIT_SECONDS = 300


def refuse_unknown(policy: Policy) -> Middleware:
    """Refuse a query parameter that its route does not know: misspelt, it would do nothing."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.query_string and (known := policy.access_of(request).query) is not None:
            for name in request.query:
                if name not in known:
                    raise BadRequest(f"{name!r:.80}: there is no such parameter here")
        return await handler(request)

    return guard


# --- of forms and queries ---------------------------------------------------------


def integer_from(name: str, text: str) -> int:
    """Return an integer; raises :class:`BadRequest` for anything else."""
    if not _INTEGER.fullmatch(text):
        raise BadRequest(f"{name}: must be an integer")
    return int(text)


def user_id_from(text: str) -> int:
    """Return a user's id; raises :class:`BadRequest` for what is none."""
    user_id = integer_from("user_id", text)
    if not -_MAX_INTEGER - 1 <= user_id <= _MAX_INTEGER:
        raise BadRequest("user_id: does not fit into 64 bits")
    return user_id


def service_from(service: str, services: Mapping[str, ServiceLimits]) -> ServiceLimits:
    """Return the limits of a service; raises :class:`BadRequest` if it is not configured."""
    limits = services.get(service)
    if limits is None:
        raise BadRequest(
            f"service: unknown service {service!r:.80}; GET /services tells which there are"
        )
    return limits


def id_from(text: str) -> int:
    """Return a job's id; raises :class:`BadRequest` for what can't be one."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) > _MAX_INTEGER:
        raise BadRequest("id: must be the id of a job")
    return int(text)


def state_from(text: str) -> JobState:
    """Return a state; raises :class:`BadRequest`."""
    try:
        return JobState(text.strip())
    except ValueError:
        raise BadRequest(f"status: must be some of {', '.join(JobState)}") from None


def time_from(text: str) -> float:
    """Return a time given as RFC 3339 or in Unix seconds, in Unix seconds."""
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


def tag_from(text: str) -> tuple[str, str]:
    """Return key and value of a tag that is asked for; raises :class:`BadRequest`."""
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise BadRequest("tag: must be key:value")
    return key, value


# --- of a request -----------------------------------------------------------------


def choice(request: web.Request, name: str, default: str, choices: Mapping[str, T]) -> T:
    """Return what the value of a parameter stands for; raises :class:`BadRequest`."""
    value = request.query.get(name, default)
    if value not in choices:
        raise BadRequest(f"{name}: must be {' or '.join(choices)}")
    return choices[value]


def offset_of(request: web.Request) -> int:
    """Return ``?offset`` in bytes, 0 without it; raises :class:`BadRequest`."""
    text = request.query.get("offset", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise BadRequest("offset: must be a number of bytes")
    return int(text)


def wait_seconds_of(request: web.Request) -> float:
    """Return ``?wait`` in seconds, 0 without it; raises :class:`BadRequest`."""
    text = request.query.get("wait")
    if text is None:
        return 0.0
    if not _DECIMAL.fullmatch(text) or float(text) > _MAX_WAIT_SECONDS:
        raise BadRequest(f"wait: must be a number of seconds from 0 to {_MAX_WAIT_SECONDS}")
    return float(text)


def limit_of(request: web.Request) -> int:
    """Return how long a page may be; raises :class:`BadRequest`."""
    text = request.query.get("limit", str(_DEFAULT_PAGE))
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= _MAX_PAGE:
        raise BadRequest(f"limit: must be an integer from 1 to {_MAX_PAGE}")
    return int(text)


def idempotency_key_of(request: web.Request) -> str | None:
    """Return the name that the client gave to its request; raises :class:`BadRequest`."""
    values = request.headers.getall("Idempotency-Key", [])
    if not values:
        return None
    if len(values) > 1:
        raise BadRequest("Idempotency-Key: given more than once")
    if not 1 <= len(values[0]) <= _MAX_KEY_CHARACTERS or not values[0].isprintable():
        raise BadRequest(
            f"Idempotency-Key: must be 1 to {_MAX_KEY_CHARACTERS} printable characters"
        )
    return values[0]


# --- cursors ----------------------------------------------------------------------


def cursor_before(job_id: int) -> str:
    """Hide the job id in something that nobody is tempted to compute with."""
    return base64.urlsafe_b64encode(b"before:%d" % job_id).decode().rstrip("=")


def before_of(request: web.Request) -> int | None:
    """Return the job id of ``?cursor``, None without it; raises :class:`BadRequest`."""
    text = request.query.get("cursor")
    if text is None:
        return None
    with suppress(ValueError):
        plain = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        if match := re.fullmatch(b"before:([0-9]{1,18})", plain):
            return int(match[1])
    raise BadRequest("cursor: must be the next_cursor of an earlier answer")


def place_of(request: web.Request) -> int:
    """Return the place in a list of files that ``?cursor`` is, 0 without it."""
    text = request.query.get("cursor", "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise BadRequest("cursor: not one that an earlier page gave")
    return int(text)
