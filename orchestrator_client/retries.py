"""Send a request until it is answered: what is tried again, for how long, and which error it is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from orchestrator_client.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    NotFound,
    OrchestratorError,
    QuotaExceeded,
    ServerError,
    ServerUnavailable,
    StorageFull,
    TooLarge,
    Unauthorized,
    UnexpectedAnswer,
)
from orchestrator_client.transport import (
    PIECE_BYTES,
    Answer,
    ConnectionBroken,
    ConnectionFailed,
    Request,
    Transport,
)

DEFAULT_PATIENCE_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_PAUSE_AFTER_BREAK_SECONDS = 0.3
_LONGEST_MESSAGE_BYTES = 64 * 1024
_LONGEST_JSON_BYTES = 64 * 1024 * 1024

_ERRORS: Mapping[int, type[OrchestratorError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: QuotaExceeded,
    507: StorageFull,
}
_COME_LATER = frozenset({429, 502, 503, 504})
"""The limits of a server, and what a proxy says while the server behind it starts again."""


@dataclass(frozen=True, slots=True)
class Retry:
    """That a request will be sent again: why, in how many seconds, and until when at the latest."""

    reason: str
    pause: float
    patience_left: float


OnRetry: TypeAlias = Callable[[Retry], None]


class Sender:
    """Sends requests, again if that is harmless and may help, for as long as it has patience.

    ``patience`` is how many seconds in all one request may fail for. Every answer that is no
    refusal begins a new count, since each request has its own.
    """

    def __init__(
        self,
        transport: Transport,
        url: str,
        token: str | None,
        patience: float = DEFAULT_PATIENCE_SECONDS,
        on_retry: OnRetry | None = None,
    ) -> None:
        self.transport = transport
        self.url = url
        self.patience = patience
        self._on_retry = on_retry
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "orchestrator-client"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    @asynccontextmanager
    async def answer(self, request: Request) -> AsyncIterator[Answer]:
        """Send a request and give its answer, of a status below 400.

        Raises :class:`OrchestratorError`; in the block also :class:`ConnectionBroken`.
        """
        answer = await self._send(request)
        try:
            yield answer
        finally:
            await answer.close()

    async def json(self, request: Request) -> dict[str, Any]:
        """Send a request and return the JSON object that answers it."""
        effort = _Effort(self, request)
        while True:
            answer = await self._send(request, effort)
            try:
                return await read_json(answer, self.url)
            except ConnectionBroken as error:
                await effort.pause_after(error)
            finally:
                await answer.close()

    async def _send(self, request: Request, effort: _Effort | None = None) -> Answer:
        effort = effort or _Effort(self, request)
        whole = replace(request, headers={**self._headers, **request.headers})
        while True:
            try:
                answer = await self.transport.send(whole)
                if answer.status < 400:
                    await _refuse_redirection(answer, self.url)
                    return answer
                await self._heed_refusal(answer, effort)
            except (ConnectionFailed, ConnectionBroken) as error:
                await effort.pause_after(error)

    async def _heed_refusal(self, answer: Answer, effort: _Effort) -> None:
        """Pause if the request may be sent again, else raise the error that the status means."""
        try:
            content = await _read_all(answer, _LONGEST_MESSAGE_BYTES)
            message = _message_of(content, answer.status, self.url)
        finally:
            await answer.close()
        status = answer.status
        if status == 408 and effort.request.is_repeatable:
            await effort.pause(ServerUnavailable(message, status), None)
        elif status in _COME_LATER:
            refusal = QuotaExceeded if status == 429 else ServerUnavailable
            await effort.pause(refusal(message, status), _retry_after(answer))
        else:
            kind = _ERRORS.get(status, ServerError if status >= 500 else BadRequest)
            error = kind(message, status)
            error.after_retry = effort.may_have_been_obeyed
            raise error

    def announce(self, retry: Retry) -> None:
        """Tell whoever wants to know that there is a pause."""
        if self._on_retry is not None:
            self._on_retry(retry)


class _Effort:
    """The tries of one request: how long it has failed, and what the next pause is."""

    def __init__(self, sender: Sender, request: Request) -> None:
        self.request = request
        self.may_have_been_obeyed = False
        self._sender = sender
        self._deadline: float | None = None
        self._pause = _FIRST_PAUSE_SECONDS

    async def pause_after(self, error: ConnectionFailed | ConnectionBroken) -> None:
        """Pause after a connection failed; raises :class:`ServerUnavailable` if that is in vain."""
        what = f"can't reach {self._sender.url}: {error}"
        if isinstance(error, ConnectionBroken):
            what = f"the connection to {self._sender.url} broke: {error}"
            self.may_have_been_obeyed = True
            if not self.request.is_repeatable:
                raise ServerUnavailable(f"{what}; it is not known whether it was done")
        elif error.is_final:
            raise ServerUnavailable(what)
        await self.pause(ServerUnavailable(what), None)

    async def pause(self, error: OrchestratorError, wanted: float | None) -> None:
        """Wait before the next try; raises ``error`` if there is no patience left for it."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._sender.patience
        left = self._deadline - now
        pause = self._next_pause() if wanted is None else wanted
        if pause > left:
            # the last try is at the end of the patience, not a whole pause before it
            if left < _FIRST_PAUSE_SECONDS or (wanted is not None and wanted > left):
                raise error
            pause = left
        self._sender.announce(Retry(str(error), pause, left))
        await self._sender.transport.sleep(pause)

    def _next_pause(self) -> float:
        pause = self._pause * (0.7 + 0.6 * os.urandom(1)[0] / 255)  # not all clients at once
        self._pause = min(self._pause * 2, _LONGEST_PAUSE_SECONDS)
        return pause


