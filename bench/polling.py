"""Many clients that ask and ask again: ``poll``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import client
from bench.client import Connection
from bench.floor_server import FloorServer
from bench.measure import (
    BenchmarkError,
    Figure,
    Floor,
    Unit,
    process_memory,
    ratio_at_least,
    server_memory,
)
from bench.processes import Stage, cpu_seconds
from bench.scale import Scale
from bench.small_jobs import Load

_SLOTS = 8
_BARE = "bare aiohttp handler with the same JSON"


@dataclass(frozen=True, slots=True)
class _Asked:
    """One window of polling: answers a second, and the server's processor time for each."""

    rate: float
    cpu_microseconds: float


async def poll(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure how often a waiting job can be asked for, and how jobs fare meanwhile."""
    server = await stage.server()
    agent = await stage.agent(server, _SLOTS)
    floor_server = await FloorServer.start(stage, Path("/dev/null"))
    async with client.connected(server.url) as connection:
        # no agent offers this service, so the job waits for as long as it is asked for
        job_id = await client.submit(connection, client.upload(server.url, 1, "parked"))
    asked: list[_Asked] = []
    floor: list[_Asked] = []
    path = f"/download/{job_id}"
    for _ in range(scale.repeats):
        asked.append(await _ask(server.url, path, server.pid, scale))
        floor.append(await _ask(floor_server.url, "/json", floor_server.process.pid, scale))
    load = Load(server, scale.throughput_users, scale.throughput_connections)
    polled, alone = [], []
    for _ in range(scale.repeats):
        alone.append(await load.run(scale.poll_jobs))
        async with _pollers(server.url, path, scale.poll_connections):
            polled.append(await load.run(scale.poll_jobs))
    return [
        Figure(
            "poll",
            f"GET /download/{{id}}, {scale.poll_connections} connections",
            Unit.REQUESTS_PER_SECOND,
            tuple(window.rate for window in asked),
            Floor(_BARE, tuple(window.rate for window in floor)),
            ratio_at_least(0.5),
        ),
        Figure(
            "poll",
            "server CPU for a request",
            Unit.MICROSECONDS,
            tuple(window.cpu_microseconds for window in asked),
            Floor(_BARE, tuple(window.cpu_microseconds for window in floor)),
            note="depends less on other load than the rate does",
        ),
        Figure(
            "poll",
            "jobs while so polled",
            Unit.JOBS_PER_SECOND,
            tuple(polled),
            Floor("the same jobs without polling", tuple(alone)),
        ),
        server_memory("poll", server.peak_memory()),
        process_memory("poll", "agent", agent.peak_memory()),
    ]


async def _ask(url: str, path: str, server_pid: int, scale: Scale) -> _Asked:
    async with _pollers(url, path, scale.poll_connections) as counts:
        before, cpu, started = sum(counts), cpu_seconds(server_pid), time.perf_counter()
        await asyncio.sleep(scale.poll_seconds)
        seconds, answers = time.perf_counter() - started, sum(counts) - before
        cpu = cpu_seconds(server_pid) - cpu
    if not answers:
        raise BenchmarkError(f"no answer to {path} within {seconds:.1f} s")
    return _Asked(answers / seconds, 1e6 * cpu / answers)


@contextlib.asynccontextmanager
async def _pollers(url: str, path: str, count: int) -> AsyncIterator[Sequence[int]]:
    """Ask on many connections as fast as answers come; gives the counts of answers so far."""
    request = client.get(url, path)
    counts = [0] * count
    async with client.connections(url, count) as connections:
        tasks = [
            asyncio.create_task(_ask_for_ever(connection, request, counts, number))
            for number, connection in enumerate(connections)
        ]
        try:
            yield counts
        finally:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BenchmarkError):
            raise outcome


async def _ask_for_ever(
    connection: Connection, request: bytes, counts: list[int], number: int
) -> None:
    while True:
        answer = await connection.request(request)
        if answer.status != 200:
            raise BenchmarkError(f"asked for a job's status, got {answer.status}")
        counts[number] += 1
