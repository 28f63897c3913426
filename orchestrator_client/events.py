"""Streams of events (Server-Sent Events): parsed, and followed over broken connections."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from orchestrator_client.errors import UnexpectedAnswer
from orchestrator_client.records import Event
from orchestrator_client.retries import Sender
from orchestrator_client.transport import PIECE_BYTES, Answer, ConnectionBroken, Request

POSITION = "position"
"""The kind of an event that tells only how far the stream is."""

# the server sends a comment every 15 seconds
_SILENCE_SECONDS = 45.0
_PAUSE_SECONDS = 0.2
_MAX_LINE_BYTES = 1024 * 1024


async def follow_events(
    sender: Sender,
    query: tuple[tuple[str, str], ...],
    after: str | None,
    deadline: float | None = None,
) -> AsyncGenerator[Event, None]:
    """Yield what happens from now on, or after a position, without gaps, over restarts too.

    The first of :data:`POSITION` tells that the stream stands. Ends at the deadline, a time of
    ``time.monotonic()``. Raises :class:`orchestrator_client.errors.ServerUnavailable` when the
    server stays away.
    """
    position = after
    while deadline is None or time.monotonic() < deadline:
        headers = {} if position is None else {"Last-Event-ID": position}
        request = Request("GET", "/events", query, headers, silence=_SILENCE_SECONDS)
        try:
            async with sender.answer(request) as answer:
                _check_type(answer)
                async with aclosing(_parse(answer, deadline)) as events:
                    async for event in events:
                        position = event.position
                        yield event
        except ConnectionBroken:
            pass
        # also an end in order: the server stops
        await sender.transport.sleep(_PAUSE_SECONDS)


def _check_type(answer: Answer) -> None:
    if not (answer.header("Content-Type") or "").startswith("text/event-stream"):
        raise UnexpectedAnswer("the server sends no events", answer.status)


async def _parse(answer: Answer, deadline: float | None) -> AsyncGenerator[Event, None]:
    kind, position, data = "", "", ""
    async with aclosing(_lines(answer, deadline)) as lines:
        async for line in lines:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                position = value
            elif field == "event":
                kind = value
            elif field == "data":
                data += value
            elif not line and position:
                yield _event(kind, position, data)
                kind, data = "", ""


def _event(kind: str, position: str, data: str) -> Event:
    if not data:
        return Event(POSITION, position, {})
    try:
        return Event(kind, position, json.loads(data))
    except ValueError:
        raise UnexpectedAnswer("an event of the server is not JSON") from None


async def _lines(answer: Answer, deadline: float | None) -> AsyncGenerator[str, None]:
    buffer = bytearray()
    while data := await answer.read(PIECE_BYTES, _silence(deadline)):
        buffer += data
        *whole, rest = buffer.split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace")
        if len(rest) > _MAX_LINE_BYTES:
            raise UnexpectedAnswer("an event of the server is too long")
        buffer = bytearray(rest)


def _silence(deadline: float | None) -> float:
    left = _SILENCE_SECONDS if deadline is None else deadline - time.monotonic()
    return min(max(left, 0.0), _SILENCE_SECONDS)
