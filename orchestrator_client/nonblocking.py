"""The transport of the asynchronous client, on aiohttp."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import TypeVar
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from orchestrator_client.address import Address
from orchestrator_client.transport import (
    CONNECT_SECONDS,
    Answer,
    Body,
    ConnectionBroken,
    ConnectionFailed,
    Request,
)

T = TypeVar("T")


class NonblockingTransport:
    """Sends requests on the running event loop; its session begins with the first of them."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._session: aiohttp.ClientSession | None = None

    async def send(self, request: Request) -> Answer:
        """Send a request; see :class:`orchestrator_client.transport.Transport`."""
        if self._session is None:
            # no limit: jobs that are waited for must not keep others from being submitted
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
            )
        headers = dict(request.headers)
        if request.body is not None:
            headers["Content-Type"] = request.body.content_type
            headers["Content-Length"] = str(request.body.length)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_SECONDS, sock_read=request.silence
        )
        body = None if request.body is None else _SentBody(request.body)
        try:
            response = await self._session.request(
                request.method,
                self._url(request),
                headers=headers,
                data=None if body is None else body.pieces(),
                timeout=timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise ConnectionFailed(_reason(error), _is_final(error)) from None
        except (aiohttp.ClientError, OSError) as error:
            if body is not None and body.failure is not None:
                raise body.failure from None
            raise ConnectionBroken(_reason(error)) from None
        return _NonblockingAnswer(response)

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    async def run(self, function: Callable[[], T]) -> T:
        """Call it in a thread."""
        return await asyncio.to_thread(function)

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()

    def _url(self, request: Request) -> URL:
        query = f"?{urlencode(request.query)}" if request.query else ""
        return URL(f"{self._address.url}{request.path}{query}", encoded=True)


class _NonblockingAnswer:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self._response = response

    def header(self, name: str) -> str | None:
        """Return the value of a header field, None without it."""
        return self._response.headers.get(name)

    async def read(self, size: int, silence: float | None = None) -> bytes:
        """Return up to ``size`` bytes as soon as there are any, none at the end."""
        try:
            async with asyncio.timeout(silence):
                return await self._response.content.read(size)
        except (aiohttp.ClientError, OSError) as error:
            raise ConnectionBroken(_reason(error)) from None

    async def close(self) -> None:
        """Give the connection back if all was read from it, else end it."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class _SentBody:
    """A body that is read in a thread, a piece at a time.

    What goes wrong with it is kept: to aiohttp it is one more reason why a connection breaks.
    """

    def __init__(self, body: Body) -> None:
        self.failure: Exception | None = None
        self._body = body

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield it from its start."""
        pieces = self._body.pieces()
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        except Exception as failure:
            self.failure = failure
            raise


def _reason(error: BaseException) -> str:
    """Say in words why a connection failed."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not valid: {error.certificate_error}"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror[:1].lower() + cause.strerror[1:]
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the connection was closed without an answer"
    return str(error) or type(error).__name__


def _is_final(error: BaseException) -> bool:
    """Whether trying again is of no use: a name that does not exist, a wrong certificate."""
    if isinstance(error, aiohttp.ClientSSLError):
        return True
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        return isinstance(cause, ssl.SSLError) or (
            isinstance(cause, socket.gaierror) and cause.errno != socket.EAI_AGAIN
        )
    return False
