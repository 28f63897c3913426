"""Connections that ask nothing, too many of them, and headers without end."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from api.connection import ConnectionLimits, ConnectionRunner
from tests.api.test_api import assert_error
from tests.harness import Answer, curl, eventually, running_server


class Limited(TestServer):
    """A server in this process whose connections have narrow limits."""

    def __init__(self, application: web.Application, limits: ConnectionLimits) -> None:
        super().__init__(application)
        self._limits = limits
        self.waiting = 0  # how many requests wait for the event

    async def _make_runner(self, **options: Any) -> ConnectionRunner:
        return ConnectionRunner(self.app, limits=self._limits, **options)


@asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[tuple[Limited, asyncio.Event]]:
    """Serve /health at once, and all else once the event is set."""
    released = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/health":
            server.waiting += 1
            await released.wait()
        return web.Response(text="answered")

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    server = Limited(application, limits)
    await server.start_server()
    try:
        yield server, released
    finally:
        released.set()
        await server.close()


class Client:
    """A connection on which bytes are said as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, server: TestServer) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", server.port))

    def say(self, data: bytes) -> None:
        self.writer.write(data)

    def ask(self, path: str) -> None:
        self.say(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def status(self) -> int:
        """Return the status of the next answer; 0 if the connection ends instead."""
        async with asyncio.timeout(10):
            try:
                head = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                return 0
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await self.reader.readexactly(length)
            return int(head.split()[1])

    async def is_ended(self) -> bool:
        """Wait for the end of the connection."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


async def test_who_says_nothing_or_never_ends_its_header_is_let_go() -> None:
    limits = ConnectionLimits(header_seconds=0.2, idle_seconds=0.4)
    async with serving(limits) as (server, released):
        silent, slow, busy = [await Client.to(server) for _ in range(3)]
        slow.say(b"GET / HTTP/1.1\r\nHost: loc")
        busy.ask("/wait")
        assert await silent.is_ended()
        assert await slow.is_ended()
        # a request that is answered slowly is no connection that asks nothing
        await asyncio.sleep(0.5)
        released.set()
        assert await busy.status() == 200
        busy.ask("/health")
        assert await busy.status() == 200
        # the next header on it has to come in time, too, and so has a next request at all
        busy.say(b"GET / HT")
        assert await busy.is_ended()
        idle = await Client.to(server)
        idle.ask("/health")
        assert await idle.status() == 200
        assert await idle.is_ended()


async def test_whoever_has_been_idle_longest_makes_room_and_the_busy_stay() -> None:
    async with serving(ConnectionLimits(connections=4, reserve=2)) as (server, released):
        busy = await Client.to(server)
        busy.ask("/wait")
        silent = [await Client.to(server) for _ in range(3)]
        silent[0].ask("/health")  # which is now the one that was idle for the shortest time
        assert await silent[0].status() == 200
        fifth = await Client.to(server)
        fifth.ask("/health")
        assert await fifth.status() == 200
        assert await silent[1].is_ended()
        silent[0].ask("/health")
        assert await silent[0].status() == 200
        released.set()
        assert await busy.status() == 200


async def test_when_all_are_busy_only_health_and_agents_get_a_place() -> None:
    async with serving(ConnectionLimits(connections=2, reserve=2)) as (server, released):
        busy = [await Client.to(server) for _ in range(2)]
        for client in busy:
            client.ask("/wait")
        await eventually(lambda: server.waiting == 2, "both are being answered")
        third = await Client.to(server)
        third.ask("/health")
        assert await third.status() == 200
        fourth = await Client.to(server)
        fourth.ask("/jobs")
        assert await fourth.status() == 503
        assert await third.is_ended()
        agent = await Client.to(server)
        agent.ask("/agent")
        released.set()
        assert [await client.status() for client in [*busy, agent]] == [200, 200, 200]


async def test_a_header_is_bounded_in_all() -> None:
    async with serving(ConnectionLimits()) as (server, released):
        released.set()
        field = b"X-%d: " + b"x" * 8000 + b"\r\n"
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        fits, at_once, dripping = [await Client.to(server) for _ in range(3)]
        fits.say(request + b"".join(field % n for n in range(3)) + b"\r\n")
        assert await fits.status() == 200
        at_once.say(request + b"".join(field % n for n in range(5)) + b"\r\n")
        assert await at_once.status() == 431
        dripping.say(request)
        for number in range(4):
            dripping.say(field % number)
            await dripping.writer.drain()
            await asyncio.sleep(0.01)
        dripping.say(field % 4)
        assert await dripping.status() == 431
        assert await dripping.is_ended()


async def test_many_bytes_behind_a_header_and_requests_in_a_row_are_no_header() -> None:
    async with serving(ConnectionLimits(header_bytes=2000, header_seconds=0.3)) as (server, event):
        event.set()
        client = await Client.to(server)
        posts = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
        client.say(posts)
        for _ in range(10):
            client.say(bytes(10_000))
            await asyncio.sleep(0.02)
        assert await client.status() == 200
        client.say((posts + bytes(100_000)) * 3)
        assert [await client.status() for _ in range(3)] == [200, 200, 200]


async def test_fifteen_hundred_silent_connections_stop_nobody(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 3000:
        pytest.skip("this process may not have so many connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        context = running_server(tmp_path / "server", "--slots", "1")
        server = await context.__aenter__()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3000), hard))
    try:
        port = int(server.url.rpartition(":")[2])
        with ExitStack() as stack:
            for _ in range(1500):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.enter_context(closing(writer))
            assert (await curl(f"{server.url}/health")).status == 200
            await server.result(await server.upload("ulimit -Sn"))
        limit = (await server.download(1)).body
        assert b"512\n" in limit
        assert server.log().count("too_many") <= 1
        assert "Traceback" not in server.log()
    finally:
        await context.__aexit__(None, None, None)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- what is no good request ------------------------------------------------------


async def said(url: str, *lines: str | bytes) -> Answer:
    """Send a request as it is; returns the first answer to it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    parts = [line.encode() if isinstance(line, str) else line for line in lines]
    writer.write(b"\r\n".join([*parts, b"", b""]))
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0")
        return Answer(int(head.split()[1]), await reader.readexactly(length))
    finally:
        writer.close()


async def test_odd_fields_are_refused_in_the_error_shape(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        url = server.url
        host = f"Host: {url.removeprefix('http://')}"
        for origin in ("http://[", "http://x y", "http://a/b", "//"):
            answer = await said(url, "GET /jobs HTTP/1.1", host, f"Origin: {origin}")
            assert_error(answer, 400, "^Origin: ")
        for strange in ("a b", "[::1", "a:b", "a:5000:1", "user@localhost", "loc\xe4lhost"):
            answer = await said(url, "GET /jobs HTTP/1.1", f"Host: {strange}".encode("latin-1"))
            assert answer.status in (400, 403), (strange, answer)
        upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
        token = f"Authorization: Bearer {server.agent_token()}"
        for field in (b"Sec-WebSocket-Key: \xff\xff", b"Sec-WebSocket-Protocol: \xe4"):
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
            answer = await said(
                url,
                "GET /agent HTTP/1.1",
                host,
                token,
                *upgrade,
                field,
                *([key] * (b"Key" not in field)),
            )
            assert_error(answer, 400, "ASCII")
        assert_error(
            await said(url, "POST /upload HTTP/1.1", host, "Expect: x", "Content-Length: 5"),
            417,
            "^Expect: ",
        )
        answer = await said(url, "GET /nothing HTTP/1.1", host, "Expect: x")
        assert_error(answer, 417, "Expect")
        form = "Content-Type: multipart/form-data; boundary=b"
        for coding in ("gzip", "br", "deflate, gzip"):
            answer = await said(
                *(url, "POST /upload HTTP/1.1", host, form, "Content-Length: 4"),
                *(f"Content-Encoding: {coding}", "", "abcd"),
            )
            assert_error(answer, 415, "^Content-Encoding: ")
        assert "Traceback" not in server.log()
        assert "level=ERROR" not in server.log()


async def test_nobody_is_asked_for_a_body_before_the_token_was_looked_at(tmp_path: Path) -> None:
    environment = {"TOKENS": "required"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        host = f"Host: {server.url.removeprefix('http://')}"
        form = "Content-Type: multipart/form-data; boundary=b"
        lines = ("POST /upload HTTP/1.1", host, form, "Content-Length: 100")
        answer = await said(server.url, *lines, "Expect: 100-continue")
        assert_error(answer, 401, "wants a token")
        answer = await said(server.url, *lines, "Expect: x")
        assert_error(answer, 401, "wants a token")


async def test_pages_of_other_sites_get_nothing_shown_framed_or_loaded(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        for path in ("/", "/health", "/jobs", "/nothing", "/swagger-ui/"):
            answer = await curl("-i", server.url + path)
            head = answer.body.lower()
            assert b"frame-ancestors 'none'" in head, path
            assert b"cross-origin-resource-policy: same-origin" in head, path
        policy = (await curl("-i", f"{server.url}/swagger-ui/")).body
        assert b"default-src 'self'" in policy
        site = ("-H", "Sec-Fetch-Site: cross-site")
        navigate = ("-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: document")
        framed = ("-H", "Sec-Fetch-Mode: navigate", "-H", "Sec-Fetch-Dest: iframe")
        url = f"{server.url}/jobs"
        assert (await curl(*site, *navigate, url)).status == 200
        assert (await curl("-H", "Sec-Fetch-Site: same-origin", url)).status == 200
        for headers in (site, (*site, *framed), ("-H", "Sec-Fetch-Site: same-site")):
            assert_error(await curl(*headers, url), 403, "another site")
        assert_error(
            await curl(*site, *navigate, "-X", "POST", f"{server.url}/upload"), 403, "site"
        )


async def test_an_answer_that_meets_damage_breaks_off_and_is_no_second_answer(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path / "server", "--slots", "1") as server:
        job_id = await server.upload("head -c 3000000 /dev/urandom > noise")
        await server.wait(job_id, "Completed")
        whole = (await server.download(job_id)).body
        await server.stop()
        server.change("UPDATE chunk SET data = zeroblob(length(data)) WHERE id & 0xfffff = 8")
        await server.start("--no-agent")
        target = tmp_path / "got"
        for _ in range(3):
            process = await asyncio.create_subprocess_exec(
                *("curl", "-sS", "-C", "-", "-o", str(target), f"{server.url}/download/{job_id}")
            )
            assert await process.wait() != 0
        got = target.read_bytes()
        assert len(got) < len(whole)
        assert got == whole[: len(got)]
        assert b"HTTP/1.1" not in got
        await eventually(lambda: "answer_broken_off" in server.log(), "it says so")
        assert (await curl(f"{server.url}/health")).status == 200


async def test_a_damaged_archive_is_an_error_in_words(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", "--slots", "1") as server:
        job_id = await server.upload("true")
        await server.wait(job_id, "Completed")
        await server.stop()
        # as a version has stored it that kept no checksums
        server.change(
            "UPDATE chunk SET data = zeroblob(length(data)), crc32 = NULL WHERE id >> 20 ="
            " (SELECT result_blob FROM attempt)"
        )
        await server.start("--no-agent")
        for path in ("files", "files/run.sh"):
            answer = await curl(f"{server.url}/jobs/{job_id}/{path}")
            assert_error(answer, 500, "archive|ZIP|damaged")
        assert "Traceback" not in server.log()
