"""API tokens: who asks, and what that token may see and do. Without tokens the API is open."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

import access
from access import Role, Token
from api_answers import Forbidden, Handler, Unauthorized, UnknownJob, job_id_of
from store import Store

_CALLER = "caller"
_FRESH_SECONDS = 1.0
_REMEMBERED_OWNERS = 10_000


def demand_tokens(store: Store) -> Middleware:
    """Let through what the caller's token allows; once there is a token, each caller needs one.

    A token bound to a user reaches that user's jobs only; others are not there for it.
    """
    tokens = _Tokens(store)
    owners = _Owners(store)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        path = None if resource is None else resource.canonical
        needed = access.needed_role(request.method, path)
        if needed is not None and (known := await tokens.known()):
            caller = _caller(request, known)
            request[_CALLER] = caller
            _check_role(caller, needed)
            if caller.user_id is not None:
                await _check_owner(request, caller.user_id, path)
        return await handler(request)

    async def _check_owner(request: web.Request, user_id: int, path: str | None) -> None:
        if "id" not in request.match_info:
            if not access.is_for_bound_tokens(path):
                raise Forbidden("this token is for the jobs of one user")
        elif await owners.owner_of(job_id_of(request)) != user_id:
            raise UnknownJob

    return guard


def user_restriction(request: web.Request) -> int | None:
    """Return the only user whose jobs the caller may see, None if it may see all."""
    caller: Token | None = request.get(_CALLER)
    return None if caller is None else caller.user_id


def caller_name(request: web.BaseRequest) -> str:
    """Return the name of the caller's token, a dash if none was needed."""
    caller: Token | None = request.get(_CALLER)
    return "-" if caller is None else caller.name


def check_user(request: web.Request, user_id: int) -> None:
    """Raise :class:`Forbidden` if the caller may not act for this user."""
    if user_restriction(request) not in (None, user_id):
        raise Forbidden(f"this token is not for user {user_id}")


def _caller(request: web.Request, known: Mapping[str, Token]) -> Token:
    header = request.headers.get(hdrs.AUTHORIZATION)
    if header is None:
        raise Unauthorized("this server wants a token: send Authorization: Bearer TOKEN")
    scheme, _, secret = header.partition(" ")
    caller = known.get(access.digest_of(secret.strip())) if scheme.lower() == "bearer" else None
    if caller is None:
        raise Unauthorized("the token is not valid (any more)")
    return caller


def _check_role(caller: Token, needed: Role) -> None:
    if not caller.role.includes(needed):
        raise Forbidden(f"this token allows to {caller.role}, the role {needed} is needed here")


class _Owners:
    """The users of jobs, which never change: those asked for lately are remembered."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, int] = {}

    async def owner_of(self, job_id: int) -> int | None:
        """Return the user of a job, None if there is no such job."""
        owner = self._known.get(job_id)
        if owner is None:
            owner = await self._store.owner_of(job_id)
            if owner is not None:
                if len(self._known) >= _REMEMBERED_OWNERS:
                    self._known.clear()
                self._known[job_id] = owner
        return owner


class _Tokens:
    """The tokens there are, read again when asked for after a second.

    Another process makes and revokes them. A read for each request would cost a poll more
    than the rest of it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: Mapping[str, Token] = {}
        self._stale_at = float("-inf")
        self._reading = asyncio.Lock()

    async def known(self) -> Mapping[str, Token]:
        """Return all tokens, by the digests of their secrets."""
        if self._is_stale():
            async with self._reading:
                if self._is_stale():
                    self._known = await self._store.tokens()
                    self._stale_at = asyncio.get_running_loop().time() + _FRESH_SECONDS
        return self._known

    def _is_stale(self) -> bool:
        return asyncio.get_running_loop().time() >= self._stale_at
