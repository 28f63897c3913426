"""Many people who look on while much happens: ``dashboards``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from bench import client
from bench.measure import BenchmarkError, Figure, Floor, Unit, below, server_memory
from bench.processes import Server, Stage, cpu_seconds
from bench.scale import Scale
from bench.simulated_agent import write_minimal_archive

_HALF_A_CORE_PERCENT = 50
_TRANSITIONS_OF_A_JOB = 5
_AGENTS = 4
_READ_BYTES = 65536

_POLLS = (
    # what an open overview asks for again and again, and how often (dashboard/pages/overview.js)
    ("/jobs?limit=10", 2.0),
    ("/jobs/counts?status=Queued,Processing,Submitted,Running", 5.0),
    ("/services", 5.0),
    ("/agents", 5.0),
    ("/stats?period=1h", 30.0),
)


async def dashboards(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure what open dashboards cost the server while jobs change their states.

    Each is a connection that gets all events, and one that asks as the overview does. The floor
    is the same server with the same jobs and nobody who looks.
    """
    archive = stage.directory / "result.zip"
    write_minimal_archive(archive)
    server = await stage.server()
    fleet = await stage.module("bench.simulated_agents", server.url, str(_AGENTS), str(archive))
    await fleet.read_record()
    alone, watched, told = [], [], []
    async with _working(server, scale.dashboard_transitions):
        for _ in range(scale.repeats):
            alone.append(await _cost(server, scale.dashboard_seconds))
            async with _open_dashboards(server, scale.dashboards) as events:
                before = events[0]
                watched.append(await _cost(server, scale.dashboard_seconds))
                told.append((events[0] - before) / scale.dashboard_seconds)
    costs = tuple(max(0.0, more - less) for more, less in zip(watched, alone, strict=True))
    what = f"{scale.dashboards} dashboards, {scale.dashboard_transitions} transitions/s"
    return [
        Figure(
            "dashboards",
            f"{what}, server",
            Unit.PERCENT_OF_A_CORE,
            tuple(watched),
            Floor("the same jobs, and nobody looks", tuple(alone)),
        ),
        Figure(
            "dashboards",
            "of it, for the dashboards",
            Unit.PERCENT_OF_A_CORE,
            costs,
            target=below(_HALF_A_CORE_PERCENT),
            note=f"{sum(told) / len(told):.0f} events a second were told",
        ),
        server_memory("dashboards", server.peak_memory()),
    ]


async def _cost(server: Server, seconds: float) -> float:
    """Return the server's processor time over a while, in percent of a core."""
    before = cpu_seconds(server.pid)
    await asyncio.sleep(seconds)
    return 100 * (cpu_seconds(server.pid) - before) / seconds


@contextlib.asynccontextmanager
async def _working(server: Server, transitions: int) -> AsyncIterator[None]:
    """Submit jobs at an even pace, so that so many transitions a second come of them."""

    async def submit_for_ever() -> None:
        clock = asyncio.get_running_loop().time
        async with client.connected(server.url) as connection:
            request = client.upload(server.url, 1)
            due = clock()
            while True:
                await client.submit(connection, request)
                due += _TRANSITIONS_OF_A_JOB / transitions
                await asyncio.sleep(max(0.0, due - clock()))

    async with _running([submit_for_ever()]):
        yield


@contextlib.asynccontextmanager
async def _open_dashboards(server: Server, count: int) -> AsyncIterator[list[int]]:
    """Keep dashboards open; gives a list of one number, of the events they were told so far."""
    events = [0]

    async def listen() -> None:
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(client.get(server.url, "/events"))
            while data := await reader.read(_READ_BYTES):
                events[0] += data.count(b"\ndata: ")
            raise BenchmarkError("the server ended a stream of events")
        finally:
            writer.close()

    async def ask(path: str, pause: float, number: int) -> None:
        request = client.get(server.url, path)
        # people do not open their pages all at once
        await asyncio.sleep(pause * number / count)
        async with client.connected(server.url) as connection:
            while True:
                answer = await connection.request(request)
                if answer.status != 200:
                    raise BenchmarkError(f"GET {path} was answered {answer.status}")
                await asyncio.sleep(pause)

    parts = [listen() for _ in range(count)]
    parts += [ask(path, pause, number) for number in range(count) for path, pause in _POLLS]
    async with _running(parts):
        yield events


@contextlib.asynccontextmanager
async def _running(parts: list[Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
