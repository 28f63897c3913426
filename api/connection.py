"""A client's connection: what is done for it alone ends with it, what is not HTTP is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from aiohttp import web

from api.answers import error_answer


class ConnectionRunner(web.AppRunner):
    """Runs an application whose connections answer what is no HTTP in the error shape, too.

    Such requests never come to the application. aiohttp answers them in
    :meth:`aiohttp.web.RequestHandler.handle_error`, with a plain text.
    """

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        loop = asyncio.get_running_loop()
        return _Server(
            server.request_handler,
            request_factory=server.request_factory,
            loop=loop,
            **self._kwargs,
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)


class _Connection(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        super().handle_error(request, status, exc, message)  # logs it, or raises
        if message is None:
            answer = error_answer(status, "internal error; see the server's log")
        else:
            # of several lines the others show the bytes, and where in them it is
            words = message.partition("\n")[0].rstrip(":")
            answer = error_answer(status, f"not an acceptable HTTP request: {words}")
        answer.force_close()
        return answer


def break_off(request: web.Request) -> None:
    """Cut the connection, so that the client can tell a part of an answer from a whole one."""
    if request.transport is not None:
        request.transport.abort()


@contextmanager
def ended_by_disconnection(request: web.Request) -> Iterator[None]:
    """Interrupt what waits inside when the client goes; raises :class:`ConnectionResetError`.

    aiohttp can do this for all handlers or for none (``handler_cancellation``), and most must
    not be interrupted: a stored job has to be put in line, whether or not its client waits.
    """
    transport = request.transport
    task = asyncio.current_task()
    if transport is None or task is None:
        raise ConnectionResetError("the client is gone")
    protocol = cast(asyncio.Protocol, transport.get_protocol())
    watch = _Watch(protocol, task)
    transport.set_protocol(watch)
    try:
        yield
    except asyncio.CancelledError:
        # as asyncio.timeout() does it: only if nobody else wants the task to end
        if watch.is_lost and task.uncancel() == 0:
            raise ConnectionResetError("the client is gone") from None
        raise
    finally:
        if not watch.is_lost:
            transport.set_protocol(protocol)


class _Watch(asyncio.Protocol):
    """Stands between transport and protocol, passes everything on, and notices the end."""

    def __init__(self, protocol: asyncio.Protocol, task: asyncio.Task[object]) -> None:
        self.is_lost = False
        self._task = task
        self._protocol = protocol
        self.data_received = protocol.data_received  # type: ignore[method-assign]
        self.eof_received = protocol.eof_received  # type: ignore[method-assign]
        self.pause_writing = protocol.pause_writing  # type: ignore[method-assign]
        self.resume_writing = protocol.resume_writing  # type: ignore[method-assign]

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._protocol.connection_lost(exc)
        self._task.cancel()
