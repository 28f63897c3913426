"""Floors: what the machine does without the system under test, for the same work."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.client import TRIVIAL_SCRIPT
from bench.measure import BenchmarkError


def run_bare_job(directory: Path) -> float:
    """Do what an agent must for a trivial job, and no more; returns the seconds. Blocks.

    The directory is made, the script written, ``bash run.sh`` spawned with its output in files
    and waited for.
    """
    started = time.perf_counter()
    directory.mkdir()
    (directory / "run.sh").write_bytes(TRIVIAL_SCRIPT)
    with open(directory / "stdout.log", "wb") as out, open(directory / "stderr.log", "wb") as err:
        subprocess.run(
            ["bash", "run.sh"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            check=True,
        )
    elapsed = time.perf_counter() - started
    shutil.rmtree(directory)
    return elapsed


def prepare_jobs(directory: Path, count: int) -> Sequence[Path]:
    """Make the directories of trivial jobs. Blocks."""
    directory.mkdir()
    made = [directory / str(number) for number in range(count)]
    for path in made:
        path.mkdir()
        (path / "run.sh").write_bytes(TRIVIAL_SCRIPT)
    return made


async def run_by_xargs(directories: Sequence[Path]) -> float:
    """Run prepared jobs with ``xargs -P2``; returns the seconds."""
    names = "".join(f"{path}\0" for path in directories).encode()
    # "env -C" changes the directory and becomes bash: one process a job
    command = ("xargs", "-0", "-P2", "-I{}", "env", "-C", "{}", "bash", "run.sh")
    return await _time_command(*command, stdin=names)


async def copy_by_dd(source: Path, target: Path) -> float:
    """Copy a file with ``dd conv=fsync``, then remove the copy; returns dd's seconds."""
    elapsed = await _time_command(
        *("dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync", "status=none")
    )
    target.unlink()
    return elapsed


async def _time_command(*command: str, stdin: bytes = b"") -> float:
    started = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, errors = await process.communicate(stdin)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode != 0:
        raise BenchmarkError(f"{command[0]} failed: {errors!r:.300}")
    return time.perf_counter() - started
