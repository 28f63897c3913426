"""Which requests came, and how they were answered: counted, and written to the access log."""

from __future__ import annotations

from aiohttp import hdrs, web
from aiohttp.abc import AbstractAccessLogger

from config import AccessLog, SettingsInForce
from instruments import HttpInstruments

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
                _documented_path(request),
                response.status,
                response.body_length,
            )
            match settings.current.access_log:
                case AccessLog.OFF:
                    return
                case AccessLog.NOTABLE if not _is_notable(request, response, time):
                    return
            # The path only: what is secret stands in a query or a header. It is quoted, since
            # what a client sends may hold any character.
            self.logger.info(
                "event=request method=%s path=%r status=%d bytes=%d ms=%.1f remote=%s",
                request.method,
                request.rel_url.raw_path,
                response.status,
                response.body_length,
                time * 1000,
                request.remote,
            )

    return AccessLogger


def _is_notable(request: web.BaseRequest, response: web.StreamResponse, seconds: float) -> bool:
    return request.method not in _READING or response.status >= 400 or seconds >= _SLOW_SECONDS


def _documented_path(request: web.BaseRequest) -> str:
    """Return the path as a template, so that there are as many as there are routes."""
    if not isinstance(request, web.Request) or request.match_info.route.resource is None:
        return "none"
    return request.match_info.route.resource.canonical
