"""API tokens: who asks, and what that token may see and do. Without tokens the API is open."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from api.answers import Forbidden, Handler, Unauthorized, UnknownJob, job_id_of
from api.policy import is_for_bound_tokens, needed_role
from records import Role, StoreError, Token, digest_of
from store import Store

log = logging.getLogger("orchestrator.api")

_CALLER = "caller"
_FRESH_SECONDS = 1.0
_REMEMBERED_OWNERS = 10_000


class TokenGate:
    """Lets through what the caller's token allows; once there is a token, each caller needs one.

    A token bound to a user reaches that user's jobs only; others are not there for it.
    """

    def __init__(self, store: Store) -> None:
        self._tokens = _Tokens(store)
        self._owners = _Owners(store)

    def middleware(self) -> Middleware:
        """Return what stands before all handlers."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            resource = request.match_info.route.resource
            path = None if resource is None else resource.canonical
            needed = needed_role(request.method, path)
            if needed is None or not (known := await self._tokens.known()):
                return await handler(request)
            digest = _presented_digest(request)
            caller = known.get(digest)
            if caller is None:
                raise Unauthorized("the token is not valid (any more)")
            request[_CALLER] = caller
            _check_role(caller, needed)
            if caller.user_id is not None:
                await self._check_owner(request, caller.user_id, path)
            with self._tokens.held(digest, request):
                return await handler(request)

        return guard

    async def close(self, _: web.Application) -> None:
        """End the background work."""
        await self._tokens.close()

    async def _check_owner(self, request: web.Request, user_id: int, path: str | None) -> None:
        if "id" not in request.match_info:
            if not is_for_bound_tokens(path):
                raise Forbidden("this token is for the jobs of one user")
        elif await self._owners.owner_of(job_id_of(request)) != user_id:
            raise UnknownJob


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


def _presented_digest(request: web.Request) -> str:
    header = request.headers.get(hdrs.AUTHORIZATION)
    if header is None:
        raise Unauthorized("this server wants a token: send Authorization: Bearer TOKEN")
    scheme, _, secret = header.partition(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("the token is not valid: it must come as Authorization: Bearer TOKEN")
    return digest_of(secret.strip())


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
            owner = await self._store.jobs.owner_of(job_id)
            if owner is not None:
                if len(self._known) >= _REMEMBERED_OWNERS:
                    self._known.clear()
                self._known[job_id] = owner
        return owner


@dataclass(frozen=True, slots=True)
class _OpenRequest:
    request: web.Request
    digest: str


class _Tokens:
    """The tokens there are, read again when asked for after a second.

    Another process makes and revokes them. A read for each request would cost a poll more
    than the rest of it. While requests are open (streams, downloads) the tokens are read each
    second, and the connections of those whose token was revoked are cut.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: Mapping[str, Token] = {}
        self._stale_at = float("-inf")
        self._reading = asyncio.Lock()
        self._open: dict[int, _OpenRequest] = {}
        self._numbers = itertools.count()
        self._watching: asyncio.Task[None] | None = None

    async def known(self) -> Mapping[str, Token]:
        """Return all tokens, by the digests of their secrets."""
        if self._is_stale():
            async with self._reading:
                if self._is_stale():
                    self._known = await self._store.tokens.all()
                    self._stale_at = asyncio.get_running_loop().time() + _FRESH_SECONDS
        return self._known

    @contextmanager
    def held(self, digest: str, request: web.Request) -> Iterator[None]:
        """Cut the request's connection if its token is revoked within the block."""
        number = next(self._numbers)
        self._open[number] = _OpenRequest(request, digest)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="watch tokens")
        try:
            yield
        finally:
            del self._open[number]

    async def close(self) -> None:
        """End the background work."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])

    def _is_stale(self) -> bool:
        return asyncio.get_running_loop().time() >= self._stale_at

    async def _watch(self) -> None:
        """Look after open requests until there is none for a second."""
        try:
            while True:
                await asyncio.sleep(_FRESH_SECONDS)
                if not self._open:
                    return
                await self._cut_revoked()
        finally:
            self._watching = None

    async def _cut_revoked(self) -> None:
        try:
            known = await self.known()
        except StoreError as error:
            log.warning("event=tokens_unreadable error=%r", str(error))
            return
        for held in self._open.values():
            if held.digest not in known and held.request.transport is not None:
                log.info("event=revoked_connection_cut address=%s", held.request.remote)
                held.request.transport.abort()
