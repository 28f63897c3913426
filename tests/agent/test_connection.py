"""The connection to the server: how it comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from aiohttp import web

from agent.connection import Connection, RetryPause, stay_connected
from agent.settings import AgentSettings
from wire import codec, messages

_HELLO = messages.Hello(messages.PROTOCOL_VERSION, "id", "instance", "name", "0", 1, None, ())


async def test_a_server_that_welcomes_and_hangs_up_is_not_stormed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[float] = []

    async def welcome_and_hang_up(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.receive()
        welcome = messages.Welcome(messages.PROTOCOL_VERSION, "0", heartbeat_seconds=5, keep=())
        await socket.send_str(codec.encode(welcome))
        await socket.close()
        return socket

    def no_pause(low: float, high: float) -> float:
        bounds.append(high)
        if len(bounds) == 8:
            raise asyncio.CancelledError
        return 0.0

    async def converse(conversation: Connection) -> None:
        welcomed = await conversation.greet(_HELLO)
        await conversation.serve(welcomed.heartbeat_seconds, lambda: None, lambda received: None)

    application = web.Application()
    application.router.add_get("/agent", welcome_and_hang_up)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    settings = AgentSettings(f"http://127.0.0.1:{port}", "name", 1, None, tmp_path)
    monkeypatch.setattr("random.uniform", no_pause)
    try:
        with pytest.raises(asyncio.CancelledError):
            await stay_connected(settings, RetryPause(), converse)
    finally:
        await runner.cleanup()
    assert bounds == sorted(bounds)
    assert bounds[-1] >= 5
