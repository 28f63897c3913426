"""Trivial jobs through the real server and a real agent: ``latency`` and ``throughput``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

from bench import client, database_file, floors
from bench.client import Connection
from bench.measure import (
    Figure,
    Floor,
    Unit,
    milliseconds,
    process_memory,
    ratio_at_least,
    ratio_at_most,
    server_memory,
)
from bench.processes import Server, Stage, cpu_seconds
from bench.scale import Scale

_WARM_UP_JOBS = 3
_LATENCY_SLOTS = 2


async def latency(stage: Stage, scale: Scale) -> list[Figure]:
    """Time one job from the first byte of its upload to its ZIP in the client's hands."""
    server = await stage.server()
    agent = await stage.agent(server, _LATENCY_SLOTS)
    answered: list[float] = []
    delivered: list[float] = []
    floor: list[float] = []
    async with client.connected(server.url) as connection:
        for _ in range(_WARM_UP_JOBS):
            await _time_job(connection, server.url)
        for _ in range(scale.latency_jobs):
            upload, whole = await _time_job(connection, server.url)
            answered.append(upload)
            delivered.append(whole)
            floor.append(floors.run_bare_job(stage.directory / "bare"))
    return [
        Figure(
            "latency",
            "upload to ZIP in hand",
            Unit.MILLISECONDS,
            milliseconds(delivered),
            Floor("directory, files and bash run.sh in a bare loop", milliseconds(floor)),
            ratio_at_most(5),
        ),
        Figure("latency", "of it, upload to 201", Unit.MILLISECONDS, milliseconds(answered)),
        server_memory("latency", server.peak_memory()),
        process_memory("latency", "agent", agent.peak_memory()),
    ]


async def _time_job(connection: Connection, url: str) -> tuple[float, float]:
    """Run a job; returns the seconds until its 201 and until its ZIP."""
    request = client.upload(url, user=1)
    started = time.perf_counter()
    job_id = await client.submit(connection, request)
    answered = time.perf_counter()
    await client.wait_for_result(connection, url, job_id)
    return answered - started, time.perf_counter() - started


async def throughput(stage: Stage, scale: Scale) -> list[Figure]:
    """Run many jobs of several users: jobs a second, from first upload to last stored result."""
    server = await stage.server()
    agent = await stage.agent(server, scale.throughput_slots)
    directories = floors.prepare_jobs(stage.directory / "floor", scale.throughput_jobs)
    load = Load(server, scale.throughput_users, scale.throughput_connections)
    rates: list[float] = []
    floor: list[float] = []
    costs: dict[str, list[float]] = {"server": [], "agent": []}
    for _ in range(scale.repeats):
        before = cpu_seconds(server.pid), cpu_seconds(agent.pid)
        rates.append(await load.run(scale.throughput_jobs))
        costs["server"].append((cpu_seconds(server.pid) - before[0]) / scale.throughput_jobs)
        costs["agent"].append((cpu_seconds(agent.pid) - before[1]) / scale.throughput_jobs)
        floor.append(len(directories) / await floors.run_by_xargs(directories))
    return [
        Figure(
            "throughput",
            f"{scale.throughput_jobs} jobs, {scale.throughput_slots} slots",
            Unit.JOBS_PER_SECOND,
            tuple(rates),
            Floor("xargs -P2 over the same run.sh", tuple(floor)),
            ratio_at_least(0.25),
        ),
        *(
            Figure("throughput", f"{who} CPU for a job", Unit.MILLISECONDS, milliseconds(cost))
            for who, cost in costs.items()
        ),
        server_memory("throughput", server.peak_memory()),
        process_memory("throughput", "agent", agent.peak_memory()),
    ]


class Load:
    """Uploads of trivial jobs by several users over several connections."""

    def __init__(self, server: Server, users: int, connections: int) -> None:
        self._server = server
        self._requests = [client.upload(server.url, user) for user in range(1, users + 1)]
        self._connections = connections

    async def run(self, count: int) -> float:
        """Upload jobs and wait until all have completed; returns jobs a second."""
        requests = islice(cycle(self._requests), count)
        async with client.connections(self._server.url, self._connections) as connections:
            started = time.time()
            uploads = [_submit_all(connection, requests) for connection in connections]
            ids = [job_id for part in await asyncio.gather(*uploads) for job_id in part]
        ended = await database_file.completion_time(self._server.database, min(ids), max(ids))
        return count / (ended - started)


async def _submit_all(connection: Connection, requests: Iterator[bytes]) -> Sequence[int]:
    """Submit what is left of the requests, which several connections share."""
    return [await client.submit(connection, request) for request in requests]
