"""What this machine has for jobs, and which of it each job has.

Cores and memory are what the agent itself may use (affinity mask, control group), not what the
machine is sold with. GPUs are handed out by name, each to one job at a time; who has which
stands in the attempts' directories, so that a restart of the agent changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent import plain_files
from agent.outcomes import JobLost
from jobs import Resources

_FILE = "allotment.json"
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_NVIDIA_SMI_SECONDS = 20.0
_NO_LIMIT = 2**60  # bytes; control groups say "no limit" by a number near 2^63


@dataclass(frozen=True, slots=True)
class Machine:
    """What an agent has: number of cores, bytes of memory (0: not known), names of GPUs.

    ``affinity`` are the cores to which jobs are bound; none if they are not.
    """

    cpus: int
    memory: int
    gpus: tuple[str, ...]
    affinity: tuple[int, ...] = ()

    @property
    def total(self) -> Resources:
        """Return how much it is."""
        return Resources(self.cpus, self.memory, len(self.gpus))


# --- detection --------------------------------------------------------------------


def detected_cpus() -> int:
    """Return how many cores this process may use, by affinity and control groups."""
    allowed = float(len(os.sched_getaffinity(0)))
    for text in _control_files("cpu.max", "cpu"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            allowed = min(allowed, int(quota) / int(period))
    for quota, period in zip(
        _control_files("cpu.cfs_quota_us", "cpu"),
        _control_files("cpu.cfs_period_us", "cpu"),
        strict=False,
    ):
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            allowed = min(allowed, int(quota) / int(period))
    return max(1, int(allowed))


def detected_memory() -> int:
    """Return how many bytes of memory this process may use, 0 if that can't be found out."""
    total = 0
    with suppress(OSError):
        match = re.search(r"^MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        total = int(match[1]) * 1024 if match else 0
    for name in ("memory.max", "memory.limit_in_bytes"):
        for text in _control_files(name, "memory"):
            if text.isdigit() and int(text) < _NO_LIMIT:
                total = min(total or int(text), int(text))
    return total


def detected_gpus(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the GPUs: what the agent was given, or all NVIDIA devices.

    Indices are those of ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    """
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return tuple(name.strip() for name in given.split(",") if name.strip() not in ("", "-1"))
    with suppress(OSError):
        return tuple(str(index) for index in range(len(os.listdir(_NVIDIA))))
    with suppress(OSError, subprocess.SubprocessError):
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
        return tuple(re.findall(r"^GPU (\d+):", listing.stdout.decode("ascii", "replace"), re.M))
    return ()


def _control_files(name: str, controller: str) -> Iterator[str]:
    """Yield a file of the control groups of this process, from its own up to the root."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = _CONTROL_GROUPS / controllers if controllers else _CONTROL_GROUPS
            at = top / path.lstrip("/")
            for directory in (at, *at.parents):
                with suppress(OSError):
                    yield (directory / name).read_text(encoding="ascii").strip()
                if directory == top:
                    break


def parse_gpus(text: str) -> tuple[str, ...]:
    """Read ``none``, a number, or a list of indices. Raises :class:`ValueError`."""
    if text == "none":
        return ()
    if re.fullmatch(r"[0-9]{1,4}", text):
        return tuple(str(index) for index in range(int(text)))
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names or not all(re.fullmatch(r"[0-9]{1,4}", name) for name in names):
        raise ValueError('must be "none", a number, or indices such as 0,2,3')
    if len(set(names)) != len(names):
        raise ValueError("names a GPU more than once")
    return names


# --- allotment --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Allotted:
    """What one job has: GPUs by name, and cores by number, all of them if none is named."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()


class Allotments:
    """Which job has which GPUs and cores."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._held: dict[Path, Allotted] = {}
        self._given_back = asyncio.Event()

    def adopt(self, attempt: Path) -> None:
        """Note what the job of an attempt has, which an earlier process may have started."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            fields = json.loads(plain_files.read_text(attempt / _FILE))
            self._held[attempt] = Allotted(
                tuple(str(name) for name in fields["gpus"]),
                tuple(int(core) for core in fields["cores"]),
            )

    async def take(self, attempt: Path, needs: Resources) -> Allotted:
        """Return what the job of an attempt gets; the same again if it is asked for again.

        Waits for GPUs that a job which has just ended gives back. Raises :class:`JobLost` if
        there are not as many, and :class:`OSError`.
        """
        if (held := self._held.get(attempt)) is not None:
            return held
        if needs.gpus > len(self._machine.gpus):
            raise JobLost(f"it needs {needs.gpus} GPUs, of which this agent has fewer")
        while len(free := self._free_gpus()) < needs.gpus:
            self._given_back.clear()
            await self._given_back.wait()
        allotted = Allotted(free[: needs.gpus], self._least_used_cores(needs.cpus))
        if allotted.gpus:  # cores may be shared, so nothing is lost if they are forgotten
            fields = {"gpus": allotted.gpus, "cores": allotted.cores}
            with plain_files.open_new(attempt / _FILE) as file:
                file.write(json.dumps(fields).encode())
        self._held[attempt] = allotted
        return allotted

    def give_back(self, attempt: Path) -> None:
        """No process of the attempt's job is left."""
        if self._held.pop(attempt, None) is not None:
            self._given_back.set()

    def _free_gpus(self) -> tuple[str, ...]:
        taken = {name for held in self._held.values() for name in held.gpus}
        return tuple(name for name in self._machine.gpus if name not in taken)

    def _least_used_cores(self, count: int) -> tuple[int, ...]:
        cores = self._machine.affinity
        if count >= len(cores):
            return ()
        used = Counter(core for held in self._held.values() for core in held.cores)
        return tuple(sorted(sorted(cores, key=lambda core: used[core])[:count]))
