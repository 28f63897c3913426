"""Many agents at one server: ``agents``."""

from __future__ import annotations

import asyncio
import time

from bench.measure import (
    Figure,
    Unit,
    below,
    milliseconds,
    process_memory,
    server_memory,
)
from bench.processes import Child, Server, Stage, cpu_seconds
from bench.scale import Scale
from bench.simulated_agent import write_minimal_archive
from bench.small_jobs import Load

_IDLE_PERCENT = 5
_SHORTEST_SECONDS = 0.001


async def agents(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure a fleet of simulated agents: idle, with jobs, and after a crash of the server."""
    archive = stage.directory / "result.zip"
    write_minimal_archive(archive)
    server = await stage.server()
    fleet = await stage.module(
        "bench.simulated_agents", server.url, str(scale.agents), str(archive)
    )
    await fleet.read_record()
    idle_costs = await _idle_costs(server, scale)
    load = Load(server, scale.throughput_users, scale.throughput_connections)
    rates: list[float] = []
    costs: list[float] = []
    for _ in range(scale.repeats):
        before = cpu_seconds(server.pid)
        rates.append(await load.run(scale.agents_jobs))
        costs.append((cpu_seconds(server.pid) - before) / scale.agents_jobs)
    returns = [await _time_return(server, fleet) for _ in range(scale.repeats)]
    return [
        Figure(
            "agents",
            f"{scale.agents} idle agents, server",
            Unit.PERCENT_OF_A_CORE,
            idle_costs,
            target=below(_IDLE_PERCENT),
            note=f"{scale.agents_idle_seconds:g} s in {len(idle_costs)} parts; heartbeats spread",
        ),
        Figure("agents", f"{scale.agents_jobs} jobs", Unit.JOBS_PER_SECOND, tuple(rates)),
        Figure("agents", "server CPU for a job", Unit.MILLISECONDS, milliseconds(costs)),
        Figure(
            "agents",
            "all back after kill -9",
            Unit.SECONDS,
            tuple(returns),
            note="from the restarted server's word that it is ready to its welcome of the last",
        ),
        server_memory("agents", server.peak_memory()),
        process_memory("agents", "simulated agents'", fleet.peak_memory()),
    ]


async def _idle_costs(server: Server, scale: Scale) -> tuple[float, ...]:
    seconds = scale.agents_idle_seconds / scale.repeats
    costs = []
    for _ in range(scale.repeats):
        before = cpu_seconds(server.pid)
        await asyncio.sleep(seconds)
        costs.append(100 * (cpu_seconds(server.pid) - before) / seconds)
    return tuple(costs)


async def _time_return(server: Server, fleet: Child) -> float:
    """Crash the server and start it again; returns seconds from ready to the last welcome."""
    await server.kill()
    started_at = time.monotonic()
    await server.start()
    ready_at = time.monotonic()
    connected_at = 0.0
    while connected_at < started_at:  # an agent that lost its connection before makes a line, too
        connected_at = float((await fleet.read_record())["connected_at"])
    # the last may be welcomed before the line that says "ready" is read here
    return max(connected_at - ready_at, _SHORTEST_SECONDS)
