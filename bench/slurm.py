"""The two ways into a Slurm beside bare ``sbatch``: ``slurm``.

It brings up a Slurm of its own, of one node, so the figures are of this machine and of a Slurm
that schedules at once. What counts is the difference to ``sbatch``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import client
from bench.measure import (
    BenchmarkError,
    Figure,
    Floor,
    Unit,
    milliseconds,
    process_memory,
    server_memory,
)
from bench.processes import Child, Server, Stage
from bench.scale import Scale
from bench.small_jobs import Load
from tests.slurm_cluster import missing_program, running_slurm

_CPUS = 8
_SECONDS = 300.0
_POLL_SECONDS = 0.02
_MS, _RATE = Unit.MILLISECONDS, Unit.JOBS_PER_SECOND


async def slurm(stage: Stage, scale: Scale) -> list[Figure]:
    """Time jobs through the executor, through elastic agents, and bare, one after the other."""
    if program := missing_program():
        raise BenchmarkError(f"{program} is not installed (Debian: slurm-wlm, munge)")
    with running_slurm(stage.directory / "slurm", _CPUS) as cluster, _found(cluster.configuration):
        bare = tuple(
            [await _run_bare(stage.directory / "one", 1) for _ in range(scale.slurm_samples)]
        )
        bare_rate = scale.slurm_jobs / await _run_bare(stage.directory / "all", scale.slurm_jobs)
        server = await stage.server()
        agent = await stage.agent(server, scale.slurm_jobs, "login", ("--executor", "slurm"))
        executor = await _time_jobs(server, scale.slurm_samples)
        executor_rate = await Load(server, 2, 4).run(scale.slurm_jobs)
        memory = agent.peak_memory()
        await agent.stop()
        await _start_elastic(stage, server)
        first = await _time_jobs(server, 1)
        await Load(server, 2, 4).run(scale.slurm_jobs)  # brings all agents up
        warm = await _time_jobs(server, scale.slurm_samples)
        warm_rate = await Load(server, 2, 4).run(scale.slurm_jobs)
        peak = server.peak_memory()
    latency = Floor("sbatch to done", milliseconds(bare))
    rate = Floor("bare sbatch, until all are done", (bare_rate,))
    jobs = f"{scale.slurm_jobs} jobs on {_CPUS} CPUs"
    return [
        Figure("slurm", "executor, upload to ZIP", _MS, milliseconds(executor), latency),
        Figure("slurm", "first job, no agent yet", _MS, milliseconds(first), latency),
        Figure("slurm", "warm agents, upload to ZIP", _MS, milliseconds(warm), latency),
        Figure("slurm", f"executor, {jobs}", _RATE, (executor_rate,), rate),
        Figure("slurm", f"warm agents, {jobs}", _RATE, (warm_rate,), rate),
        server_memory("slurm", peak),
        process_memory("slurm", "agent on the submit host", memory),
    ]


@contextmanager
def _found(configuration: Path) -> Iterator[None]:
    """Have all processes that are started meanwhile find this Slurm."""
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configuration)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


async def _time_jobs(server: Server, count: int) -> tuple[float, ...]:
    """Run jobs one after the other; returns the seconds from upload to ZIP of each."""
    seconds: list[float] = []
    async with client.connected(server.url) as connection:
        for _ in range(count):
            started = time.perf_counter()
            job_id = await client.submit(connection, client.upload(server.url, user=1))
            await client.wait_for_result(connection, server.url, job_id)
            seconds.append(time.perf_counter() - started)
    return tuple(seconds)


async def _start_elastic(stage: Stage, server: Server) -> Child:
    return await stage.program(
        "elastic",
        *("slurm-agents", "--server", server.url, "--max", "4", "--slots", str(_CPUS // 4)),
        *("--idle", "600", "--time", "1:00:00", "--services", "example"),
        *("--state", str(stage.directory / "elastic")),
    )


async def _run_bare(directory: Path, count: int) -> float:
    """Submit jobs that leave a file, four at a time; returns the seconds until all are there."""
    directory.mkdir(exist_ok=True)
    for file in directory.iterdir():
        file.unlink()
    numbers = iter(range(count))
    started = time.perf_counter()
    await asyncio.gather(*(_submit_bare(directory, numbers) for _ in range(4)))
    while len(os.listdir(directory)) < count:
        if time.perf_counter() - started > _SECONDS:
            raise BenchmarkError("bare jobs of Slurm did not end")
        await asyncio.sleep(_POLL_SECONDS)
    return time.perf_counter() - started


async def _submit_bare(directory: Path, numbers: Iterator[int]) -> None:
    for number in numbers:
        words = ("sbatch", "--output=/dev/null", "--ntasks=1", f"--wrap=touch {directory}/{number}")
        process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.DEVNULL)
        if await process.wait() != 0:
            raise BenchmarkError("sbatch failed")
