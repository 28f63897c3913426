"""Jobs as processes of this machine, each below a supervisor that outlives the agent.

The supervisor of an attempt makes the link ``process``, whose text is its pid and start time,
before it starts the job. symlink(2) decides which of several it is, so that a job is started
once although a request may be repeated.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Command, Execution, Executor
from agent.executors.records import exit_record, supervisor_errors
from agent.isolation.base import PREPARING_MODULE, Allotment, CannotIsolate, Enclosure, Place
from agent.isolation.choice import Isolator
from agent.job_environment import DIRECTORY_VARIABLE
from agent.outcomes import Exit, ExitKind, JobLost
from agent.settings import AgentRefused
from agent.supervision.launcher import Launcher, LaunchRequest, LifeLine
from jobs import Isolation, IsolationKind, IsolationOffer

_KILL_PAUSE_SECONDS = 0.01
_START_TRIES = 3


class LocalExecutor(Executor):
    """Runs jobs on the agent's own machine."""

    name = "local"

    def __init__(
        self, workdir: Path, environment: Mapping[str, str], isolator: Isolator, umask: int = -1
    ) -> None:
        """``environment`` is all that jobs inherit, with the ``umask``; -1 is the agent's own."""
        self._launcher = Launcher(workdir, environment, PREPARING_MODULE, umask)
        self._isolator = isolator

    async def make_ready(self) -> None:
        """Start the fork server, and try out how jobs can be isolated."""
        self._launcher.warm_up()
        try:
            await asyncio.to_thread(self._isolator.try_out)
        except CannotIsolate as error:
            raise AgentRefused(str(error)) from None

    def isolation_offers(self) -> tuple[IsolationOffer, ...]:
        """Return what this machine makes of each kind of isolation."""
        return self._isolator.offers()

    def default_isolation(self) -> IsolationKind:
        """Return what ``auto`` means on this machine."""
        return self._isolator.default

    def problem_with(self, isolation: Isolation) -> str | None:
        """Say why jobs can't be isolated so; None if they can. May take seconds."""
        return self._isolator.problem_with(isolation)

    async def run(self) -> None:
        """Remove what containers of earlier processes left behind."""
        await asyncio.to_thread(self._isolator.sweep)

    def execution(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt on this machine."""
        self._isolator.adopt(Place(directory.path))
        return LocalExecution(directory, self._launcher, self._isolator)

    def close(self) -> None:
        """End the fork server and the supervisors that have no job."""
        self._launcher.close()


@dataclass(frozen=True, slots=True)
class _ProcessIdentity:
    pid: int
    start: int


class LocalExecution(Execution):
    """One attempt's process tree on this machine."""

    def __init__(self, directory: AttemptDirectory, launcher: Launcher, isolator: Isolator) -> None:
        self._directory = directory
        self._launcher = launcher
        self._isolator = isolator
        self._place = Place(directory.path)
        self._life_line: LifeLine | None = None

    def is_started(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return os.path.lexists(self._directory.path / "process")

    def check_adopted(self) -> None:
        """Raise :class:`JobLost` if the machine was restarted: no process outlives that."""
        self._directory.check_boot()

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> None:
        """Start the job under its supervisor; returns when it runs.

        Of several supervisors of a directory only the first takes it.
        """
        self._directory.claim(LocalExecutor.name)
        if self.is_started():
            return
        enclosure = self._enclosure(command)
        request = LaunchRequest(
            self._directory.path,
            enclosure.variables,
            command.timeout_seconds,
            command.grace_seconds,
            enclosure.argv,
            enclosure.preparation,
        )
        for _ in range(_START_TRIES):
            if self.is_started():
                return
            life_line = await self._launcher.launch(request)
            try:
                if await life_line.wait_for_start():
                    self._life_line = life_line
                    return
            finally:
                if self._life_line is not life_line:
                    life_line.close()
        if not self.is_started():
            raise JobLost(f"the supervisor did not start: {self._errors()}")

    def _enclosure(self, command: Command) -> Enclosure:
        """Make the directory ready for the job, and say how it is started there."""
        assign = self._directory.assign
        needs = assign.resources
        allotment = Allotment(needs.cpus, needs.memory or None)
        try:
            return self._isolator.enclose(
                assign.isolation, self._place, command.argv, command.variables, allotment
            )
        except CannotIsolate as error:
            raise JobLost(f"the job can't be isolated as its service asks: {error}") from None

    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended."""
        ended = await self._wait_for_processes()
        if ended.kind is not ExitKind.EXITED:
            await asyncio.to_thread(
                self._isolator.clean_up, self._directory.assign.isolation, self._place
            )
        return ended

    async def _wait_for_processes(self) -> Exit:
        self.check_adopted()
        if self._life_line is None:
            await _end_of(self._identity())
            await self._kill_leftovers()
        elif not await self._life_line.wait_for_end():
            await self._kill_leftovers()
        record = exit_record(self._directory.path)
        if record is not None:
            return record
        raise JobLost(f"the job's supervisor was killed {self._errors()}".strip())

    async def kill(self) -> Exit:
        """End the job's whole process tree, whatever its state; returns when it is gone."""
        # The mark first: a supervisor that has not made its claim yet sees it after that.
        self._directory.mark_to_be_killed()
        if self.is_started() and not self._has_ended():
            self._signal_supervisor()
        with suppress(JobLost):
            return await self.wait()
        return Exit(ExitKind.KILLED)

    def forget(self) -> None:
        """Let another job have its user id."""
        self._isolator.release(self._place)

    def _has_ended(self) -> bool:
        """Whether the supervisor said so; it may have another job by now."""
        return self._life_line is not None and self._life_line.has_ended()

    def _signal_supervisor(self) -> None:
        if not self._directory.is_of_this_boot:
            return
        identity = self._identity()
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(identity.pid)
            try:
                if _start_time(identity.pid) == identity.start:
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            finally:
                os.close(descriptor)

    def _identity(self) -> _ProcessIdentity:
        try:
            pid, start = os.readlink(self._directory.path / "process").split()
            return _ProcessIdentity(int(pid), int(start))
        except (OSError, ValueError) as error:
            raise JobLost(f"the record of the job's process can't be read: {error!r}") from None

    def _errors(self) -> str:
        return supervisor_errors(self._directory.path)

    async def _kill_leftovers(self) -> None:
        """Kill what a killed supervisor left behind, known by its environment."""
        mark = f"{DIRECTORY_VARIABLE}={self._directory.path / 'job'}".encode()
        while pids := await asyncio.to_thread(_processes_with, mark):
            for pid in pids:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_KILL_PAUSE_SECONDS)


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


async def _end_of(identity: _ProcessIdentity) -> None:
    """Wait for the end of a process that need not be ours (pidfd_open(2))."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        # asked once the descriptor is open: from then on the pid can't be taken over
        if _start_time(identity.pid) == identity.start:
            await _readable(descriptor)
    finally:
        os.close(descriptor)


def _start_time(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22 of proc(5)


def _processes_with(mark: bytes) -> list[int]:
    """Return the processes whose environment has the entry ``mark``, zombies left out."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found
