"""API tokens: what a request's token allows, and when one is demanded."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from aiohttp import hdrs, web
from aiohttp.typedefs import Middleware

from api.callers import note_caller
from api.errors import Forbidden, Unauthorized, UnknownJob
from api.routes import Access, Handler, Policy, job_id_of
from config import SettingsInForce
from records import KnownTokens, Role, StoreError, Token, digest_of
from store import Store
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")

_FRESH_SECONDS = 1.0


class TokenGate:
    """Lets through what the caller's token allows.

    Each caller needs one where the settings say so, and from the first token on: to revoke the
    last one does not open the API again. A token bound to a user reaches that user's jobs only;
    others are not there for it.
    """

    def __init__(self, store: Store, policy: Policy, settings: SettingsInForce) -> None:
        self._store = store
        self._policy = policy
        self._settings = settings
        self._tokens = _Tokens(store)

    def middleware(self) -> Middleware:
        """Return what stands before all handlers."""

        @web.middleware
        async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
            access = self._policy.access_of(request)
            if access.role is None:
                return await handler(request)
            known = await self._tokens.known()
            if not known.were_made and not self._settings.current.are_tokens_required():
                return await handler(request)
            digest = _presented_digest(request)
            caller = known.by_digest.get(digest)
            if caller is None:
                raise Unauthorized("the token is not valid, or no longer")
            note_caller(request, caller)
            _check_role(caller, access.role)
            if caller.user_id is not None:
                await self._check_reach(request, access, caller.user_id)
            with self._tokens.held(digest, request):
                return await handler(request)

        return guard

    async def close(self, _: web.Application) -> None:
        """End the background work."""
        await self._tokens.close()

    async def _check_reach(self, request: web.Request, access: Access, user_id: int) -> None:
        if access.is_about_a_job:
            if await self._store.jobs.owner_of(job_id_of(request)) != user_id:
                raise UnknownJob
        elif not access.is_for_bound_tokens:
            raise Forbidden("this token is for the jobs of one user")


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
        self._known = KnownTokens({}, were_made=True)
        self._stale_at = float("-inf")
        self._reading = asyncio.Lock()
        self._open: dict[int, _OpenRequest] = {}
        self._numbers = itertools.count()
        self._watching: asyncio.Task[None] | None = None

    async def known(self) -> KnownTokens:
        """Return all tokens."""
        if self._is_stale():
            async with self._reading:
                if self._is_stale():
                    self._known = await self._store.tokens.known()
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
            event(log, "tokens_unreadable", level=logging.WARNING, error=str(error))
            return
        for held in self._open.values():
            if held.digest not in known.by_digest and held.request.transport is not None:
                event(log, "revoked_connection_cut", address=held.request.remote)
                held.request.transport.abort()
