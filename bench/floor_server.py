"""The bare aiohttp server that floors are measured on, as a process of its own.

``python -m bench.floor_server FILE``: ``GET /file`` sends FILE as a FileResponse, ``GET /json``
answers what a job's status looks like, ``GET /socket`` is a WebSocket that takes binary frames
and says ``done`` at an empty one. It prints its address.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp
from aiohttp import web

from bench.processes import Child, Stage
from wire.codec import MAX_TEXT_BYTES

STATUS = {"id": 1, "status": "Queued", "message": "Job successfully uploaded"}


class FloorServer:
    """The bare server as its users see it."""

    def __init__(self, process: Child, url: str) -> None:
        self.process = process
        self.url = url

    @classmethod
    async def start(cls, stage: Stage, file: Path) -> FloorServer:
        """Start it on a free port."""
        process = await stage.module("bench.floor_server", str(file))
        return cls(process, (await process.read_line()).strip())


async def _answer_json(_: web.Request) -> web.StreamResponse:
    return web.json_response(STATUS)


async def _receive(request: web.Request) -> web.StreamResponse:
    channel = web.WebSocketResponse(compress=False, max_msg_size=MAX_TEXT_BYTES)
    await channel.prepare(request)
    async for message in channel:
        if message.type is aiohttp.WSMsgType.BINARY and not message.data:
            await channel.send_str("done")
    return channel


async def _serve(file: Path) -> None:
    async def send_file(_: web.Request) -> web.StreamResponse:
        return web.FileResponse(file)

    application = web.Application()
    application.router.add_get("/file", send_file)
    application.router.add_get("/json", _answer_json)
    application.router.add_get("/socket", _receive)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    sys.stdout.write(f"http://{host}:{port}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
