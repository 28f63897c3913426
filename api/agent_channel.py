"""The path where agents open their WebSocket."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import aiohttp
from aiohttp import hdrs, web

from api.answers import error_answer
from dispatch import Dispatcher
from records import digest_of
from telemetry.logs import event
from wire.codec import MAX_TEXT_BYTES

log = logging.getLogger("orchestrator.api")


_HANDSHAKE = (
    *(hdrs.UPGRADE, hdrs.CONNECTION, hdrs.SEC_WEBSOCKET_VERSION, hdrs.SEC_WEBSOCKET_KEY),
    *(hdrs.SEC_WEBSOCKET_PROTOCOL, hdrs.SEC_WEBSOCKET_EXTENSIONS),
)


class AgentChannelHandlers:
    """The handler of ``/agent``."""

    def __init__(self, dispatcher: Dispatcher, digests: frozenset[str]) -> None:
        self._dispatcher = dispatcher
        self._digests = digests

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """``GET /agent``: talk to an agent until its connection ends."""
        if not self._is_agent_allowed(request):
            event(log, "agent_token_refused", level=logging.WARNING, address=request.remote)
            return error_answer(401, "a valid agent token is needed here")
        if not all(request.headers.get(name, "").isascii() for name in _HANDSHAKE):
            return error_answer(400, "the fields of a WebSocket's handshake are ASCII")
        channel = _AgentSocket(
            heartbeat=None, compress=False, max_msg_size=MAX_TEXT_BYTES, timeout=1.0
        )
        if not channel.can_prepare(request):
            return error_answer(400, "this path is for agents, which open a WebSocket here")
        await channel.prepare(request)
        try:
            await self._dispatcher.serve_agent(channel, request.remote or "")
        except Exception as error:  # noqa: BLE001 - logged, and the connection is ended
            # answered here: the connection speaks WebSocket now, an HTTP answer would be noise
            event(
                log,
                "agent_session_failed",
                level=logging.ERROR,
                address=request.remote,
                exc_info=error,
            )
            await channel.close(code=aiohttp.WSCloseCode.INTERNAL_ERROR, message=b"internal error")
        return channel

    def _is_agent_allowed(self, request: web.Request) -> bool:
        # demanded on a loopback address, too: a proxy there brings everybody
        scheme, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        # looking a digest up tells by its timing nothing of use: who asks can't choose it
        return scheme == "Bearer" and digest_of(secret) in self._digests


class _AgentSocket(web.WebSocketResponse):
    """aiohttp's WebSocket, read as text and bytes only."""

    async def frames(self) -> AsyncIterator[str | bytes]:
        async for message in self:
            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                yield message.data
