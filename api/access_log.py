"""Which requests came, and how they were answered: counted, and written to the access log."""

from __future__ import annotations

import logging

from aiohttp import hdrs, web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.http_exceptions import HttpProcessingError

from api.callers import caller_name
from api.routes import Handler
from config import AccessLog, SettingsInForce
from telemetry.instruments import HttpInstruments
from telemetry.logs import event, make_event

_ROUTE = "route"
_SLOW_SECONDS = 1.0
_READING = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})


def access_logger(
    settings: SettingsInForce, instruments: HttpInstruments
) -> type[AbstractAccessLogger]:
    """Return what aiohttp calls after each answer; it takes a class, not an object."""

    class AccessLogger(AbstractAccessLogger):
        __slots__ = ()

        def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
            instruments.note(
                request.method if request.method in hdrs.METH_ALL else "other",
                request.get(_ROUTE, "none"),
                response.status,
                response.body_length,
            )
            match settings.current.access_log:
                case AccessLog.OFF:
                    return
                case AccessLog.NOTABLE if not _is_notable(request, response, time):
                    return
            # the path only: what is secret stands in a query or a header
            event(
                self.logger,
                "request",
                method=request.method,
                path=request.rel_url.raw_path,
                status=response.status,
                bytes=response.body_length,
                ms=round(time * 1000, 1),
                remote=request.remote,
                caller=caller_name(request),
            )

    return AccessLogger


def _is_notable(request: web.BaseRequest, response: web.StreamResponse, seconds: float) -> bool:
    return request.method not in _READING or response.status >= 400 or seconds >= _SLOW_SECONDS


@web.middleware
async def note_route(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Remember the path as a template, so that there are as many as there are routes.

    What can't be parsed as HTTP never comes here; it is counted and logged all the same.
    """
    resource = request.match_info.route.resource
    if resource is not None:
        request[_ROUTE] = resource.canonical
    return await handler(request)


def connection_logger() -> logging.Logger:
    """Return the logger for aiohttp's connections.

    A request that is not HTTP is a stranger's mistake, not an error of ours: it gets one line
    without a traceback.
    """
    logger = logging.getLogger("orchestrator.http")
    logger.addFilter(_tell_malformed_requests_shortly)
    return logger


def _tell_malformed_requests_shortly(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = None
        make_event(record, "malformed_request", error=error.message)
    return True
