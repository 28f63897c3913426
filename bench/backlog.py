"""A long line of waiting jobs: ``queue``."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench import client, database_file
from bench.client import Connection
from bench.measure import (
    BenchmarkError,
    Figure,
    Floor,
    Target,
    Unit,
    ratio_at_most,
    server_memory,
)
from bench.processes import Server, Stage
from bench.scale import Scale
from bench.simulated_agent import Archive, SimulatedAgent, write_minimal_archive

_STATUS_REQUESTS = 5
_UPLOADS = 3
_TURNOVERS = 3
_ASSIGN_SECONDS = 30.0


@dataclass(slots=True)
class _Samples:
    """What one server was measured to do, in seconds."""

    status: list[float] = field(default_factory=list)
    upload: list[float] = field(default_factory=list)
    turnover: list[float] = field(default_factory=list)
    status_path: str = ""


async def queue(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure whether the length of the line shows: in decisions, uploads, status and start-up."""
    decisions = {jobs: await _time_decisions(stage, jobs, scale) for jobs in scale.backlogs}
    databases = {jobs: stage.directory / f"{jobs}.db" for jobs in (0, *scale.backlogs)}
    await _make_databases(stage, databases, scale.backlog_users)
    empty, full = databases[0], databases[max(scale.backlogs)]
    starts = await _time_starts(stage, (empty, full), scale.repeats)
    servers = {jobs: stage.new_server(f"server{jobs}", databases[jobs]) for jobs in scale.backlogs}
    samples = await _measure_servers(stage, servers, scale.backlog_rounds)
    return [
        *_compared("policy's decision", Unit.MICROSECONDS, decisions, ratio_at_most(1.5)),
        *_compared(
            "freed slot to next Assign",
            Unit.MILLISECONDS,
            {jobs: taken.turnover for jobs, taken in samples.items()},
            ratio_at_most(1.5),
        ),
        *_compared(
            "status of a job",
            Unit.MILLISECONDS,
            {jobs: taken.status for jobs, taken in samples.items()},
            ratio_at_most(1.5),
            f"by GET {samples[max(samples)].status_path}{{id}}",
        ),
        *_compared(
            "upload to 201",
            Unit.MILLISECONDS,
            {jobs: taken.upload for jobs, taken in samples.items()},
            None,
        ),
        Figure(
            "queue",
            f"start, {_count(max(scale.backlogs))} queued",
            Unit.SECONDS,
            tuple(starts[full]),
            Floor("start on a database without jobs", tuple(starts[empty])),
            ratio_at_most(5),
        ),
        *(
            server_memory("queue", server.peak_memory(), where=f", {_count(jobs)} queued")
            for jobs, server in servers.items()
        ),
    ]


def _count(jobs: int) -> str:
    return f"{jobs:,}"


def _compared(
    what: str,
    unit: Unit,
    seconds: Mapping[int, Sequence[float]],
    target: Target | None,
    note: str = "",
) -> list[Figure]:
    """Return a figure for each length of the line; the shortest is the floor of the others."""
    factor = {Unit.MILLISECONDS: 1e3, Unit.MICROSECONDS: 1e6}[unit]
    samples = {jobs: tuple(factor * sample for sample in taken) for jobs, taken in seconds.items()}
    shortest, longest = min(samples), max(samples)
    floor = Floor(f"the same with {_count(shortest)} queued", samples[shortest])
    return [
        Figure(
            "queue",
            f"{what}, {_count(jobs)} queued",
            unit,
            samples[jobs],
            None if jobs == shortest else floor,
            target if jobs == longest else None,
            note if jobs == longest else "",
        )
        for jobs in samples
    ]


# --- the policy alone -------------------------------------------------------------


async def _time_decisions(stage: Stage, jobs: int, scale: Scale) -> list[float]:
    arguments = (str(jobs), str(scale.backlog_users), str(scale.decisions))
    process = await stage.module("bench.decisions", *arguments)
    record = await process.read_record()
    return [float(seconds) for seconds in record["seconds"]]


# --- databases and start-up -------------------------------------------------------


