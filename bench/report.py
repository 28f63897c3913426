"""The table for people and the JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.measure import Figure
from bench.processes import PROJECT

_PACKAGES = ("aiohttp", "aiohttp-swagger3", "aiosqlite", "uvloop")
_HEADINGS = (
    *("benchmark", "what", "unit", "median", "p95", "min .. max", "n"),
    *("floor", "ratio", "target", "met"),
)
_NUMERIC = frozenset({"median", "p95", "min .. max", "n", "floor", "ratio"})
_VERDICTS = {True: "yes", False: "NO", None: ""}
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class Run:
    """All that one run of the benchmarks found. ``failures``: benchmark to reason."""

    scale: str
    directory: Path
    started_at: str
    seconds: float
    load_before: float
    load_after: float
    figures: tuple[Figure, ...]
    failures: dict[str, str]


def table(figures: Sequence[Figure]) -> str:
    """Return the table, a line for each figure and the explanations of floors below."""
    lines = [_HEADINGS, *(_cells(figure) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    shown = [
        "  ".join(
            cell.rjust(width) if heading in _NUMERIC else cell.ljust(width)
            for cell, width, heading in zip(line, widths, _HEADINGS, strict=True)
        ).rstrip()
        for line in lines
    ]
    shown.insert(1, "-" * max(map(len, shown)))
    return "\n".join([*shown, "", *_explanations(figures)])


def _cells(figure: Figure) -> tuple[str, ...]:
    floor, ratio = figure.floor_median, figure.ratio
    return (
        figure.benchmark,
        figure.what,
        figure.unit.label,
        _number(figure.median),
        _number(figure.p95),
        f"{_number(min(figure.samples))} .. {_number(max(figure.samples))}",
        str(len(figure.samples)),
        "" if floor is None else _number(floor),
        "" if ratio is None else f"{ratio:.2f}",
        "" if figure.target is None else str(figure.target),
        _VERDICTS[figure.is_met],
    )


def _number(value: float) -> str:
    """Return three significant digits, without exponents."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def _explanations(figures: Sequence[Figure]) -> list[str]:
    floors = [
        f"floor of {figure.benchmark}, {figure.what}: {figure.floor.what}"
        for figure in figures
        if figure.floor is not None
    ]
    notes = [
        f"{figure.benchmark}, {figure.what}: {figure.note}" for figure in figures if figure.note
    ]
    return [
        "ratio = median / median of the floor; p95: 95 % of the samples are at least as good",
        *floors,
        *notes,
    ]


def document(run: Run) -> str:
    """Return the JSON text of a run."""
    value = {
        "scale": run.scale,
        "started_at": run.started_at,
        "seconds": round(run.seconds, 1),
        "commit": _commit(),
        "machine": _machine(run),
        "versions": _versions(),
        "figures": [_figure_value(figure) for figure in run.figures],
        "failures": run.failures,
    }
    return json.dumps(value, indent=2) + "\n"


def _figure_value(figure: Figure) -> dict[str, Any]:
    floor = figure.floor
    return {
        "benchmark": figure.benchmark,
        "what": figure.what,
        "unit": figure.unit.label,
        "median": figure.median,
        "p95": figure.p95,
        "min": min(figure.samples),
        "max": max(figure.samples),
        "samples": list(figure.samples),
        "floor": None
        if floor is None
        else {"what": floor.what, "median": figure.floor_median, "samples": list(floor.samples)},
        "ratio": figure.ratio,
        "target": None if figure.target is None else str(figure.target),
        "met": figure.is_met,
        "note": figure.note,
    }


def _commit() -> dict[str, Any]:
    """Say which commit was measured, and whether files differed from it."""
    if shutil.which("git") is None or not (PROJECT / ".git").exists():
        return {"id": None, "is_changed": None}
    command = ("git", "-C", str(PROJECT))
    commit = subprocess.run(
        [*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    status = subprocess.run(
        [*command, "status", "--porcelain"], capture_output=True, text=True, check=False
    )
    return {"id": commit.stdout.strip() or None, "is_changed": bool(status.stdout.strip())}


def _machine(run: Run) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "file_system": file_system(run.directory),
        "load_before": run.load_before,
        "load_after": run.load_after,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def file_system(directory: Path) -> str:
    """Name the type of the file system that a directory is on."""
    found = ("", "unknown")
    path = directory.resolve()
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, kind, *_ = line.split()
        if path.is_relative_to(mount) and len(mount) >= len(found[0]):
            found = (mount, kind)
    return found[1]


def warning(directory: Path) -> str | None:
    """Say what would make the figures meaningless, if anything would."""
    if file_system(directory) in _MEMORY_FILE_SYSTEMS:
        return f"{directory} is in memory, where syncing costs nothing: choose another --dir"
    return None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def default_directory() -> Path:
    """Return where benchmarks play unless told otherwise."""
    return Path(tempfile.gettempdir())
