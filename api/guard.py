"""Who may ask: not the pages of other sites, nor who calls the server by a strange name."""

from __future__ import annotations

import ipaddress
import re
import socket
from functools import lru_cache

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from api.answers import error_answer
from api.errors import BadRequest, ExpectationFailed
from api.routes import Handler
from config import SettingsInForce

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_ORIGIN = re.compile(rf"[A-Za-z][A-Za-z0-9+.-]*://(?P<host>{_HOST.pattern})")
_DOCUMENTATION_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""The library's page has its script and style in it; it loads nothing from elsewhere."""

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def refuse_strangers(settings: SettingsInForce) -> Middleware:
    """Refuse what a web page of another site sends: a foreign Origin or a Host not ours.

    The Host check defeats DNS rebinding, the Origin check forged forms and scripts.
    """
    names = {name.lower() for name in (socket.gethostname(), socket.getfqdn())}
    names |= {settings.current.host.lower(), "localhost"}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = _host_name(request.headers.get(hdrs.HOST, ""))
        if host is None or not (
            host in names
            or host in settings.current.allowed_hosts
            or _is_own_address(request, host)
        ):
            return error_answer(403, "this Host is not a name of this server (see ALLOWED_HOSTS)")
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is not None and not _is_same_origin(origin, request.headers[hdrs.HOST]):
            return error_answer(403, "requests from pages of another origin are refused")
        if origin is None and _is_of_another_site(request):
            return error_answer(403, "requests from pages of another site are refused")
        return await handler(request)

    return guard


@web.middleware
async def refuse_expectations(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what nobody can meet; 100-continue is met by who wants the body."""
    expected = request.headers.get(hdrs.EXPECT, "100-continue")
    if expected.lower() != "100-continue":
        raise ExpectationFailed(f"Expect: {expected!r:.80} is not known")
    return await handler(request)


@lru_cache(maxsize=256)
def _host_name(host: str) -> str | None:
    """Return the name in a Host field, None if it is not well-formed (RFC 9110, 7.2)."""
    match = _HOST.fullmatch(host)
    return match and match["name"].strip("[]").lower()


def _is_same_origin(origin: str, host: str) -> bool:
    if origin == "null":
        return False
    match = _ORIGIN.fullmatch(origin)
    if match is None:
        raise BadRequest("Origin: must be a scheme, a host and perhaps a port")
    return match["host"] == host


def _is_own_address(request: web.Request, host: str) -> bool:
    """Whether ``host`` is the address, as a literal, that this connection came in on."""
    if host in _LOOPBACK_NAMES:
        return True
    if request.transport is None:
        return False
    own = request.transport.get_extra_info("sockname")
    try:
        return ipaddress.ip_address(host) == ipaddress.ip_address(own[0])
    except (ValueError, TypeError):
        return False


def _is_of_another_site(request: web.Request) -> bool:
    """Whether a page of another site sent it, and not a person who followed a link here."""
    if request.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin"):
        return False
    is_navigation = (
        request.headers.get("Sec-Fetch-Mode") == "navigate"
        and request.headers.get("Sec-Fetch-Dest") == "document"
    )
    return not (is_navigation and request.method in (hdrs.METH_GET, hdrs.METH_HEAD))


async def add_security_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Have browsers neither guess types, nor show or load anything of us within other sites."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cross-Origin-Resource-Policy"] = "same-origin"
    is_documentation = request.path.startswith("/swagger-ui")
    policy = _DOCUMENTATION_POLICY if is_documentation else "frame-ancestors 'none'"
    response.headers.setdefault("Content-Security-Policy", policy)
