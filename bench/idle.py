"""Nothing to do: ``idle``."""

from __future__ import annotations

import asyncio

from bench.measure import (
    MEBIBYTE,
    Figure,
    Unit,
    below,
)
from bench.processes import Child, Server, Stage, cpu_seconds, resident_memory
from bench.scale import Scale

_SETTLE_SECONDS = 1.0
_IDLE_PERCENT = 0.5
_IDLE_SERVER_MEBIBYTES = 80


async def idle(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure what a server with one agent costs while nothing happens.

    Several pairs idle side by side, each on a database of its own: each is a repeat. Processor
    time is counted for each process. Other load still adds to it, by colder caches: four busy
    loops on two cores made it 1.3 to 1.8 times as much.
    """
    servers: list[Server] = []
    agents: list[Child] = []
    for number in range(scale.idle_servers):
        server = stage.new_server(f"server{number}")
        await server.start()
        servers.append(server)
        agents.append(await stage.agent(server, slots=2, name=f"agent{number}"))
    await asyncio.sleep(min(_SETTLE_SECONDS, scale.idle_seconds))
    processes: list[Child] = [*servers, *agents]
    before = [cpu_seconds(process.pid) for process in processes]
    await asyncio.sleep(scale.idle_seconds)
    costs = [
        (cpu_seconds(process.pid) - start) * 60 / scale.idle_seconds
        for process, start in zip(processes, before, strict=True)
    ]
    memory = [resident_memory(process.pid) / MEBIBYTE for process in processes]
    of_servers, of_agents = slice(None, len(servers)), slice(len(servers), None)
    note = f"over {scale.idle_seconds:g} s, scaled to a minute"
    target = below(_IDLE_PERCENT / 100 * 60)
    return [
        Figure(
            "idle",
            "server",
            Unit.CPU_SECONDS_PER_MINUTE,
            tuple(costs[of_servers]),
            target=target,
            note=note,
        ),
        Figure(
            "idle",
            "agent",
            Unit.CPU_SECONDS_PER_MINUTE,
            tuple(costs[of_agents]),
            target=target,
            note=note,
        ),
        Figure(
            "idle",
            "server memory",
            Unit.MEBIBYTES,
            tuple(memory[of_servers]),
            target=below(_IDLE_SERVER_MEBIBYTES),
        ),
        Figure("idle", "agent memory", Unit.MEBIBYTES, tuple(memory[of_agents])),
    ]