async def _make_databases(stage: Stage, databases: Mapping[int, Path], users: int) -> None:
    """Fill databases with so many queued jobs; the first job of each went through the API."""
    server = stage.new_server("filling")
    await server.start()
    await server.stop()  # which leaves all in the one file
    empty = server.database.read_bytes()
    await server.start()
    async with client.connected(server.url) as connection:
        await client.submit(connection, client.upload(server.url, 1))
    await server.stop()
    for jobs, path in databases.items():
        if jobs:
            shutil.copyfile(server.database, path)
            await asyncio.to_thread(database_file.multiply_job, path, jobs, users)
        else:
            path.write_bytes(empty)


async def _time_starts(
    stage: Stage, databases: Sequence[Path], repeats: int
) -> dict[Path, list[float]]:
    """Time servers from the start of their process to their word that they are ready."""
    seconds: dict[Path, list[float]] = {path: [] for path in databases}
    for _ in range(repeats):
        for path in databases:
            server = stage.new_server("starting", path)
            started = time.perf_counter()
            await server.start()
            seconds[path].append(time.perf_counter() - started)
            await server.stop()
    return seconds


# --- running servers --------------------------------------------------------------


async def _measure_servers(
    stage: Stage, servers: Mapping[int, Server], rounds: int
) -> dict[int, _Samples]:
    """Measure all servers in turn, so that what disturbs one disturbs all."""
    path = stage.directory / "result.zip"
    write_minimal_archive(path)
    samples = {jobs: _Samples() for jobs in servers}
    async with contextlib.AsyncExitStack() as open_lines:
        lines: dict[int, _Line] = {}
        for jobs, server in servers.items():
            await server.start()
            opening = _line(server, Archive(path), jobs)
            lines[jobs] = await open_lines.enter_async_context(opening)
        for line in lines.values():
            await line.measure(_Samples())  # the first round warms caches
        for _ in range(rounds):
            for jobs, line in lines.items():
                await line.measure(samples[jobs])
    return samples


class _Line:
    """A server with a long line of jobs, a client and an agent of one slot, which is taken."""

    def __init__(
        self, url: str, jobs: int, connection: Connection, agent: SimulatedAgent, held: int
    ) -> None:
        self._connection = connection
        self._jobs = jobs
        self._url = url
        self._agent = agent
        self._held = held
        # a user who has no job in line, so that no limit for each user is near
        self._upload = client.upload(url, user=1_000_000)
        self._status_path = "/jobs/"

    async def choose_status_path(self) -> None:
        """Ask for ``/jobs/{id}``, or on a server without it for ``/download/{id}``."""
        answer = await self._connection.request(client.get(self._url, "/jobs/1"))
        if answer.status != 200:
            self._status_path = "/download/"

    async def measure(self, samples: _Samples) -> None:
        """Take a few samples of each kind."""
        samples.status_path = self._status_path
        for _ in range(_STATUS_REQUESTS):
            job_id = random.randint(1, self._jobs)
            request = client.get(self._url, f"{self._status_path}{job_id}")
            started = time.perf_counter()
            answer = await self._connection.request(request)
            samples.status.append(time.perf_counter() - started)
            if answer.status != 200:
                raise BenchmarkError(f"job {job_id}: {answer.status} {answer.body!r:.300}")
        for _ in range(_UPLOADS):
            started = time.perf_counter()
            await client.submit(self._connection, self._upload)
            samples.upload.append(time.perf_counter() - started)
        for _ in range(_TURNOVERS):
            _, stored_at = await self._agent.deliver(self._held)
            self._held, assigned_at = await asyncio.wait_for(
                self._agent.ready.get(), _ASSIGN_SECONDS
            )
            samples.turnover.append(assigned_at - stored_at)


@contextlib.asynccontextmanager
async def _line(server: Server, archive: Archive, jobs: int) -> AsyncIterator[_Line]:
    """Connect a client and an agent to a server with a long line."""
    agent = SimulatedAgent(server.url, "simulated", archive)
    async with aiohttp.ClientSession() as session, client.connected(server.url) as connection:
        serving = asyncio.create_task(agent.run(session))
        try:
            held, _ = await asyncio.wait_for(agent.ready.get(), _ASSIGN_SECONDS)
            line = _Line(server.url, jobs, connection, agent, held)
            await line.choose_status_path()
            yield line
        finally:
            serving.cancel()
            await asyncio.wait([serving])
