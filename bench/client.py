"""A light HTTP/1.1 client: it shares the machine with what it loads.

Requests are prebuilt bytes on keep-alive connections; answers are taken apart only as far as a
benchmark needs. Large bodies go through blocking sockets in a thread (sendfile(2), recv_into),
so that they cost the client next to nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from bench.measure import BenchmarkError

TRIVIAL_SCRIPT = b"echo done\n"
"""The ``run.sh`` of every small job."""

_BOUNDARY = b"orchestrator-benchmark-boundary"
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_IS_JSON = re.compile(rb"\r\ncontent-type: *application/json", re.IGNORECASE)
_RECEIVE_BYTES = 1024 * 1024
_SOCKET_SECONDS = 120.0
_WAIT_SECONDS = 30
_POLL_SECONDS = 0.002
_FINAL = frozenset({"Completed", "Failed", "Invalid", "Killed", "Cleaned"})


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer."""

    status: int
    is_json: bool
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._answer: asyncio.Future[Answer] | None = None

    def request(self, request: bytes) -> asyncio.Future[Answer]:
        """Send a prebuilt request; await the future for its answer."""
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self.connection_lost(None)
        else:
            self._transport.write(request)
        return self._answer

    def close(self) -> None:
        """Close it."""
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport (asyncio's call)."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the request that waits (asyncio's call)."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BenchmarkError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Fulfil the request once its answer is whole (asyncio's call)."""
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self._answer is None or self._answer.done():
            return
        head = bytes(self._buffer[: end + 2])
        status, length = _STATUS.match(head), _LENGTH.search(head)
        if status is None or length is None:
            self._answer.set_exception(BenchmarkError(f"an answer without a length: {head!r:.200}"))
            return
        whole = end + 4 + int(length[1])
        if len(self._buffer) < whole:
            return
        body = bytes(self._buffer[end + 4 : whole])
        del self._buffer[:whole]
        self._answer.set_result(Answer(int(status[1]), _IS_JSON.search(head) is not None, body))


@contextlib.asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[Sequence[Connection]]:
    """Open connections to a server and close them at the end."""
    host, port = _address(url)
    opened: list[Connection] = []
    try:
        for _ in range(count):
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, host, port
            )
            opened.append(connection)
        yield opened
    finally:
        for connection in opened:
            connection.close()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    """Open one connection to a server and close it at the end."""
    async with connections(url, 1) as (connection,):
        yield connection


# --- requests ---------------------------------------------------------------------


def get(url: str, path: str) -> bytes:
    """Return a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n".encode()


def upload(url: str, user: int, service: str = "example") -> bytes:
    """Return the request that uploads a trivial job."""
    body = _form_start(user, service, TRIVIAL_SCRIPT) + _FORM_END
    return _upload_head(url, len(body)) + body


def _upload_head(url: str, length: int) -> bytes:
    head = (
        f"POST /upload HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY.decode()}\r\n"
        f"Content-Length: {length}\r\n\r\n"
    )
    return head.encode()


_FORM_END = b"\r\n--" + _BOUNDARY + b"--\r\n"


def _form_start(user: int, service: str, script: bytes) -> bytes:
    """Return the form up to the end of ``run.sh``, after which files or the end may follow."""
    fields: Mapping[str, str] = {"user_id": str(user), "service": service}
    parts = [
        b"--%b\r\nContent-Disposition: form-data; name=%b\r\n\r\n%b\r\n"
        % (_BOUNDARY, name.encode(), value.encode())
        for name, value in fields.items()
    ]
    return b"".join(parts) + _file_head(b"run.sh") + script


def _file_head(name: bytes) -> bytes:
    return (
        b'--%b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n'
        b"Content-Type: application/octet-stream\r\n\r\n" % (_BOUNDARY, name)
    )


# --- conversations ----------------------------------------------------------------


async def submit(connection: Connection, request: bytes) -> int:
    """Send an upload; returns the job's id. Raises :class:`BenchmarkError` unless it is 201."""
    answer = await connection.request(request)
    if answer.status != 201:
        raise BenchmarkError(f"an upload was answered {answer.status}: {answer.body!r:.300}")
    return int(answer.json()["id"])


async def wait_for_result(connection: Connection, url: str, job_id: int) -> bytes:
    """Return a job's ZIP as soon as there is one.

    Works with a server that holds the answer back until the job has ended (``?wait=``) and
    with one that does not know that and answers at once, which is then asked every 2 ms.
    """
    request = get(url, f"/download/{job_id}?wait={_WAIT_SECONDS}")
    while (answer := await connection.request(request)).is_json:
        state = answer.json()["status"]
        if answer.status != 200 or state in _FINAL:
            raise BenchmarkError(f"job {job_id} did not complete: {answer.body!r:.300}")
        await asyncio.sleep(_POLL_SECONDS)
    return answer.body


def send_large_job(url: str, file: Path, user: int) -> int:
    """Upload a job with ``file`` as its second input; returns the job's id. Blocks."""
    start = _form_start(user, "example", TRIVIAL_SCRIPT) + b"\r\n" + _file_head(b"input.bin")
    length = len(start) + file.stat().st_size + len(_FORM_END)
    with socket.create_connection(_address(url), _SOCKET_SECONDS) as connection:
        with open(file, "rb") as source:
            connection.sendall(_upload_head(url, length) + start)
            connection.sendfile(source)
        connection.sendall(_FORM_END)
        received = b""
        while b"}" not in received:
            data = connection.recv(65536)
            if not data:
                raise BenchmarkError(f"the server closed the connection: {received!r:.300}")
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 201 "):
        raise BenchmarkError(f"an upload was answered {received!r:.300}")
    return int(json.loads(body)["id"])


def download_all(url: str, path: str, expected: int) -> None:
    """Receive a body of ``expected`` bytes and throw it away. Blocks."""
    buffer = memoryview(bytearray(_RECEIVE_BYTES))
    with socket.create_connection(_address(url), _SOCKET_SECONDS) as connection:
        connection.sendall(get(url, path))
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                raise BenchmarkError(f"the server closed the connection: {head!r:.300}")
            head += data
        left = expected - len(head.partition(b"\r\n\r\n")[2])
        if (length := _LENGTH.search(head)) is None or int(length[1]) != expected:
            raise BenchmarkError(f"not a body of {expected} bytes: {head!r:.300}")
        while left > 0:
            received = connection.recv_into(buffer)
            if not received:
                raise BenchmarkError(f"{left} bytes are missing")
            left -= received


def write_random_file(path: Path, size: int) -> None:
    """Make a file that does not compress. Blocks."""
    with open(path, "wb") as file:
        left = size
        while left > 0:
            left -= file.write(os.urandom(min(left, _RECEIVE_BYTES)))


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname is not None and parts.port is not None
    return parts.hostname, parts.port
