"""What callers are told of tokens: of their own, and admins of all. Never a secret."""

from __future__ import annotations

from aiohttp import web

from api.answers import rfc3339
from api.callers import token_of
from records import Role
from store import Store


class TokenListHandlers:
    """The handlers for ``/token`` and ``/tokens``."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def show_own(self, request: web.Request) -> web.StreamResponse:
        """``GET /token``: what the caller may do; everything where no token is needed."""
        token = token_of(request)
        body = {
            "is_token_needed": token is not None,
            "name": None if token is None else token.name,
            "role": Role.ADMIN if token is None else token.role,
            "user_id": None if token is None else token.user_id,
        }
        return web.json_response(body)

    async def list_all(self, request: web.Request) -> web.StreamResponse:
        """``GET /tokens``: those that there are, by name."""
        tokens = (await self._store.tokens.known()).by_digest.values()
        bodies = [
            {
                "name": token.name,
                "role": token.role,
                "user_id": token.user_id,
                "created_at": rfc3339(token.created_at),
            }
            for token in sorted(tokens, key=lambda token: token.name)
        ]
        return web.json_response({"tokens": bodies})
