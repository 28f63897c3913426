"""A client's connection: what is done for it alone ends with it, what is not HTTP is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web

from api.answers import error_answer
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")

_PATHS_IN_RESERVE = frozenset({"/agent", "/health"})
_LOG_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """How many connections there may be, and for how long one may have nothing to ask.

    Beyond ``connections`` the one that has been idle longest makes room. If none is idle, there are
    ``reserve`` more for agents and ``/health`` alone, and after these none. A request's header
    must come within ``header_seconds`` of its first byte (of the connection, for the first), and
    have at most ``header_bytes``; ``idle_seconds`` are between two requests.
    """

    connections: int = 4096
    reserve: int = 64
    header_seconds: float = 10.0
    header_bytes: int = 32 * 1024
    idle_seconds: float = 75.0


class ConnectionRunner(web.AppRunner):
    """Runs an application on connections of our own kind, with limits.

    Requests that are not HTTP never come to the application. aiohttp answers them in
    :meth:`aiohttp.web.RequestHandler.handle_error`, with a plain text; here they get the
    error shape.
    """

    def __init__(
        self,
        application: web.Application,
        *,
        limits: ConnectionLimits = ConnectionLimits(),
        **options: Any,
    ) -> None:
        super().__init__(
            application,
            keepalive_timeout=limits.idle_seconds,
            # a few bytes could become as many as the disk has, and no client of ours sends that
            auto_decompress=False,
            **options,
        )
        self._limits = limits

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        loop = asyncio.get_running_loop()
        return _Server(
            server.request_handler,
            limits=self._limits,
            request_factory=server.request_factory,
            loop=loop,
            **self._kwargs,
        )


class _Server(web.Server):
    """Makes the connections, and knows which of them have nothing to do."""

    def __init__(
        self, handler: Callable[..., Any], *, limits: ConnectionLimits, **options: Any
    ) -> None:
        super().__init__(self._handle, **options)
        self.limits = limits
        self._handler = handler
        self._open: set[Connection] = set()
        self._idle: dict[Connection, None] = {}  # the one that has been idle longest first
        self._told_at = float("-inf")

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        assert isinstance(connection, Connection)
        self._idle.pop(connection, None)
        if connection.is_in_reserve and request.path not in _PATHS_IN_RESERVE:
            return _refusal(503, "the server has as many connections as it can; try again")
        if sum(len(name) + len(value) + 4 for name, value in request.raw_headers) > (
            self.limits.header_bytes
        ):
            return _refusal(431, f"the header is longer than {self.limits.header_bytes} bytes")
        try:
            answer = await self._handler(request)
        except web.HTTPExpectationFailed:  # raised before the application's own middlewares
            return _refusal(417, "Expect: only 100-continue is known")
        assert isinstance(answer, web.StreamResponse)
        return answer

    def admit(self, connection: Connection) -> None:
        """Take a new connection in, perhaps in place of another."""
        self._open.add(connection)
        if len(self._open) > self.limits.connections:
            self._tell()
            if self._idle:
                oldest = next(iter(self._idle))
                self.release(oldest)
                oldest.force_close()
        if len(self._open) > self.limits.connections:
            connection.is_in_reserve = True
        if len(self._open) > self.limits.connections + self.limits.reserve:
            connection.cut()
        self._idle[connection] = None

    def has_nothing_to_do(self, connection: Connection) -> None:
        """Take note that a connection has answered all that it was asked."""
        if connection in self._open:
            self._idle[connection] = None

    def release(self, connection: Connection) -> None:
        """Take note of a connection's end."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def _tell(self) -> None:
        """Log it once a minute: whoever opens so many could fill the disk with the log."""
        now = self._loop.time()
        if now - self._told_at >= _LOG_PAUSE_SECONDS:
            self._told_at = now
            event(
                log,
                "too_many_connections",
                level=logging.WARNING,
                open=len(self._open),
                limit=self.limits.connections,
                idle=len(self._idle),
            )


class Connection(web.RequestHandler):
    """aiohttp's connection, which knows its limits, and what waits for its client alone."""

    __slots__ = (
        "_header_bytes",
        "_header_timer",
        "_is_asked",
        "_is_lost",
        "_server",
        "_waiting",
        "is_in_reserve",
    )

    def __init__(self, server: _Server, **options: Any) -> None:
        super().__init__(server, **options)
        self.is_in_reserve = False
        self._server = server
        self._is_lost = False
        self._is_asked = False  # a request is being answered
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """For the event loop: a client has come."""
        super().connection_made(transport)
        self._await_header()
        self._server.admit(self)

    def data_received(self, data: bytes) -> None:
        """For the event loop: bytes have come."""
        asked_before, was_asked = self._request_count, self._is_asked
        super().data_received(data)
        if self._request_count > asked_before:
            self._is_asked = True
            self._header_bytes = 0
            self._await_no_header()
        elif not was_asked and data:
            self._take_part_of_a_header(len(data))

    def _take_part_of_a_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_timer is None:
            self._await_header()
        if self._header_bytes > self._server.limits.header_bytes and self.transport is not None:
            limit = self._server.limits.header_bytes
            self.transport.write(_raw_refusal(f"the header is longer than {limit} bytes"))
            self.force_close()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """For aiohttp: send the rest of an answer."""
        finished = await super().finish_response(request, resp, start_time)
        if request.content.is_eof():
            self._await_next()
        else:  # what still comes of its body is no header
            request.content.on_eof(self._await_next)
        return finished

    def _await_next(self) -> None:
        self._is_asked = bool(self._messages)  # others may have come behind the one answered
        if not self._is_asked:
            self._server.has_nothing_to_do(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """For the event loop: the client is gone, or was cut off."""
        self._is_lost = True
        self._await_no_header()
        self._server.release(self)
        super().connection_lost(exc)
        if self._waiting is not None:
            self._waiting.cancel()

    def cut(self) -> None:
        """End it at once."""
        if self.transport is not None:
            self.transport.abort()

    def _await_header(self) -> None:
        seconds = self._server.limits.header_seconds
        self._header_timer = self._loop.call_later(seconds, self.force_close)

    def _await_no_header(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

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


def _refusal(status: int, message: str) -> web.Response:
    answer = error_answer(status, message)
    answer.force_close()
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        answer.headers[hdrs.RETRY_AFTER] = "10"
    return answer


def _raw_refusal(message: str) -> bytes:
    """Return the whole answer to what is not even a whole header."""
    body = error_answer(431, message).body
    assert isinstance(body, bytes)
    return (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
        b"Content-Type: application/json; charset=utf-8\r\n"
        b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body)
    )


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
