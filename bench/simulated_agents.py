"""Many simulated agents in one process: ``python -m bench.simulated_agents URL COUNT ARCHIVE``.

Prints a JSON line whenever the last of them is connected, ``{"connected_at": monotonic time}``,
and one for each result of more than a frame, ``{"delivery_seconds": from Finished to Stored}``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import aiohttp

from bench.simulated_agent import Archive, SimulatedAgent
from wire.frames import CHUNK_BYTES


class _Fleet:
    def __init__(self, count: int) -> None:
        self._count = count
        self._connected = 0

    def note_connection(self, change: int) -> None:
        self._connected += change
        if change > 0 and self._connected == self._count:
            _print(connected_at=time.monotonic())


def _print(**values: float) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def _deliver_for_ever(agent: SimulatedAgent, archive: Archive) -> None:
    while True:
        attempt_id, _ = await agent.ready.get()
        try:
            finished_at, stored_at = await agent.deliver(attempt_id)
        except ConnectionError:
            continue  # the server is away and will give the job out again
        if archive.size > CHUNK_BYTES:
            _print(delivery_seconds=stored_at - finished_at)


async def _serve(url: str, count: int, path: Path) -> None:
    archive, fleet = Archive(path), _Fleet(count)
    agents = [
        SimulatedAgent(url, f"simulated-{number}", archive, fleet.note_connection)
        for number in range(count)
    ]
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        asyncio.TaskGroup() as tasks,
    ):
        for agent in agents:
            tasks.create_task(agent.run(session))
            tasks.create_task(_deliver_for_ever(agent, archive))


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
