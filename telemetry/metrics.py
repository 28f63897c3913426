"""Numbers for Prometheus: counters and histograms, and the text format in which they are told.

The format is version 0.0.4 of https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import enum
import os
import resource
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Kind(enum.StrEnum):
    """What a family's samples are."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Sample:
    """One number; ``suffix`` is what follows the family's name, ``labels`` are in order."""

    value: float
    labels: tuple[tuple[str, str], ...] = ()
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name, and what they mean."""

    name: str
    kind: Kind
    meaning: str
    samples: tuple[Sample, ...]


def gauge(name: str, meaning: str, value: float) -> Family:
    """Return a family of one number that goes up and down."""
    return Family(name, Kind.GAUGE, meaning, (Sample(value),))


def labelled_gauge(
    name: str, meaning: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], int]
) -> Family:
    """Return a family of numbers that go up and down, by the values of their labels."""
    samples = tuple(Sample(value, _pairs(labels, key)) for key, value in values.items())
    return Family(name, Kind.GAUGE, meaning, samples)


class Counter:
    """Numbers that only grow, one for each combination of the values of its labels."""

    def __init__(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> None:
        self._name = name
        self._meaning = meaning
        self._labels = labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, amount: float, *values: str) -> None:
        """Add to the number of these label values, in the order of the labels."""
        self._values[values] = self._values.get(values, 0) + amount

    def family(self) -> Family:
        """Return what there is to tell."""
        samples = tuple(
            Sample(value, _pairs(self._labels, key)) for key, value in self._values.items()
        )
        return Family(self._name, Kind.COUNTER, self._meaning, samples)


class Histogram:
    """How often values fell into each bucket, for each combination of the values of its labels."""

    def __init__(
        self, name: str, meaning: str, bounds: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> None:
        """``bounds`` are the upper bounds of the buckets, growing; a last one has none."""
        self._name = name
        self._meaning = meaning
        self._bounds = bounds
        self._labels = labels
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}
        if not labels:
            self._begin(())

    def observe(self, value: float, *values: str) -> None:
        """Count one value under these label values, in the order of the labels."""
        if values not in self._counts:
            self._begin(values)
        self._counts[values][bisect_left(self._bounds, value)] += 1
        self._sums[values] += value

    def family(self) -> Family:
        """Return what there is to tell."""
        samples = tuple(sample for values in self._counts for sample in self._samples(values))
        return Family(self._name, Kind.HISTOGRAM, self._meaning, samples)

    def _begin(self, values: tuple[str, ...]) -> None:
        self._counts[values] = [0] * (len(self._bounds) + 1)
        self._sums[values] = 0.0

    def _samples(self, values: tuple[str, ...]) -> Iterator[Sample]:
        labels = _pairs(self._labels, values)
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts[values], strict=True):
            total += count
            yield Sample(total, (*labels, ("le", _number(bound))), "_bucket")
        yield Sample(self._sums[values], labels, "_sum")
        yield Sample(total, labels, "_count")


def exposition(families: Iterable[Family]) -> str:
    """Return the families in the text format."""
    return "".join(line for family in families for line in _lines(family))


def process_families() -> tuple[Family, ...]:
    """Return what is known of this process, under the names that Prometheus clients use."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = Sample(usage.ru_utime + usage.ru_stime)
    with open("/proc/self/statm", encoding="ascii") as file:
        resident_pages = int(file.read().split()[1])
    return (
        Family("process_cpu_seconds_total", Kind.COUNTER, "Processor time used.", (seconds,)),
        gauge(
            "process_resident_memory_bytes",
            "Resident memory.",
            resident_pages * resource.getpagesize(),
        ),
        gauge(
            "process_open_fds",
            "Open file descriptors.",
            len(os.listdir("/proc/self/fd")) - 1,  # less the one that lists them
        ),
        gauge(
            "process_max_fds",
            "Limit of open file descriptors.",
            resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        ),
    )


def _pairs(labels: tuple[str, ...], values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    return tuple(zip(labels, values, strict=True))


def _lines(family: Family) -> Iterator[str]:
    meaning = family.meaning.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP {family.name} {meaning}\n# TYPE {family.name} {family.kind}\n"
    for sample in family.samples:
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in sample.labels)
        braces = f"{{{labels}}}" if labels else ""
        yield f"{family.name}{sample.suffix}{braces} {_number(sample.value)}\n"


def _escaped(value: str) -> str:
    value = value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
    return value.encode("utf-8", "replace").decode()  # a lone surrogate can't be sent


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)
