"""The connection to the server: made, kept, given up when it is silent, made again."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

import aiohttp

from agent.settings import AgentRefused, AgentSettings
from runtime import first_failure
from telemetry.logs import event
from wire import codec, messages
from wire.frames import Frame, decode_frame
from wire.outbox import Outbox

log = logging.getLogger("orchestrator.agent")

_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0
_CONNECT_SECONDS = 10.0
_SILENT_HEARTBEATS = 2.5
_STOP_SECONDS = 5.0
_STEADY_SECONDS = 30.0

Received: TypeAlias = messages.Message | codec.UnknownMessage | Frame


class ConnectionEnded(Exception):
    """The connection is over, as connections are; another one follows."""


class RetryPause:
    """How long to wait before the next attempt to connect; longer each time.

    A connection that ends again and again, whatever the reason, must not become a storm: only
    one that has brought something begins with short pauses again.
    """

    def __init__(self) -> None:
        self._seconds = _FIRST_RETRY_SECONDS

    def reset(self) -> None:
        """Begin with a short one again."""
        self._seconds = _FIRST_RETRY_SECONDS

    async def wait(self) -> None:
        """Wait; with full jitter, as agents of a restarted server must not all come at once."""
        await asyncio.sleep(random.uniform(_FIRST_RETRY_SECONDS / 2, self._seconds))
        self._seconds = min(self._seconds * 2, _LAST_RETRY_SECONDS)


class Channel:
    """Where attempts say what they have to say, whether or not there is a connection."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None

    def put(self, message: messages.Message) -> None:
        """Say it if there is a connection; if not, the next one begins with a report of all."""
        if self.outbox is not None:
            self.outbox.put(message)

    def put_along(self, message: messages.Message) -> None:
        """Say it with what is said next, or a moment later; as :meth:`put` in all else."""
        if self.outbox is not None:
            self.outbox.put_along(message)


class Connection:
    """One connection, from the greeting to its end."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.outbox = Outbox()
        self._socket = socket
        self._heard_at = 0.0

    async def greet(self, hello: messages.Hello) -> messages.Welcome:
        """Say who this is; returns the server's answer.

        Raises :class:`AgentRefused` or :class:`ConnectionEnded` if it is no welcome.
        """
        await self._socket.send_str(codec.encode(hello))
        return await asyncio.wait_for(_receive_welcome(self._socket), _CONNECT_SECONDS)

    async def serve(
        self,
        heartbeat_seconds: float,
        problem: Callable[[], str | None],
        take: Callable[[Received], None],
    ) -> None:
        """Send what is in the outbox and hand what comes to ``take``, until the connection ends.

        Each heartbeat says whether there is a ``problem``.

        Always raises: :class:`ConnectionEnded`, or why it broke.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.outbox.run(self._socket), name="outbox")
                tasks.create_task(self._beat(heartbeat_seconds, problem), name="heartbeat")
                async for received in self._receive():
                    take(received)
                raise ConnectionEnded("the server closed the connection")
        except BaseExceptionGroup as group:
            raise first_failure(group) from None

    async def _beat(self, interval: float, problem: Callable[[], str | None]) -> None:
        """Send heartbeats; end the connection when the server was silent for too long."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while loop.time() - self._heard_at < _SILENT_HEARTBEATS * interval:
            self.outbox.put(messages.Heartbeat(os.getloadavg()[0], problem()))
            await asyncio.sleep(interval)
        raise ConnectionEnded("the server is silent")

    async def _receive(self) -> AsyncIterator[Received]:
        loop = asyncio.get_running_loop()
        async for frame in self._socket:
            self._heard_at = loop.time()
            if frame.type is aiohttp.WSMsgType.TEXT:
                yield codec.decode(frame.data)
            elif frame.type is aiohttp.WSMsgType.BINARY:
                yield decode_frame(frame.data)


async def stay_connected(
    settings: AgentSettings,
    pause: RetryPause,
    converse: Callable[[Connection], Awaitable[None]],
) -> None:
    """Connect again and again, and ``converse``; ends only by :class:`AgentRefused`."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        while True:
            began = asyncio.get_running_loop().time()
            try:
                async with await _open(session, settings) as socket:
                    await converse(Connection(socket))
            except (aiohttp.ClientError, OSError, TimeoutError, ConnectionEnded) as error:
                event(log, "connection_failed", error=str(error))
            except messages.ProtocolError as error:
                event(log, "server_error", level=logging.WARNING, error=str(error))
            if _is_cancelled():
                raise asyncio.CancelledError
            if asyncio.get_running_loop().time() - began > _STEADY_SECONDS:
                pause.reset()
            await pause.wait()


async def _open(
    session: aiohttp.ClientSession, settings: AgentSettings
) -> aiohttp.ClientWebSocketResponse:
    token = settings.token
    try:
        return await asyncio.wait_for(
            session.ws_connect(
                f"{settings.server}/agent",
                headers={"Authorization": f"Bearer {token}"} if token else {},
                max_msg_size=codec.MAX_TEXT_BYTES,
                compress=0,
                autoping=True,
                timeout=aiohttp.ClientWSTimeout(ws_close=_STOP_SECONDS),
            ),
            _CONNECT_SECONDS,
        )
    except aiohttp.WSServerHandshakeError as error:
        raise _handshake_error(error) from None


def _is_cancelled() -> bool:
    """Whether this task was cancelled and the cancellation got lost.

    A TaskGroup that is cancelled while its body or a child fails raises the failure only
    (CPython 3.11 to 3.12, gh-116720).
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _handshake_error(error: aiohttp.WSServerHandshakeError) -> Exception:
    match error.status:
        case 401:
            return AgentRefused(
                "the server refused the agent token; show the right one with"
                " 'python orchestrator.py agent-token' where the server runs"
            )
        case 403:
            return AgentRefused(
                "the server does not go by that name; add it to its ALLOWED_HOSTS setting"
            )
        case status:
            return ConnectionEnded(f"the server answered with HTTP status {status}")


async def _receive_welcome(socket: aiohttp.ClientWebSocketResponse) -> messages.Welcome:
    async for frame in socket:
        if frame.type is not aiohttp.WSMsgType.TEXT:
            continue
        message = codec.decode(frame.data)
        if isinstance(message, messages.Refused) and not message.retry:
            raise AgentRefused(message.reason)
        if isinstance(message, messages.Refused):
            raise ConnectionEnded(message.reason)
        if isinstance(message, messages.Welcome):
            return message
    raise ConnectionEnded("the server closed the connection before its welcome")