class BrokenAnswers:
    """Bounds how long answers may begin well and break, again and again, with nothing new."""

    def __init__(self, sender: Sender, what: str) -> None:
        self._sender = sender
        self._what = what
        self._position = 0
        self._patient_until = time.monotonic() + sender.patience

    async def pause(self, error: ConnectionBroken, position: int) -> None:
        """Pause before the next try; raises :class:`ServerUnavailable` if that is in vain.

        ``position`` is how far the one that broke had come.
        """
        now = time.monotonic()
        if position > self._position:
            self._position = position
            self._patient_until = now + self._sender.patience
        elif now > self._patient_until:
            raise ServerUnavailable(f"{self._what} breaks again and again: {error}") from None
        await self._sender.transport.sleep(_PAUSE_AFTER_BREAK_SECONDS)


def _retry_after(answer: Answer) -> float | None:
    """Return the seconds of ``Retry-After`` (RFC 9110, 10.2.3); a date counts as none."""
    text = (answer.header("Retry-After") or "").strip()
    return float(text) if text.isascii() and text.isdigit() and len(text) < 7 else None


async def _read_all(answer: Answer, most: int) -> bytes:
    content = bytearray()
    while data := await answer.read(PIECE_BYTES):
        content += data
        if len(content) > most:
            raise UnexpectedAnswer(f"the answer is longer than {most} bytes", answer.status)
    return bytes(content)


def _message_of(content: bytes, status: int, url: str) -> str:
    """Return the message of an error, in words also if something else than the API answered."""
    try:
        body = json.loads(content)
        return str(body["message"]) or f"HTTP status {status}"
    except (ValueError, KeyError, TypeError):
        if status in _COME_LATER:
            return f"the server behind {url} is away (HTTP status {status})"
        return f"{url} answers with HTTP status {status}, and not as this API does"


async def read_json(answer: Answer, url: str) -> dict[str, Any]:
    """Return the JSON object of an answer. Raises :class:`ConnectionBroken`."""
    content = await _read_all(answer, _LONGEST_JSON_BYTES)
    try:
        body = json.loads(content)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise UnexpectedAnswer(f"what answers at {url} is no Orchestrator server")
    return body


async def _refuse_redirection(answer: Answer, url: str) -> None:
    """Never follow: the token would go along to wherever it leads."""
    if 300 <= answer.status < 400 and answer.status != 304:
        target = answer.header("Location") or "nowhere"
        await answer.close()
        raise UnexpectedAnswer(f"{url} redirects to {target}; use that address", answer.status)
