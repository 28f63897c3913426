"""Command line of the benchmarks: ``python -m bench [name ...]``."""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import report
from bench.backlog import queue
from bench.command_line import command
from bench.dashboards import dashboards
from bench.fleet import agents
from bench.idle import idle
from bench.isolation import isolation
from bench.measure import Figure
from bench.polling import poll
from bench.processes import Stage, stage
from bench.scale import SMOKE, WHOLE, Scale
from bench.slurm import slurm
from bench.small_jobs import latency, throughput
from bench.transfers import download, results, upload

Benchmark = Callable[[Stage, Scale], Awaitable[list[Figure]]]

BENCHMARKS: Mapping[str, Benchmark] = {
    "latency": latency,
    "throughput": throughput,
    "isolation": isolation,
    "upload": upload,
    "download": download,
    "results": results,
    "queue": queue,
    "agents": agents,
    "idle": idle,
    "poll": poll,
    "dashboards": dashboards,
    "command": command,
    "slurm": slurm,
}
"""By name, in the order in which they run."""


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the real server and real agents, each figure beside its floor.",
        epilog=f"Benchmarks: {', '.join(BENCHMARKS)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which ones (default: all)")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: shows that all works, measures nothing"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench.json"), metavar="FILE", help="default: bench.json"
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=report.default_directory(),
        metavar="DIR",
        help="where databases and files go: on the disk to be measured (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    return options


async def _run(names: Sequence[str], scale: Scale, directory: Path) -> report.Run:
    """Run the benchmarks one after the other; one that fails does not stop the others."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    started_at, load_before = datetime.now(UTC), os.getloadavg()[0]
    started = time.monotonic()
    figures: list[Figure] = []
    failures: dict[str, str] = {}
    for name in names:
        sys.stderr.write(f"{time.monotonic() - started:6.1f} s  {name}\n")
        try:
            async with stage(directory / name) as place:
                figures += await BENCHMARKS[name](place, scale)
        except Exception as error:  # noqa: BLE001 - it is shown, and the others go on
            failures[name] = str(error) or type(error).__name__
            sys.stderr.write(f"{name} FAILED: {traceback.format_exc()}\n")
    return report.Run(
        scale=scale.name,
        directory=directory,
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=time.monotonic() - started,
        load_before=load_before,
        load_after=os.getloadavg()[0],
        figures=tuple(figures),
        failures=failures,
    )


def main() -> int:
    """Run what the command line says; returns the exit status, 1 if a benchmark failed."""
    options = _parse_arguments(sys.argv[1:])
    names = options.names or list(BENCHMARKS)
    if warning := report.warning(options.dir):
        sys.stderr.write(f"warning: {warning}\n")
    directory = Path(tempfile.mkdtemp(prefix="orchestrator-bench-", dir=options.dir)).resolve()
    try:
        run = asyncio.run(_run(names, SMOKE if options.smoke else WHOLE, directory))
        options.json.write_text(report.document(run), encoding="utf-8")
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sys.stdout.write(f"{report.table(run.figures)}\n")
    # the benchmarks keep the cores busy themselves, so only the load before is somebody else's
    sys.stdout.write(
        f"{run.seconds:.0f} s; {options.json} has all samples;"
        f" load average {run.load_before:.1f} before, {run.load_after:.1f} after"
        f" on {os.cpu_count()} cores\n"
    )
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
