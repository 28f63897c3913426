"""A TCP proxy between agent and server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

_BUFFER = 16 * 1024


class FaultyProxy:
    """Passes bytes on, except as told by its attributes.

    ``cut_after``: break each connection after so many bytes of both directions together, in
    the middle of whatever it is. ``rate``: bytes a second for each direction. ``delay``: seconds
    that each byte is on its way. ``is_down``: refuse. See also :meth:`freeze` (half-open).
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server
        self._links: set[_Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.cut_after: int | None = None
        self.rate: float | None = None
        self.delay = 0.0
        self.is_down = False
        self.connections = 0

    @property
    def url(self) -> str:
        """Where the agent is to connect."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FaultyProxy]:
        """Listen for the time of a test."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_BUFFER)
        try:
            yield self
        finally:
            self._flowing.set()
            self.cut()
            self._server.close()
            await self._server.wait_closed()

    def freeze(self) -> None:
        """Pass nothing on, without telling either side."""
        self._flowing.clear()

    def thaw(self) -> None:
        """Pass on again."""
        self._flowing.set()

    def cut(self) -> None:
        """Break all connections, as a reset."""
        for link in self._links:
            link.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        self.connections += 1
        link = _Link(self, writer)
        self._links.add(link)
        try:
            other_reader, other_writer = await asyncio.open_connection(
                "127.0.0.1", self._port, limit=_BUFFER
            )
            link.writers.append(other_writer)
            await asyncio.wait(
                [
                    asyncio.ensure_future(link.pump(reader, other_writer)),
                    asyncio.ensure_future(link.pump(other_reader, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except OSError:
            pass  # the server is down; so is this connection
        finally:
            link.abort()
            self._links.discard(link)

    async def flow(self) -> None:
        """Wait while frozen."""
        await self._flowing.wait()


class _Link:
    def __init__(self, proxy: FaultyProxy, writer: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._passed = 0
        self.writers = [writer]

    def abort(self) -> None:
        for writer in self.writers:
            writer.transport.abort()

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_BUFFER):
                await self._proxy.flow()
                if self._proxy.rate is not None:
                    await asyncio.sleep(len(data) / self._proxy.rate)
                limit = self._proxy.cut_after
                if limit is not None and self._passed + len(data) > limit:
                    writer.write(data[: limit - self._passed])
                    self.abort()
                    return
                self._passed += len(data)
                if self._proxy.delay:
                    # later pieces may be on their way, too, so this does not make it slow
                    loop.call_later(self._proxy.delay, writer.write, data)
                else:
                    writer.write(data)
                    await writer.drain()
            await asyncio.sleep(self._proxy.delay)  # for the end of the stream
