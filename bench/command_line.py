"""How soon the command line answers: ``command``."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence

from bench.client import connected, submit, upload
from bench.measure import Figure, Floor, Unit, below, milliseconds, server_memory
from bench.processes import Stage
from bench.scale import Scale

_LISTED_JOBS = 50
_TARGET_MILLISECONDS = 150
# what pip writes for `orchestrator`, without the import hooks of an editable install
_ENTRY = "import sys; from orchestrator_client.main import main; sys.exit(main())"


async def command(stage: Stage, scale: Scale) -> list[Figure]:
    """Measure commands from the start of their process to its end, a bare Python beside each."""
    server = await stage.server()
    async with connected(server.url) as connection:
        for _ in range(_LISTED_JOBS):
            await submit(connection, upload(server.url, 1))
    options = ("--url", server.url, "--user", "1")
    commands = {
        "--help": ("--help",),
        f"ls of {_LISTED_JOBS} jobs, in a pipe": ("ls", *options),
        f"ls of {_LISTED_JOBS} jobs, as a table": ("ls", "-o", "table", *options),
    }
    figures = []
    for what, words in commands.items():
        ours, bare = [], []
        for _ in range(4 * scale.repeats):
            bare.append(await asyncio.to_thread(_run, ("-c", "pass")))
            ours.append(await asyncio.to_thread(_run, ("-c", _ENTRY, *words)))
        figures.append(
            Figure(
                "command",
                what,
                Unit.MILLISECONDS,
                milliseconds(ours),
                floor=Floor("a Python that does nothing", milliseconds(bare)),
                target=below(_TARGET_MILLISECONDS),
            )
        )
    return [*figures, server_memory("command", server.peak_memory())]


def _run(arguments: Sequence[str]) -> float:
    """Run Python in this checkout; returns the seconds until it has ended."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - started
