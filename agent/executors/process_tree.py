"""The processes of one attempt on this machine, as its directory tells of them.

A supervisor makes the link ``process``, whose text is its pid, its start time (clock ticks) and
when it took the directory (seconds of CLOCK_MONOTONIC, which is one for the whole machine).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.job_environment import DIRECTORY_VARIABLE
from agent.outcomes import JobLost

_PAUSE_SECONDS = 0.01
_STOPPED = ("T", "t")  # proc(5): by a signal, by a tracer


@dataclass(frozen=True, slots=True)
class _Supervisor:
    pid: int
    start: int
    claimed_at: float | None


class ProcessTree:
    """A supervisor and what is below it."""

    def __init__(self, attempt: Path) -> None:
        self._attempt = attempt

    def is_claimed(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return os.path.lexists(f"{self._attempt}/process")

    def claimed_at(self) -> float | None:
        """Return when, by CLOCK_MONOTONIC; None if the supervisor's version did not say so."""
        return self._supervisor().claimed_at

    def terminate(self) -> None:
        """Ask the supervisor to end the job. Raises :class:`JobLost` if it is not known."""
        with self._descriptor() as descriptor:
            if descriptor is not None:
                signal.pidfd_send_signal(descriptor, signal.SIGTERM)
                # the job may have stopped it
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)

    def is_stopped(self) -> bool:
        """Whether the supervisor can't do its work, since somebody has stopped it."""
        supervisor = self._supervisor()
        status = _status(supervisor.pid)
        return status is not None and status.start == supervisor.start and status.state in _STOPPED

    async def supervisor_is_gone(self) -> None:
        """Wait for the end of the supervisor (pidfd_open(2)), which need not be our child."""
        with self._descriptor() as descriptor:
            if descriptor is not None:
                await _readable(descriptor)

    async def end_by_force(self) -> None:
        """Kill all of it, the supervisor last; returns when none is left.

        Its children are killed while it lives: their orphans come to it, and to nobody else.
        """
        with self._descriptor() as descriptor:
            if descriptor is not None:
                pid = self._supervisor().pid
                while below := await asyncio.to_thread(_living_below, pid):
                    _kill_all(below)
                    await asyncio.sleep(_PAUSE_SECONDS)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                await _readable(descriptor)
        await self.kill_leftovers()

    async def kill_leftovers(self) -> None:
        """Kill what a killed supervisor left behind, known by its environment."""
        mark = f"{DIRECTORY_VARIABLE}={self._attempt / 'job'}".encode()
        while pids := await asyncio.to_thread(_processes_with, mark):
            _kill_all(pids)
            await asyncio.sleep(_PAUSE_SECONDS)

    @contextmanager
    def _descriptor(self) -> Iterator[int | None]:
        """Open the supervisor, None if it has ended."""
        supervisor = self._supervisor()
        try:
            descriptor = os.pidfd_open(supervisor.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # asked once the descriptor is open: from then on the pid can't be taken over
            status = _status(supervisor.pid)
            is_it = status is not None and status.start == supervisor.start
            with suppress(ProcessLookupError):
                yield descriptor if is_it else None
        finally:
            os.close(descriptor)

    def _supervisor(self) -> _Supervisor:
        try:
            pid, start, *claimed_at = os.readlink(self._attempt / "process").split()
            return _Supervisor(int(pid), int(start), float(claimed_at[0]) if claimed_at else None)
        except (OSError, ValueError) as error:
            raise JobLost(f"the record of the job's process can't be read: {error!r}") from None


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


@dataclass(frozen=True, slots=True)
class _Status:
    state: str
    parent: int
    start: int


def _status(pid: int) -> _Status | None:
    """Return what proc(5) tells of a process in ``stat``, None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # the command name, in parentheses, may itself hold spaces and parentheses
    fields = text.rpartition(")")[2].split()
    return _Status(fields[0], int(fields[1]), int(fields[19]))


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _living_below(top: int) -> list[int]:
    """Return the processes below one, zombies left out."""
    known = {pid: status for pid in _pids() if (status := _status(pid)) is not None}
    below: set[int] = set()
    for pid in known:
        chain, at = [], pid
        while at in known and at != top and at not in below:
            chain.append(at)
            at = known[at].parent
        if at == top or at in below:
            below.update(chain)
    return [pid for pid in below if known[pid].state != "Z"]


def _processes_with(mark: bytes) -> list[int]:
    """Return the processes whose environment has the entry ``mark``, zombies left out."""
    found: list[int] = []
    for pid in _pids():
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
    return found


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
