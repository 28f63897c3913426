"""Jobs as processes of this machine, each below a supervisor that outlives the agent.

The supervisor of an attempt makes the link ``process``, whose text is its pid and start time,
before it starts the job. symlink(2) decides which of several it is, so that a job is started
once although a request may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from agent import plain_files
from agent.attempt_directory import AttemptDirectory
from agent.control_groups import Delegated, delegated
from agent.executors.base import Command, Execution, Executor
from agent.executors.process_tree import ProcessTree
from agent.executors.records import (
    exit_record,
    supervisor_errors,
    usage_of,
    write_exit_record,
)
from agent.isolation.base import PREPARING_MODULE, Allotment, CannotIsolate, Enclosure, Place
from agent.isolation.choice import Isolator
from agent.job_environment import gpu_variables
from agent.outcomes import Exit, ExitKind, JobLost, LostByService
from agent.resources import Allotments, Allotted, Machine
from agent.settings import AgentRefused
from agent.supervision.launcher import Launcher, LaunchRequest, LifeLine
from jobs import Isolation, IsolationKind, IsolationOffer, Resources, Usage
from telemetry.logs import event

log = logging.getLogger("orchestrator.local")

_START_TRIES = 3
_FEW_FILES = 50
_START_SECONDS = 15.0
_STOPPED_SECONDS = 2.0  # so long a supervisor that is past its time may be stopped
_PATIENCE_SECONDS = 60.0  # and so long it may go on if it is not
_LOOK_SECONDS = 1.0


class LocalExecutor(Executor):
    """Runs jobs on the agent's own machine."""

    name = "local"

    def __init__(
        self,
        workdir: Path,
        environment: Mapping[str, str],
        isolator: Isolator,
        machine: Machine,
        umask: int = -1,
    ) -> None:
        """``environment`` is all that jobs inherit, with the ``umask``; -1 is the agent's own."""
        self._launcher = Launcher(workdir, environment, PREPARING_MODULE, umask)
        self._isolator = isolator
        self._machine = machine
        self._allotments = Allotments(machine)
        self._delegated = delegated(Path("/proc/self/mountinfo"), Path("/proc/self/cgroup"))

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

    def resources(self) -> Resources:
        """Return what this machine has for jobs."""
        return self._machine.total

    async def run(self) -> None:
        """Remove what jobs of earlier processes left behind, outside of their directories."""
        if self._delegated is not None:
            self._delegated.remove_unused()
        await asyncio.to_thread(self._isolator.sweep)

    def execution(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt on this machine."""
        return LocalExecution(
            directory, self._launcher, self._isolator, self._allotments, self._delegated
        )

    def adopt(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt that has what it had in an earlier process."""
        self._isolator.adopt(Place(directory.path))
        if not directory.has_result():
            self._allotments.adopt(directory.path)
        return self.execution(directory)

    async def end_abandoned(self, attempt: Path) -> None:
        """End what runs in the directory of an attempt of which nothing else is known."""
        plain_files.mark(attempt / "kill")
        tree = ProcessTree(attempt)
        if tree.is_claimed():
            with suppress(JobLost):
                await tree.end_by_force()
        await tree.kill_leftovers()

    def close(self) -> None:
        """End the fork server and the supervisors that have no job."""
        self._launcher.close()


class LocalExecution(Execution):
    """One attempt's process tree on this machine."""

    def __init__(
        self,
        directory: AttemptDirectory,
        launcher: Launcher,
        isolator: Isolator,
        allotments: Allotments,
        delegated: Delegated | None,
    ) -> None:
        self._directory = directory
        self._launcher = launcher
        self._isolator = isolator
        self._allotments = allotments
        self._delegated = delegated
        self._place = Place(directory.path)
        self._tree = ProcessTree(directory.path)
        self._life_line: LifeLine | None = None

    def is_started(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return self._tree.is_claimed()

    def check_adopted(self) -> None:
        """Raise :class:`JobLost` if the machine was restarted: no process outlives that."""
        self._directory.check_boot()

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        """Start the job under its supervisor; returns when it runs.

        Of several supervisors of a directory only the first takes it.
        """
        allotted = await self._allotments.take(self._directory.path, command.resources)
        assign = self._directory.assign
        if assign.isolation.image is None and len(assign.files) <= _FEW_FILES:
            enclosure = self._enclosure(command, allotted)
        else:  # an image may have to be tried out, many files to be handed over
            enclosure = await asyncio.to_thread(self._enclosure, command, allotted)
        request = LaunchRequest(
            self._directory.path,
            enclosure.variables,
            command.timeout_seconds,
            command.grace_seconds,
            enclosure.argv,
            enclosure.preparation,
            command.resources.memory or None,
            allotted.cores,
            self._control_group(command.resources),
        )
        for _ in range(_START_TRIES):
            if self.is_started():
                return None
            try:
                async with asyncio.timeout(_START_SECONDS):
                    if await self._launch(request):
                        return None
            except TimeoutError:
                # the supervisor hangs, or the fork server that was to make it; if one wakes up
                # after all: of several supervisors only the first gets the directory
                self._launcher.replace_fork_server()
        if not self.is_started():
            raise JobLost(f"the supervisor did not start: {self._errors()}")
        return None

    async def _launch(self, request: LaunchRequest) -> bool:
        """Have a supervisor run the job; returns whether it does."""
        life_line = await self._launcher.launch(request)
        try:
            if await life_line.wait_for_start():
                self._life_line = life_line
        finally:
            if self._life_line is not life_line:
                life_line.close()
        return self._life_line is not None

    def _control_group(self, needs: Resources) -> tuple[str, str] | None:
        """Make the job's control group, if there is a limit that the kernel can keep by it."""
        is_container = self._directory.assign.isolation.image is not None  # which has its own
        if self._delegated is None or not needs.memory or is_container:
            return None
        return self._delegated.make(self._directory.path.name, needs.memory)

    def _enclosure(self, command: Command, allotted: Allotted) -> Enclosure:
        """Make the directory ready for the job, and say how it is started there."""
        assign, needs = self._directory.assign, command.resources
        are_indices = all(name.isdecimal() for name in allotted.gpus)
        gpus = tuple(int(name) for name in allotted.gpus) if are_indices else None
        allotment = Allotment(needs.cpus, needs.memory or None, gpus)
        variables = {**command.variables, **gpu_variables(allotted.gpus)}
        try:
            return self._isolator.enclose(
                assign.isolation, self._place, command.argv, variables, allotment
            )
        except CannotIsolate as error:
            raise LostByService(f"the job can't be isolated as its service asks: {error}") from None

    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended.

        The time limit is the supervisor's to keep. One that was stopped, by its own job perhaps,
        is ended here, with the job.
        """
        self.check_adopted()
        return await self._cleaned(await self._ended_by(self._last_moment(), ExitKind.TIMEOUT))

    async def kill(self) -> Exit:
        """End the job's whole process tree, whatever its state; returns when it is gone."""
        # The mark first: a supervisor that has not made its claim yet sees it after that.
        self._directory.mark_to_be_killed()
        with suppress(JobLost):
            self.check_adopted()
            if self.is_started() and not self._has_ended():
                self._tree.terminate()
            last_moment = time.monotonic() + self._directory.assign.grace_seconds
            return await self._cleaned(await self._ended_by(last_moment, ExitKind.KILLED))
        return Exit(ExitKind.KILLED)

    def usage(self, ended: Exit) -> Usage | None:
        """Return what the supervisor says that the job has used."""
        return usage_of(self._directory.path, ended)

    async def _cleaned(self, ended: Exit) -> Exit:
        self._allotments.give_back(self._directory.path)
        if ended.kind is not ExitKind.EXITED:
            await self._clean_up()
        return ended

    async def _clean_up(self) -> None:
        isolation = self._directory.assign.isolation
        await asyncio.to_thread(self._isolator.clean_up, isolation, self._place)

    def _last_moment(self) -> float | None:
        """Return when the time limit and the grace period are over, by CLOCK_MONOTONIC."""
        assign = self._directory.assign
        if assign.timeout_seconds is None or (claimed_at := self._tree.claimed_at()) is None:
            return None
        return claimed_at + assign.timeout_seconds + assign.grace_seconds

    async def _ended_by(self, last_moment: float | None, kind: ExitKind) -> Exit:
        """Wait for the end; a supervisor that lets the last moment pass is ended by force."""
        if last_moment is None:
            return await self._end()
        ending = asyncio.ensure_future(self._end())
        try:
            while not ending.done():
                left = last_moment + _STOPPED_SECONDS - time.monotonic()
                await asyncio.wait([ending], timeout=max(_LOOK_SECONDS, left))
                is_over = time.monotonic() > last_moment + _PATIENCE_SECONDS
                if not ending.done() and (is_over or (left <= 0 and self._tree.is_stopped())):
                    return await self._end_by_force(kind)
            return await ending
        finally:
            ending.cancel()

    async def _end(self) -> Exit:
        """Wait for the end, however long it takes."""
        if self._life_line is None:
            await self._tree.supervisor_is_gone()
            await self._tree.kill_leftovers()
        elif not await self._life_line.wait_for_end():
            await self._tree.kill_leftovers()
        record = exit_record(self._directory.path)
        if record is not None:
            return record
        await self._clean_up()
        raise JobLost(f"the job's supervisor was killed {self._errors()}".strip())

    async def _end_by_force(self, kind: ExitKind) -> Exit:
        assign = self._directory.assign
        event(
            log,
            "supervisor_ended_by_force",
            level=logging.WARNING,
            job=assign.job_id,
            attempt=assign.attempt_id,
        )
        if exit_record(self._directory.path) is None:
            # before it is killed: a crash of the agent from here on must not repeat the job
            write_exit_record(self._directory.path, kind)
        await self._tree.end_by_force()
        return exit_record(self._directory.path) or Exit(kind)

    def forget(self) -> None:
        """Let another job have its user id, and what it had of the machine."""
        self._allotments.give_back(self._directory.path)
        self._isolator.release(self._place)
        if self._delegated is not None and self._directory.assign.resources.memory:
            self._delegated.remove(self._directory.path.name)

    def _has_ended(self) -> bool:
        """Whether the supervisor said so; it may have another job by now."""
        return self._life_line is not None and self._life_line.has_ended()

    def _errors(self) -> str:
        return supervisor_errors(self._directory.path)
