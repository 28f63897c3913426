"""The benchmarks run and say something sane; no time is asserted here."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS
from bench.measure import BenchmarkError
from bench.processes import stage
from tests.harness import PROJECT, eventually

_FIGURE_FIELDS = {
    *("benchmark", "what", "unit", "median", "p95", "min", "max", "samples", "floor"),
    *("ratio", "target", "met", "note"),
}
# two clusters of Slurm on one machine starve each other: its smoke run is one of its own
_ALONE = "slurm"
_TOGETHER = [name for name in BENCHMARKS if name != _ALONE]
_MAY_BE_ZERO = {"CPU s/min", "% of a core"}
_RUN_FIELDS = {
    *("scale", "started_at", "seconds", "commit", "machine", "versions", "figures", "failures"),
}


async def _start(place: Path, *names: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench", "--smoke", *names),
        *("--json", str(place / "bench.json"), "--dir", str(place)),
        cwd=PROJECT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one smoke run of all benchmarks wrote."""
    place = tmp_path_factory.mktemp("bench")

    async def run() -> tuple[int | None, bytes, bytes]:
        process = await _start(place, *_TOGETHER)
        output, errors = await process.communicate()
        return process.returncode, output, errors

    code, output, errors = asyncio.run(run())
    assert code == 0, errors.decode()
    assert [path.name for path in place.iterdir()] == ["bench.json"], "it left files behind"
    document = json.loads((place / "bench.json").read_text())
    assert isinstance(document, dict)
    document["output"] = output.decode()
    return document


@pytest.mark.parametrize("name", _TOGETHER)
def test_a_benchmark_runs_and_gives_sane_figures(smoke_run: dict[str, Any], name: str) -> None:
    figures = [figure for figure in smoke_run["figures"] if figure["benchmark"] == name]
    assert figures
    for figure in figures:
        assert set(figure) == _FIGURE_FIELDS
        # a process that has nothing to do may really use no processor time at all
        assert figure["min"] > 0 or figure["unit"] in _MAY_BE_ZERO, figure
        assert 0 <= figure["min"] <= figure["median"] <= figure["max"], figure
        assert figure["min"] <= figure["p95"] <= figure["max"]
        assert (figure["met"] is None) == (figure["target"] is None)
        if figure["floor"] is not None:
            assert figure["floor"]["what"] and min(figure["floor"]["samples"]) > 0
            assert figure["ratio"] > 0
        assert figure["what"] in smoke_run["output"]
    assert any("server memory" in figure["what"] for figure in figures)


def test_a_run_says_what_was_measured_on_what(smoke_run: dict[str, Any]) -> None:
    assert set(smoke_run) - {"output"} == _RUN_FIELDS
    assert smoke_run["failures"] == {}
    assert smoke_run["machine"]["cores"] == os.cpu_count()
    assert smoke_run["versions"]["aiohttp"]


async def test_an_interrupted_run_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    process = await _start(tmp_path, "idle")
    databases: list[Path] = []

    def has_a_server() -> bool:
        databases.extend(tmp_path.glob("*/idle/*.db"))
        return bool(databases)

    await eventually(has_a_server, "a server has its database")
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []
    assert not _processes_naming(databases[0].parent)


async def test_an_agent_that_ends_at_its_start_fails_the_benchmark_with_its_log(
    tmp_path: Path,
) -> None:
    async with stage(tmp_path / "stage") as made:
        with pytest.raises(BenchmarkError) as failure:
            await made.agent(await made.server(), slots=1, options=("--cpus", "none"))
    said = str(failure.value)
    assert said.startswith("agent ended with exit code 2 before it was connected")
    assert "--cpus must be" in said


def _processes_naming(directory: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue  # it has ended
        if os.fsencode(directory) in command:
            found.append(command.decode())
    return found


@pytest.mark.soak
async def test_the_benchmark_of_slurm_runs(tmp_path: Path) -> None:
    process = await _start(tmp_path, _ALONE)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
