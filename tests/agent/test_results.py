"""What an ended job left becomes its result: a small one in memory, the rest on the disk."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import pytest

from agent.attempt_directory import AttemptDirectory
from agent.outcomes import Exit, ExitKind
from agent.results import Result
from jobs import FileSpec, JobState
from wire.messages import Assign, Finished, OutputLimits

pytestmark = pytest.mark.quick

_KIB = 1024
_LEFT: dict[str, dict[str, int]] = {
    "as many files and bytes as are small": {f"job/{n}": 1310 for n in range(50)},
    "one file more": {f"job/{n}": 1 for n in range(51)},
    "one byte more": {"job/large": 64 * _KIB + 1},
    "a large log and no file at all": {"stdout.log": 64 * _KIB + 1},
    "a log that leaves no room for the file": {"stderr.log": 40 * _KIB, "job/file": 40 * _KIB},
}


async def ended_job(path: Path, left: dict[str, int], most_files: int) -> AttemptDirectory:
    """Return a job that has ended and left files of these sizes."""
    limits = OutputLimits(result_bytes=10**9, result_files=most_files, log_bytes=10**9)
    files = (FileSpec("run.sh", 0, ""),)
    job = AttemptDirectory(path / "1", Assign(1, 1, 1, 1, "example", None, 1.0, limits, files))
    await job.create()
    for name, size in left.items():
        (job.path / name).write_bytes(os.urandom(size))
    return job


async def result_of(job: AttemptDirectory) -> tuple[Finished, zipfile.ZipFile]:
    result = Result(job)
    report = await result.make(Exit(ExitKind.EXITED))
    content = await result.read(0)
    assert report.result_size == len(content)
    return report, zipfile.ZipFile(io.BytesIO(content))


@pytest.mark.parametrize("left", _LEFT.values(), ids=_LEFT)
async def test_small_results_are_made_in_memory_and_no_others(
    tmp_path: Path, left: dict[str, int]
) -> None:
    job = await ended_job(tmp_path, left, most_files=1000)
    report, archive = await result_of(job)
    is_small = left is _LEFT["as many files and bytes as are small"]
    assert (job.path / "result.zip").exists() is not is_small
    assert report.state is JobState.COMPLETED
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    assert sizes == {name.removeprefix("job/"): size for name, size in left.items()}
    job.remove()
    assert not job.path.exists()


async def test_of_a_small_result_over_the_limit_only_the_logs_are_kept(
    tmp_path: Path,
) -> None:
    left = {"job/1": 1, "job/2": 1, "job/3": 1, "stdout.log": 5}
    report, archive = await result_of(await ended_job(tmp_path, left, most_files=2))
    assert report.state is JobState.FAILED
    assert "more than 2 files" in report.message
    assert archive.namelist() == ["stdout.log"]
