"""What all attempts of an agent on a submit host share: commands, places, settings."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from agent.attempt_directory import AttemptDirectory
from agent.executors import node_program
from agent.executors.base import Command
from agent.executors.slurm_commands import SlurmCommands
from agent.executors.slurm_watch import SlurmWatch
from agent.isolation.base import Allotment, CannotIsolate, Place
from agent.isolation.choice import Isolator
from agent.job_environment import gpu_variables
from agent.outcomes import LostByService
from agent.settings import AgentRefused
from agent.workdir import unusable_refused

_SUBMISSIONS_AT_A_TIME = 4

FILE_SYSTEM_SECONDS = 60.0
"""An NFS client asks again after that long at the latest (nfs(5), acdirmax)."""


@dataclass(frozen=True, slots=True)
class SlurmSettings:
    """How jobs are submitted: ``options`` are the operator's for all jobs."""

    options: tuple[str, ...] = ()
    python: str = sys.executable
    """The Python that runs the supervisor, by its path on the nodes."""
    file_system_seconds: float = FILE_SYSTEM_SECONDS
    """How long the file system may take to show here what a node wrote."""


class SubmitHost:
    """A machine from which jobs are submitted, with a work directory that the nodes see."""

    def __init__(
        self, workdir: Path, commands: SlurmCommands, settings: SlurmSettings, isolator: Isolator
    ) -> None:
        """``isolator`` tries out on this machine what the nodes are to give as well."""
        self.commands = commands
        self.settings = settings
        self.isolator = isolator
        self.notices = workdir / "notices"
        self.output = workdir / "slurm"
        self.on_node: Path
        self._workdir = workdir
        self.watch = SlurmWatch(commands, self.notices)
        self.submitting = asyncio.Semaphore(_SUBMISSIONS_AT_A_TIME)

    def make_ready(self) -> None:
        """Lay out the work directory, and try out how jobs can be isolated.

        Raises :class:`AgentRefused`.
        """
        with unusable_refused(self._workdir):
            self.output.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.on_node = node_program.install(self._workdir / "program")
        try:
            self.isolator.try_out()
        except CannotIsolate as error:
            raise AgentRefused(str(error)) from None

    def enclosed(self, directory: AttemptDirectory, command: Command) -> Command:
        """Make the directory ready for the job; returns what is to be run instead.

        Raises :class:`JobLost` if its isolation can't be had.
        """
        needs = directory.assign.resources
        try:
            enclosure = self.isolator.enclose(
                directory.assign.isolation,
                Place(directory.path),
                command.argv,
                command.variables if needs.gpus else {**command.variables, **gpu_variables(())},
                Allotment(needs.cpus, needs.memory or None),
            )
        except CannotIsolate as error:
            raise LostByService(f"the job can't be isolated as its service asks: {error}") from None
        return replace(
            command,
            argv=enclosure.argv,
            variables=enclosure.variables,
            preparation=enclosure.preparation,
        )
