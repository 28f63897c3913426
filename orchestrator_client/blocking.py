"""The blocking transport, on the standard library's HTTP client.

Its methods are coroutines only by their look: they block, and never suspend. aiohttp would do
the same on a loop in a thread, but to import it takes longer than a whole ``orchestrator ls``.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TypeVar, cast
from urllib.parse import urlencode

from orchestrator_client.address import Address
from orchestrator_client.transport import (
    CONNECT_SECONDS,
    Answer,
    ConnectionBroken,
    ConnectionFailed,
    Request,
)

T = TypeVar("T")

_MAX_IDLE_CONNECTIONS = 16
# ValueError: a chunk of a length that is no number
_BROKEN = (OSError, http.client.HTTPException, ValueError)


class BlockingTransport:
    """Sends requests over connections that are kept and used again; safe from several threads."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._tls = ssl.create_default_context() if address.is_secure else None
        self._is_closed = False

    async def send(self, request: Request) -> Answer:
        """Send a request; see :class:`orchestrator_client.transport.Transport`."""
        # a kept connection may end just now, and then nobody knows whether this was obeyed
        kept = self._kept_connection() if request.is_repeatable else None
        connection = kept or self._new_connection()
        try:
            assert connection.sock is not None
            connection.sock.settimeout(request.silence)
            is_sent = _write(connection, request, self._address)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ConnectionBroken(_reason(error)) from None
        except BaseException:
            connection.close()
            raise
        try:
            response = connection.getresponse()
        except _BROKEN as error:
            connection.close()
            raise ConnectionBroken(_reason(error)) from None
        except BaseException:
            connection.close()
            raise
        return _BlockingAnswer(response, connection, self._keep if is_sent else None)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)  # noqa: ASYNC251 - there is no event loop

    async def run(self, function: Callable[[], T]) -> T:
        """Call it here: nobody else is held up."""
        return function()

    async def close(self) -> None:
        """End the connections that are not in use; those in use end with their answers."""
        self._is_closed = True
        while self._idle:
            self._idle.popleft().close()

    def _kept_connection(self) -> http.client.HTTPConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.sock is not None and not _has_news(connection.sock):
                return connection
            connection.close()  # the server has ended it meanwhile

    def _new_connection(self) -> http.client.HTTPConnection:
        host, port = self._address.host, self._address.port
        connection = http.client.HTTPConnection(host, port)
        if self._tls is not None:
            connection = http.client.HTTPSConnection(host, port, context=self._tls)
        try:
            connection.sock = self._connected_socket()
        except OSError as error:
            raise ConnectionFailed(_reason(error), _is_final(error)) from None
        return connection

    def _connected_socket(self) -> socket.socket:
        host = self._address.host
        if host.isascii():
            # getaddrinfo(3) takes bytes, too, and does without the IDNA codec, slow to import
            host = cast(str, host.encode())
        sock = socket.create_connection((host, self._address.port), CONNECT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return sock
        try:
            return self._tls.wrap_socket(sock, server_hostname=self._address.host)
        except BaseException:
            sock.close()
            raise

    def _keep(self, connection: http.client.HTTPConnection) -> None:
        if self._is_closed or len(self._idle) >= _MAX_IDLE_CONNECTIONS:
            connection.close()
        else:
            self._idle.append(connection)


class _BlockingAnswer:
    """An answer whose body is read from its connection."""

    def __init__(
        self,
        response: http.client.HTTPResponse,
        connection: http.client.HTTPConnection,
        keep: Callable[[http.client.HTTPConnection], None] | None,
    ) -> None:
        self.status = response.status
        self._response = response
        self._connection = connection
        self._keep = keep
        self._is_closed = False

    def header(self, name: str) -> str | None:
        """Return the value of a header field, None without it."""
        return self._response.headers.get(name)

    async def read(self, size: int, silence: float | None = None) -> bytes:
        """Return up to ``size`` bytes as soon as there are any, none at the end."""
        response = self._response
        try:
            if silence is not None and self._connection.sock is not None:
                self._connection.sock.settimeout(max(silence, 0.001))
            # read1() of an answer of known length does not count what it gives (CPython 3.11)
            data = response.read1(size) if response.chunked else response.read(size)
        except _BROKEN as error:
            raise ConnectionBroken(_reason(error)) from None
        if not data and response.length:
            raise ConnectionBroken(f"{response.length} bytes are missing")
        return data

    async def close(self) -> None:
        """Keep the connection if all was read from it, else end it."""
        if self._is_closed:
            return
        self._is_closed = True
        is_whole = self._response.isclosed() and not self._response.will_close
        self._response.close()
        if is_whole and self._keep is not None:
            self._keep(self._connection)
        else:
            self._connection.close()


def _write(connection: http.client.HTTPConnection, request: Request, address: Address) -> bool:
    """Write a request; returns False if the server answered before it had all of it."""
    target = address.prefix + request.path
    if request.query:
        target += "?" + urlencode(request.query)
    connection.putrequest(request.method, target, skip_accept_encoding=True)
    for name, value in request.headers.items():
        connection.putheader(name, value.encode("utf-8"))
    if request.body is None:
        if request.method in ("POST", "PUT"):
            connection.putheader("Content-Length", "0")
        connection.endheaders()
        return True
    connection.putheader("Content-Type", request.body.content_type)
    connection.putheader("Content-Length", str(request.body.length))
    connection.endheaders()
    assert connection.sock is not None
    return _send_pieces(connection.sock, request.body.pieces())


def _send_pieces(sock: socket.socket, pieces: Iterable[bytes]) -> bool:
    """Send a body; returns False if an answer came, or the connection ended, before its end."""
    for piece in pieces:
        if _has_news(sock):  # a refusal: the rest would be sent for nothing
            return False
        try:
            sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            return False  # what the server said before it hung up can still be read
    return True


def _has_news(sock: socket.socket) -> bool:
    """Whether there is something to read, be it the end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0)) or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)


def _reason(error: BaseException) -> str:
    """Say in words why a connection failed."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    if isinstance(error, http.client.RemoteDisconnected):
        return "the connection was closed without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the answer was cut off"
    if isinstance(error, http.client.BadStatusLine):
        return "the answer is not HTTP"
    return str(error) or type(error).__name__


def _is_final(error: OSError) -> bool:
    """Whether trying again is of no use: a name that does not exist, a wrong certificate."""
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN
    return isinstance(error, ssl.SSLError)
