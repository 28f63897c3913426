"""What the server says to one agent on one connection, and what it knows of that connection."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from config import ServiceLimits, Settings, SettingsInForce
from fleet.attempt import Attempt
from fleet.snapshot_relay import SnapshotRelay
from jobs import Isolation
from records import Assignment, StoredFile
from store import Store
from wire import messages
from wire.frames import Stream, transfer_id
from wire.messages import ProtocolError
from wire.outbox import Outbox, Socket

_PROBE_SECONDS = 2.0
_CLOSE_SECONDS = 2.0
_KILL_SECONDS = 30.0  # for what a killed job left to be archived and sent
_MAX_REASON_BYTES = 120  # RFC 6455, 5.5: the reason of a close frame has at most 123 bytes


class AgentSocket(Socket, Protocol):
    """What a connection needs of the agent's WebSocket (aiohttp's server side has it)."""

    async def close(self, *, code: int = ..., message: bytes = ...) -> bool:
        """Say good-bye; bounded in time by the implementation."""

    def frames(self) -> AsyncIterator[str | bytes]:
        """Iterate over what arrives; ends when the connection does."""


@dataclass(frozen=True, slots=True)
class UnreadableInput:
    """An attempt whose input could not be read when it was to be sent."""

    attempt_id: int
    files: tuple[StoredFile, ...]
    error: Exception


class Connection:
    """One connection of one agent, as a place to send to; a session receives on it.

    ``is_welcomed``: what is assigned may go straight to the agent. ``remains`` are killed
    attempts whose files the agent still has to deliver, by attempt id. ``unreadable`` tells of
    inputs that could not be sent.
    """

    def __init__(
        self, store: Store, settings: SettingsInForce, socket: AgentSocket, address: str
    ) -> None:
        self.address = address
        self.instance = ""
        self.asked: dict[str, Isolation] = {}
        self.asked_number = 0
        self.is_welcomed = False
        self.ended = asyncio.Event()
        self.closing = asyncio.Event()
        self.heard_at = asyncio.get_running_loop().time()
        self.connected_at = time.time()
        self.load: float | None = None
        self.problem: str | None = None
        self.outbox = Outbox()
        self.remains: dict[int, Attempt] = {}
        self.relays: dict[int, SnapshotRelay] = {}
        self.unreadable: asyncio.Queue[UnreadableInput] = asyncio.Queue()
        self._store = store
        self._settings = settings
        self._socket = socket
        self._heard = asyncio.Event()
        self._request_ids = itertools.count(1)

    @property
    def settings(self) -> Settings:
        """The settings that hold now."""
        return self._settings.current

    def heartbeat_seconds(self) -> float:
        """How often each end says that it lives: some may be late within a lease."""
        return min(10.0, self.settings.lease / 6)

    def heard(self) -> None:
        """For the session: something came."""
        self.heard_at = asyncio.get_running_loop().time()
        self._heard.set()

    def end(self) -> None:
        """For the session: nothing more will come."""
        self.is_welcomed = False
        self.ended.set()
        for relay in self.relays.values():
            relay.fail("the connection to the agent ended")

    async def is_alive(self) -> bool:
        """Ask the agent for a sign of life and wait for it, a moment only."""
        self._heard.clear()
        self.outbox.put(messages.Heartbeat(asks=True))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), _PROBE_SECONDS)
        return self._heard.is_set()

    async def close(self, reason: str, code: int = 1001) -> None:
        """End the connection; bounded, also when the peer is gone."""
        message = reason.encode()[:_MAX_REASON_BYTES].decode(errors="ignore").encode()
        with suppress(TimeoutError, ConnectionError):
            await asyncio.wait_for(self._socket.close(code=code, message=message), _CLOSE_SECONDS)
        self.closing.set()

    async def refuse(self, refusal: messages.Refused) -> None:
        """Say why the agent is not taken in, and end the connection."""
        self.outbox.put(refusal)
        await self.outbox.flush(self._socket)
        await self.close(refusal.reason, code=1008)

    async def send(self) -> None:
        """Send all that is to be sent, for as long as the connection lives."""
        await self.outbox.run(self._socket)

    # --- attempts

    def assign(self, attempt: Attempt, assignment: Assignment) -> None:
        """Send a new attempt and its input."""
        settings = self.settings
        limits = settings.services.get(attempt.job.service, ServiceLimits())
        self.outbox.put(
            messages.Assign(
                job_id=attempt.job.id,
                attempt_id=attempt.id,
                number=attempt.number,
                user_id=attempt.job.user_id,
                service=attempt.job.service,
                timeout_seconds=_shorter(limits.timeout, assignment.timeout),
                grace_seconds=settings.kill_grace,
                output=messages.OutputLimits(
                    settings.max_result_bytes, settings.max_result_files, settings.max_log_bytes
                ),
                files=tuple(file.spec for file in assignment.files),
                resources=assignment.demand.resources,
                isolation=limits.asked_isolation(),
                slurm_options=limits.slurm_options,
            )
        )
        self.send_input(attempt.id, assignment.files, 0, assignment.content)

    def ask_for_isolation(self) -> None:
        """Ask the agent whether it can isolate jobs as the services demand now."""
        asked = self.settings.isolations()
        if asked == self.asked:
            return
        self.asked = asked
        self.asked_number += 1
        services = tuple(messages.ServiceIsolation(*item) for item in asked.items())
        self.outbox.put(messages.Services(self.asked_number, services))

    def send_input(
        self,
        attempt_id: int,
        files: tuple[StoredFile, ...],
        offset: int,
        content: bytes | None = None,
    ) -> None:
        """Send the input from ``offset`` on; ``content`` is all of it, if that is here already."""
        size = sum(file.spec.size for file in files)
        if not 0 <= offset <= size:
            raise ProtocolError(f"attempt {attempt_id}: has {offset} of {size} input bytes")

        async def source(position: int) -> bytes:
            if content is not None:
                return content[position:]
            return await self._store.blobs.read_files(files, position)

        def on_failure(error: Exception) -> None:
            self.unreadable.put_nowait(UnreadableInput(attempt_id, files, error))

        if offset < size:
            transfer = transfer_id(attempt_id, Stream.INPUT)
            self.outbox.open(transfer, source, offset, size, on_failure)

    async def kill(self, attempt: Attempt) -> bool:
        """Ask the agent to end an attempt; returns whether it has, and the result is stored."""
        if not self.is_welcomed:
            return False
        self.outbox.put(messages.Kill(attempt.id))
        waits = [asyncio.ensure_future(event.wait()) for event in (attempt.ended, self.ended)]
        limit = self.settings.kill_grace + _KILL_SECONDS
        try:
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return attempt.ended.is_set()

    @asynccontextmanager
    async def snapshot(self, attempt: Attempt) -> AsyncIterator[SnapshotRelay]:
        """Ask the agent for the files of an attempt as they are now."""
        request_id = next(self._request_ids)
        transfer = transfer_id(request_id, Stream.SNAPSHOT)
        relay = SnapshotRelay(
            lambda offset: self.outbox.put(messages.Acknowledge(transfer, offset))
        )
        self.relays[request_id] = relay
        self.outbox.put(messages.Snapshot(request_id, attempt.id))
        try:
            yield relay
        finally:
            del self.relays[request_id]
            self.outbox.put(messages.SnapshotDone(request_id))


def _shorter(one: int | None, other: int | None) -> int | None:
    """Return the shorter of two time limits; None is no limit."""
    return min((limit for limit in (one, other) if limit is not None), default=None)
