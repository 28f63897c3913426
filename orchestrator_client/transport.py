"""What goes to the server and comes back, and what a transport has to do for it.

Every operation of this package is written once, as coroutines on a :class:`Transport`. There are
two: :mod:`orchestrator_client.blocking`, whose methods block and never suspend, so that the
synchronous client needs no event loop, and :mod:`orchestrator_client.nonblocking` on aiohttp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

T = TypeVar("T")

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 60.0
PIECE_BYTES = 128 * 1024


class ConnectionFailed(Exception):
    """No connection could be made, so the server got nothing. ``is_final``: nor will it later."""

    def __init__(self, reason: str, is_final: bool = False) -> None:
        super().__init__(reason)
        self.is_final = is_final


class ConnectionBroken(Exception):
    """The connection broke; whether the server got the request is not known."""


class Body(Protocol):
    """What is sent with a request, again from its start if need be."""

    @property
    def length(self) -> int:
        """Bytes in all."""

    @property
    def content_type(self) -> str:
        """The value of ``Content-Type``."""

    def pieces(self) -> Iterator[bytes]:
        """Read it from its start; may raise :class:`orchestrator_client.errors.UnusableFile`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. ``path`` is below the server's address and percent-encoded already.

    ``silence`` is how many seconds the server may say nothing. ``is_repeatable`` says that it does
    no harm to send it once more when the connection broke.
    """

    method: str
    path: str
    query: tuple[tuple[str, str], ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    silence: float = SILENCE_SECONDS
    is_repeatable: bool = True


class Answer(Protocol):
    """The head of an answer, and its body as it comes. Close it."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    def header(self, name: str) -> str | None:
        """Return the value of a header field, None without it."""

    async def read(self, size: int, silence: float | None = None) -> bytes:
        """Return up to ``size`` bytes as soon as there are any, none at the end.

        Raises :class:`ConnectionBroken` when the rest does not come, or nothing for ``silence``
        seconds (by default those of the request).
        """

    async def close(self) -> None:
        """Give the connection back, or end it if there is more to come."""


class Transport(Protocol):
    """Sends requests, and waits, in its own way: blocking, or on an event loop."""

    async def send(self, request: Request) -> Answer:
        """Send a request and return the head of its answer, whatever its status.

        Raises :class:`ConnectionFailed` and :class:`ConnectionBroken`.
        """

    async def sleep(self, seconds: float) -> None:
        """Wait."""

    async def run(self, function: Callable[[], T]) -> T:
        """Call a function that works on local files, where it does not hold up others."""

    async def close(self) -> None:
        """End all connections."""
