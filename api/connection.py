"""A client's connection: what is done for it alone ends with it, what is not HTTP is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        return Connection(self, loop=self._loop, **self._kwargs)


class Connection(web.RequestHandler):
    """aiohttp's connection, which knows what waits for its client alone."""

    __slots__ = ("_is_lost", "_waiting")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_lost = False
        self._waiting: asyncio.Task[object] | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """For the event loop: the client is gone, or was cut off."""
        self._is_lost = True
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    @contextmanager
    def interrupting(self, task: asyncio.Task[object]) -> Iterator[None]:
        """Cancel what the task does inside when the connection ends, and tell it so."""
        if self._is_lost:
            raise ConnectionResetError("the client is gone")
        self._waiting = task
        try:
            yield
        except asyncio.CancelledError:
            # as asyncio.timeout() does it: only if nobody else wants the task to end
            if self._is_lost and task.uncancel() == 0:
                raise ConnectionResetError("the client is gone") from None
            raise
        finally:
            self._waiting = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """For aiohttp: answer what can't be parsed as HTTP, or what a handler let through."""
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
    not be interrupted: a stored job has to be queued, whether or not its client waits.
    """
    connection, task = request.protocol, asyncio.current_task()
    assert isinstance(connection, Connection), "the application is run by ConnectionRunner"
    assert task is not None
    with connection.interrupting(task):
        yield
