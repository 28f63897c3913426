"""Streams of what happens, as Server-Sent Events (HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
import dataclasses
import heapq
import json
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from aiohttp import hdrs, web

from api.answers import rfc3339, transition_body
from api.callers import user_asked_for
from api.connection import break_off, ended_by_disconnection
from api.errors import BadRequest, UnknownJob
from api.routes import job_id_of
from events import AgentChange, Event, FeedClosed, Lagged, Subscription, Transition
from jobs import has_ended
from store import Store
from telemetry import logs

log = logging.getLogger("orchestrator.api")

_HEARTBEAT_SECONDS = 15.0
_WRITE_SECONDS = 10.0
_EVENTS_BEHIND = 1000
_REPLAY_EVENTS = 500
_EVENT_ID = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")


class EventHandlers:
    """The handlers of event streams: of one job, and of all there is."""

    def __init__(self, store: Store, long_reads: asyncio.Semaphore) -> None:
        self._store = store
        self._long_reads = long_reads

    async def of_job(self, request: web.Request) -> web.StreamResponse:
        """Tell the transitions of one job, from its first to its last, then end."""
        job_id = job_id_of(request)
        position = _position_of(request) or _Position(0, 0)
        # subscribed before the history is read, so that nothing is lost in between
        with self._store.feed.transitions_of(job_id, _EVENTS_BEHIND) as subscription:
            history = await self._store.history.of_job(job_id)
            if not history:
                raise UnknownJob
            position.transition = min(position.transition, history[-1].id)
            is_over = has_ended(history[-1].after)
            if is_over and position.transition == history[-1].id:
                # the one answer after which an EventSource does not connect again
                return web.Response(status=204)
            stream = _Stream(request, position, _Filter())
            return await stream.run(lambda: self._tell_job(stream, history, subscription))

    async def of_all(self, request: web.Request) -> web.StreamResponse:
        """Tell what happens from now on, or from what the client heard last."""
        position = _position_of(request)
        wanted = _Filter(user_asked_for(request), request.query.get("service"))
        last = _Position(*await self._store.history.last_ids())
        if position is not None and not wanted.takes_agent_changes():
            position.agent_change = last.agent_change
        # ids past the end are of a database that was put back to an older state
        stream = _Stream(request, last if position is None else position.at_most(last), wanted)
        return await stream.run(lambda: self._tell_all(stream))

    async def _tell_job(
        self, stream: _Stream, history: Sequence[Transition], subscription: Subscription
    ) -> None:
        events: Sequence[Event] = history
        while True:
            await stream.send(events)
            if any(isinstance(event, Transition) and has_ended(event.after) for event in events):
                return
            events = await stream.next_events(subscription)

    async def _tell_all(self, stream: _Stream) -> None:
        # what may take long is told first: a subscription does not wait without bound
        await self._replay(stream)
        with self._store.feed.all_events(_EVENTS_BEHIND) as subscription:
            # what happened between the replay's end and the subscription
            await self._replay(stream)
            await stream.send_position()
            while True:
                await stream.send(await stream.next_events(subscription))

    async def _replay(self, stream: _Stream) -> None:
        """Tell what the store has after the stream's position, a bounded number at a time."""
        history, wanted = self._store.history, stream.wanted
        while True:
            before = dataclasses.replace(stream.position)
            async with self._long_reads:
                transitions, reached = await history.transitions_after(
                    before.transition, _REPLAY_EVENTS, wanted.user_id, wanted.service
                )
            changes: list[AgentChange] = []
            if wanted.takes_agent_changes():
                changes = await history.agent_changes_after(before.agent_change, _REPLAY_EVENTS)
            await stream.send(heapq.merge(transitions, changes, key=lambda event: event.at))
            stream.position.transition = max(stream.position.transition, reached)
            if stream.position == before:
                return


# --- positions and filters --------------------------------------------------------


@dataclass(slots=True)
class _Position:
    """How far a stream is: the ids of the last transition and the last agent change passed.

    It is the event id that clients see. What it names is the same after a restart.
    """

    transition: int
    agent_change: int

    def pass_over(self, event: Event) -> bool:
        """Move on to an event; returns False if it was passed before."""
        if isinstance(event, Transition):
            is_new = event.id > self.transition
            self.transition = max(event.id, self.transition)
        else:
            is_new = event.id > self.agent_change
            self.agent_change = max(event.id, self.agent_change)
        return is_new

    def at_most(self, last: _Position) -> _Position:
        """Return this position, or ``last`` where it is beyond."""
        return _Position(
            min(self.transition, last.transition), min(self.agent_change, last.agent_change)
        )

    def line(self) -> bytes:
        """Return the line that tells the client its position."""
        return b"id: %d-%d\n" % (self.transition, self.agent_change)


