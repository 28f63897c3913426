"""Who may ask: not the pages of other sites, nor who calls the server by a strange name."""

from __future__ import annotations

import ipaddress
import socket
from functools import lru_cache
from urllib.parse import urlsplit

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from api.answers import error_answer
from api.routes import Handler
from config import SettingsInForce

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
        if origin is not None and urlsplit(origin).netloc != request.headers[hdrs.HOST]:
            return error_answer(403, "requests from pages of another origin are refused")
        if origin is None and _is_cross_site_change(request):
            return error_answer(403, "requests from pages of another site are refused")
        return await handler(request)

    return guard


@lru_cache(maxsize=256)
def _host_name(host: str) -> str | None:
    """Return the name in a Host field, None if there is none."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return None
    return name.lower() if name else None


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


def _is_cross_site_change(request: web.Request) -> bool:
    if request.method in ("GET", "HEAD"):
        return False
    return request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
