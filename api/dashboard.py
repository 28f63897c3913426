"""The dashboard: static files that ship with the program, read and compressed once."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import hdrs, web

from api.errors import NotFound
from runtime import data_file

_INDEX = "index.html"
_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_EXAMPLE_TYPE = "application/octet-stream"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # kept, but asked for each time: after an upgrade no old module meets a new one
    hdrs.CACHE_CONTROL: "no-cache",
    hdrs.VARY: "Accept-Encoding",
}
_GREETING = "Orchestrator is running\n"
_GREETING_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Orchestrator</title>
<meta http-equiv="refresh" content="0; url=ui/"></head>
<body><p>Orchestrator is running. <a href="ui/">Open the dashboard</a></p></body></html>
"""


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it is sent; ``tag`` changes with its bytes."""

    content_type: str
    plain: bytes
    compressed: bytes
    tag: str


class DashboardHandlers:
    """The handlers for ``/`` and ``/ui/``. They show nothing of the server, so all may ask."""

    def __init__(self) -> None:
        self._files = dict(_read_files())

    async def ping(self, request: web.Request) -> web.StreamResponse:
        """``GET /``: say that the server runs, to browsers with the way to the dashboard."""
        if "text/html" not in request.headers.get(hdrs.ACCEPT, ""):
            return web.Response(text=_GREETING, headers={hdrs.VARY: "Accept"})
        headers = {**_HEADERS, hdrs.VARY: "Accept"}
        return web.Response(text=_GREETING_PAGE, content_type="text/html", headers=headers)

    async def enter(self, request: web.Request) -> web.StreamResponse:
        """``GET /ui``: the addresses in the page need the slash at its end."""
        raise web.HTTPPermanentRedirect("ui/")

    async def page(self, request: web.Request) -> web.StreamResponse:
        """``GET /ui/``: the page itself."""
        return self._answer(request, _INDEX)

    async def file(self, request: web.Request) -> web.StreamResponse:
        """``GET /ui/{path}``: what the page is made of."""
        return self._answer(request, request.match_info["path"])

    def _answer(self, request: web.Request, path: str) -> web.Response:
        file = self._files.get(path)
        if file is None:
            raise NotFound("the dashboard has no such file")
        is_compressed = "gzip" in request.headers.get(hdrs.ACCEPT_ENCODING, "").lower()
        tag = f"{file.tag}-gzip" if is_compressed else file.tag
        headers = {**_HEADERS, hdrs.ETAG: f'"{tag}"'}
        # weak comparison, and either form of it will do: they hold the same (RFC 9110, 13.1.2)
        known = {known.value for known in request.if_none_match or ()}
        if known & {file.tag, f"{file.tag}-gzip", "*"}:
            return web.Response(status=304, headers=headers)
        headers[hdrs.CONTENT_TYPE] = file.content_type
        if is_compressed:
            headers[hdrs.CONTENT_ENCODING] = "gzip"
        return web.Response(body=file.compressed if is_compressed else file.plain, headers=headers)


def _read_files() -> Iterator[tuple[str, _File]]:
    dashboard = data_file("dashboard")
    for path in sorted(dashboard.rglob("*")):
        if path.suffix in _TYPES:
            yield path.relative_to(dashboard).as_posix(), _read(path, _TYPES[path.suffix])
    # the page offers to submit it
    for path in sorted(data_file("examples").iterdir()):
        yield f"example/{path.name}", _read(path, _EXAMPLE_TYPE)


def _read(path: Path, content_type: str) -> _File:
    plain = path.read_bytes()
    # no time of day in it: the same bytes for the same file
    compressed = gzip.compress(plain, mtime=0)
    return _File(content_type, plain, compressed, hashlib.sha256(plain).hexdigest()[:32])