@dataclass(frozen=True, slots=True)
class _Filter:
    """Which events are wanted; agent changes are nobody's, so only who wants all gets them."""

    user_id: int | None = None
    service: str | None = None

    def takes_agent_changes(self) -> bool:
        return self.user_id is None and self.service is None

    def lets_through(self, event: Event) -> bool:
        if isinstance(event, AgentChange):
            return self.takes_agent_changes()
        return self.user_id in (None, event.user_id) and self.service in (None, event.service)


def _position_of(request: web.Request) -> _Position | None:
    """Return what the client has heard last, None if it does not say. Raises BadRequest."""
    text = request.query.get("last_event_id") or request.headers.get("Last-Event-ID")
    if not text:
        return None
    match = _EVENT_ID.fullmatch(text)
    if match is None:
        raise BadRequest("Last-Event-ID: must be the id of an event of this server")
    return _Position(int(match[1]), int(match[2]))


# --- one stream -------------------------------------------------------------------


class _Stream:
    """One client's stream: its position, and what is written to it, with bounds.

    At most some 128 KiB wait in this process (aiohttp's buffer and the transport's) and 1000
    references to events; a client that does not take them in time is dropped, and finds
    everything again with its last event id.
    """

    def __init__(self, request: web.Request, position: _Position, wanted: _Filter) -> None:
        self.position = position
        self.wanted = wanted
        self._request = request
        self._response = web.StreamResponse(
            headers={
                hdrs.CONTENT_TYPE: "text/event-stream; charset=utf-8",
                hdrs.CACHE_CONTROL: "no-store",
                # nginx would gather events before it passes them on
                "X-Accel-Buffering": "no",
            }
        )

    async def run(self, tell: Callable[[], Awaitable[None]]) -> web.StreamResponse:
        """Let ``tell`` send until it ends, the client is gone or slow, or the server stops."""
        await self._response.prepare(self._request)
        if self._request.method == hdrs.METH_HEAD:
            return self._response
        try:
            with ended_by_disconnection(self._request):
                await tell()
        except FeedClosed:
            pass  # the server stops: a proper end, after which clients come again
        except (Lagged, TimeoutError):
            logs.event(log, "slow_reader_dropped", address=self._request.remote)
            break_off(self._request)
            raise ConnectionResetError("the client is too slow") from None
        return self._response

    async def next_events(self, subscription: Subscription) -> list[Event]:
        """Wait for events, with a comment now and then that shows that the stream lives."""
        while True:
            try:
                async with asyncio.timeout(_HEARTBEAT_SECONDS):
                    return await subscription.next_all()
            except TimeoutError:
                await self._write(b": heartbeat\n" + self.position.line() + b"\n")

    async def send(self, events: Iterable[Event]) -> None:
        """Tell those of the events that are wanted and were not told before."""
        parts = []
        for event in events:
            if self.position.pass_over(event) and self.wanted.lets_through(event):
                parts += [self.position.line(), _encoded(event)]
        if parts:
            await self._write(b"".join(parts))

    async def send_position(self) -> None:
        """Tell the client where it is, though nothing has happened yet."""
        await self._write(self.position.line() + b"\n")

    async def _write(self, data: bytes) -> None:
        async with asyncio.timeout(_WRITE_SECONDS):
            await self._response.write(data)


@lru_cache(maxsize=1024)
def _encoded(event: Event) -> bytes:
    """Return an event as it is sent; encoded once for all the streams that send it."""
    if isinstance(event, Transition):
        kind, body = b"job", transition_body(event)
    else:
        kind, body = b"agent", _agent_change_body(event)
    return b"event: %s\ndata: %s\n\n" % (kind, json.dumps(body).encode())


def _agent_change_body(change: AgentChange) -> dict[str, Any]:
    return {
        "id": change.agent_id,
        "name": change.name,
        "status": change.kind.value,
        "at": rfc3339(change.at),
    }
