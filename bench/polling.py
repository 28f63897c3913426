"""Many clients that ask and ask again: ``poll``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
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
from bench.processes import Stage
from bench.scale import Scale
from bench.small_jobs import Load

_SLOTS = 8


async def poll(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure how often a waiting job can be asked for, and how jobs fare meanwhile."""
    server = await stage.server()
    agent = await stage.agent(server, _SLOTS)
    floor_server = await FloorServer.start(stage, Path("/dev/null"))
    async with client.connected(server.url) as connection:
        # no agent offers this service, so the job waits for as long as it is asked for
        job_id = await client.submit(connection, client.upload(server.url, 1, "parked"))
    asked, floor = [], []
    path = f"/download/{job_id}"
    for _ in range(scale.repeats):
        asked.append(await _request_rate(server.url, path, scale))
        floor.append(await _request_rate(floor_server.url, "/json", scale))
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
            tuple(asked),
            Floor("bare aiohttp handler with the same JSON", tuple(floor)),
            ratio_at_least(0.5),
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


async def _request_rate(url: str, path: str, scale: Scale) -> float:
    async with _pollers(url, path, scale.poll_connections) as counts:
        before, started = sum(counts), time.perf_counter()
        await asyncio.sleep(scale.poll_seconds)
        return (sum(counts) - before) / (time.perf_counter() - started)


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
