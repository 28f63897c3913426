"""What is measured: samples with a unit, beside a floor, against a target."""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

MEBIBYTE = 1024 * 1024


class BenchmarkError(Exception):
    """The system under test did not do what the benchmark needs; the message says what."""


class Unit(enum.Enum):
    """The unit of a figure, and whether more of it is better."""

    MILLISECONDS = ("ms", False)
    MICROSECONDS = ("us", False)
    SECONDS = ("s", False)
    JOBS_PER_SECOND = ("jobs/s", True)
    REQUESTS_PER_SECOND = ("requests/s", True)
    MEGABYTES_PER_SECOND = ("MB/s", True)
    MEBIBYTES = ("MiB", False)
    PERCENT_OF_A_CORE = ("% of a core", False)
    CPU_SECONDS_PER_MINUTE = ("CPU s/min", False)

    def __init__(self, label: str, is_more_better: bool) -> None:
        self.label = label
        self.is_more_better = is_more_better


class Bound(enum.Enum):
    """What a target limits, and from which side."""

    RATIO_AT_MOST = "ratio <= {:g}"
    RATIO_AT_LEAST = "ratio >= {:g}"
    MEDIAN_BELOW = "< {:g}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure should reach: a limit to its ratio to the floor, or to its median."""

    bound: Bound
    limit: float

    def __str__(self) -> str:
        return self.bound.value.format(self.limit)


@dataclass(frozen=True, slots=True)
class Floor:
    """What the machine does without us: how it was measured, and the samples in our unit."""

    what: str
    samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: samples of one quantity, perhaps with a floor and a target."""

    benchmark: str
    what: str
    unit: Unit
    samples: tuple[float, ...]
    floor: Floor | None = None
    target: Target | None = None
    note: str = ""

    def __post_init__(self) -> None:
        """Refuse a figure of nothing, so that it fails its benchmark and not the whole report."""
        if not self.samples or (self.floor is not None and not self.floor.samples):
            raise BenchmarkError(f"{self.benchmark}, {self.what}: nothing was measured")

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """The sample that 95 % are at least as good as (nearest rank); for rates a low one."""
        ranked = sorted(self.samples, reverse=self.unit.is_more_better)
        return ranked[math.ceil(0.95 * len(ranked)) - 1]

    @property
    def floor_median(self) -> float | None:
        """The middle sample of the floor, None without one."""
        return None if self.floor is None else statistics.median(self.floor.samples)

    @property
    def ratio(self) -> float | None:
        """Median over the floor's median, None without a floor."""
        floor = self.floor_median
        return None if floor is None else self.median / floor

    @property
    def is_met(self) -> bool | None:
        """Whether the target is reached, None without one."""
        if self.target is None:
            return None
        limit = self.target.limit
        match self.target.bound:
            case Bound.RATIO_AT_MOST:
                return self.ratio is not None and self.ratio <= limit
            case Bound.RATIO_AT_LEAST:
                return self.ratio is not None and self.ratio >= limit
            case Bound.MEDIAN_BELOW:
                return self.median < limit


def ratio_at_most(limit: float) -> Target:
    """Return the target for times: at most so many times the floor."""
    return Target(Bound.RATIO_AT_MOST, limit)


def ratio_at_least(limit: float) -> Target:
    """Return the target for rates: at least this part of the floor."""
    return Target(Bound.RATIO_AT_LEAST, limit)


def below(limit: float) -> Target:
    """Return the target for figures without a floor."""
    return Target(Bound.MEDIAN_BELOW, limit)


def milliseconds(seconds: Sequence[float]) -> tuple[float, ...]:
    """Convert samples from seconds."""
    return tuple(1000 * sample for sample in seconds)


def megabytes_per_second(size: int, seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the rates (10^6 bytes a second) of transfers of ``size`` bytes."""
    return tuple(size / 1e6 / sample for sample in seconds)


def server_memory(benchmark: str, peak_bytes: int, limit: float = 150, where: str = "") -> Figure:
    """Return the figure of a server's peak resident memory; ``limit`` in MiB."""
    return Figure(
        benchmark,
        f"server memory, peak{where}",
        Unit.MEBIBYTES,
        (peak_bytes / MEBIBYTE,),
        target=below(limit),
    )


def process_memory(benchmark: str, process: str, peak_bytes: int) -> Figure:
    """Return the figure of another process's peak resident memory, which has no target."""
    return Figure(benchmark, f"{process} memory, peak", Unit.MEBIBYTES, (peak_bytes / MEBIBYTE,))
