"""Large files in and out: ``upload``, ``download`` and ``results``."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import aiohttp

from bench import client, floors
from bench.floor_server import FloorServer
from bench.measure import (
    BenchmarkError,
    Figure,
    Floor,
    Unit,
    megabytes_per_second,
    milliseconds,
    process_memory,
    ratio_at_least,
    server_memory,
)
from bench.processes import Child, Server, Stage
from bench.scale import Scale
from wire.frames import CHUNK_BYTES, encode_frame

_HEALTH_PAUSE_SECONDS = 0.02
_END_BYTES = 22  # of a ZIP without members or comment (APPNOTE.TXT, 4.3.16)


async def upload(stage: Stage, scale: Scale) -> list[Figure]:
    """Upload a job of almost the largest size, until its 201."""
    server = await stage.server()
    source = await _random_file(stage, scale.transfer_bytes)
    times: list[float] = []
    floor: list[float] = []
    health: list[float] = []
    for _ in range(scale.repeats):
        async with _health_watch(server, health):
            times.append(await _time(client.send_large_job, server.url, source, 1))
        floor.append(await floors.copy_by_dd(source, stage.directory / "copy"))
    size = scale.transfer_bytes
    return [
        Figure(
            "upload",
            _megabytes(size),
            Unit.MEGABYTES_PER_SECOND,
            megabytes_per_second(size, times),
            Floor("dd conv=fsync on the same file system", megabytes_per_second(size, floor)),
            ratio_at_least(0.4),
        ),
        _health_figure("upload", health),
        server_memory("upload", server.peak_memory()),
    ]


async def download(stage: Stage, scale: Scale) -> list[Figure]:
    """Download a large result, which a simulated agent delivered before."""
    server = await stage.server()
    source = await _random_archive(stage, scale.transfer_bytes)
    floor_server = await FloorServer.start(stage, source)
    job_id = await _make_result(stage, server, source)
    times: list[float] = []
    floor: list[float] = []
    health: list[float] = []
    size, path = scale.transfer_bytes, f"/download/{job_id}"
    for _ in range(scale.repeats):
        async with _health_watch(server, health):
            times.append(await _time(client.download_all, server.url, path, size))
        floor.append(await _time(client.download_all, floor_server.url, "/file", size))
    return [
        Figure(
            "download",
            _megabytes(size),
            Unit.MEGABYTES_PER_SECOND,
            megabytes_per_second(size, times),
            Floor("bare aiohttp FileResponse", megabytes_per_second(size, floor)),
            ratio_at_least(0.4),
        ),
        _health_figure("download", health),
        server_memory("download", server.peak_memory()),
        process_memory("download", "bare server's", floor_server.process.peak_memory()),
    ]


async def _make_result(stage: Stage, server: Server, source: Path) -> int:
    """Make a job with ``source`` as its result; returns its id."""
    agent = await stage.module("bench.simulated_agents", server.url, "1", str(source))
    async with client.connected(server.url) as connection:
        job_id = await client.submit(connection, client.upload(server.url, 1))
    await _delivery_seconds(agent)
    await agent.kill()
    return job_id


async def results(stage: Stage, scale: Scale) -> list[Figure]:
    """Let a simulated agent stream a large result back, from its Finished to its Stored."""
    server = await stage.server()
    source = await _random_archive(stage, scale.result_bytes)
    floor_server = await FloorServer.start(stage, source)
    agent = await stage.module("bench.simulated_agents", server.url, "1", str(source))
    times: list[float] = []
    floor: list[float] = []
    copies: list[float] = []
    health: list[float] = []
    async with client.connected(server.url) as connection:
        for _ in range(scale.repeats):
            async with _health_watch(server, health):
                await client.submit(connection, client.upload(server.url, 1))
                times.append(await _delivery_seconds(agent))
            floor.append(await _time_bare_socket(floor_server.url, source))
            copies.append(await floors.copy_by_dd(source, stage.directory / "copy"))
    size = scale.result_bytes
    speeds = megabytes_per_second(size, times)
    return [
        Figure(
            "results",
            _megabytes(size),
            Unit.MEGABYTES_PER_SECOND,
            speeds,
            Floor("bare aiohttp WebSocket, same frames", megabytes_per_second(size, floor)),
            ratio_at_least(0.3),
        ),
        Figure(
            "results",
            f"{_megabytes(size)}, beside a copy",  # the socket keeps nothing, a copy does
            Unit.MEGABYTES_PER_SECOND,
            speeds,
            Floor("dd conv=fsync on the same file system", megabytes_per_second(size, copies)),
        ),
        _health_figure("results", health),
        server_memory("results", server.peak_memory()),
        process_memory("results", "simulated agent's", agent.peak_memory()),
    ]


async def _time_bare_socket(url: str, source: Path) -> float:
    """Send a file in frames through a WebSocket that does nothing else; returns the seconds."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/socket", compress=0) as socket,
    ):
        with open(source, "rb") as file:
            started = time.perf_counter()
            transfer = offset = 0
            while data := file.read(CHUNK_BYTES):
                await socket.send_bytes(encode_frame(transfer, offset, data))
                offset += len(data)
            await socket.send_bytes(b"")
            await socket.receive_str()
            return time.perf_counter() - started


async def _delivery_seconds(agent: Child) -> float:
    """Wait until a simulated agent has delivered; returns the seconds that it took."""
    while "delivery_seconds" not in (record := await agent.read_record()):
        pass  # it also says when it is connected
    return float(record["delivery_seconds"])


async def _time(function: Callable[..., object], *arguments: object) -> float:
    """Run a blocking conversation in a thread; returns the seconds."""
    started = time.perf_counter()
    await asyncio.to_thread(function, *arguments)
    return time.perf_counter() - started


async def _random_file(stage: Stage, size: int) -> Path:
    path = stage.directory / "random.bin"
    await asyncio.to_thread(client.write_random_file, path, size)
    return path


async def _random_archive(stage: Stage, size: int) -> Path:
    """Make a file that a server takes for a result: random bytes, and the end of a ZIP."""
    path = await _random_file(stage, size)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0, 0, 0, size - _END_BYTES, 0)
    with open(path, "r+b") as file:
        file.seek(size - _END_BYTES)
        file.write(end)
    return path


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


# --- /health meanwhile ------------------------------------------------------------


@contextlib.asynccontextmanager
async def _health_watch(server: Server, seconds: list[float]) -> AsyncIterator[None]:
    """Ask for ``/health`` from a second client all the while; adds how long each answer took.

    The last answer is waited for: to leave it out would leave out the slow ones.
    """
    over = asyncio.Event()
    async with client.connected(server.url) as connection, asyncio.TaskGroup() as tasks:
        tasks.create_task(_ask_for_health(connection, server.url, seconds, over))
        try:
            yield
        finally:
            over.set()


async def _ask_for_health(
    connection: client.Connection, url: str, seconds: list[float], over: asyncio.Event
) -> None:
    request = client.get(url, "/health")
    while not over.is_set():
        started = time.perf_counter()
        answer = await connection.request(request)
        seconds.append(time.perf_counter() - started)
        if answer.status != 200:
            raise BenchmarkError(f"/health was answered {answer.status}: {answer.body!r:.300}")
        await asyncio.sleep(_HEALTH_PAUSE_SECONDS)


def _health_figure(benchmark: str, seconds: Sequence[float]) -> Figure:
    return Figure(benchmark, "GET /health meanwhile", Unit.MILLISECONDS, milliseconds(seconds))
