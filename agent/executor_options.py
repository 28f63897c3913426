"""Which executor an agent uses, and what is said of it on the command line."""

from __future__ import annotations

import argparse
import enum
import os
import sys
from collections.abc import Mapping

from agent.executors.base import Executor
from agent.executors.local import LocalExecutor
from agent.executors.slurm import SlurmExecutor
from agent.executors.slurm_commands import SlurmCommands
from agent.executors.slurm_host import FILE_SYSTEM_SECONDS, SlurmSettings, SubmitHost
from agent.executors.slurm_submission import checked_options
from agent.isolation.choice import Isolator
from agent.resource_options import machine_of, resource_options_given
from agent.resources import Machine, detected_cpus
from agent.settings import AgentSettings
from config import ConfigError
from runtime import inherited_environment

_SLURM_SLOTS = 100


class ExecutorKind(enum.StrEnum):
    """Where the processes of an agent's jobs live."""

    LOCAL = "local"
    SLURM = "slurm"


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the executor."""
    parser.add_argument(
        "--executor",
        choices=list(ExecutorKind),
        default=ExecutorKind.LOCAL,
        help="local: on this machine; slurm: as batch jobs of a Slurm cluster (default: local)",
    )
    slurm = parser.add_argument_group("with --executor slurm")
    slurm.add_argument(
        "--slurm-options",
        default="",
        metavar="OPTIONS",
        help='options of sbatch for all jobs, as "--partition=gpu --account=lab"',
    )
    slurm.add_argument(
        "--slurm-python",
        default=sys.executable,
        metavar="FILE",
        help=f"Python 3.11 or later by its path on the nodes (default: {sys.executable})",
    )
    slurm.add_argument(
        "--slurm-file-system",
        type=float,
        default=FILE_SYSTEM_SECONDS,
        metavar="SECONDS",
        help="how long the shared file system may take to show what a node wrote"
        f" (default: {FILE_SYSTEM_SECONDS:g})",
    )


def default_slots(options: argparse.Namespace) -> int:
    """Return how many jobs at a time it takes if it was not told."""
    return _SLURM_SLOTS if options.executor == ExecutorKind.SLURM else min(detected_cpus(), 4096)


def executor_of(
    options: argparse.Namespace, settings: AgentSettings, environment: Mapping[str, str]
) -> Executor:
    """Make the executor. Raises :class:`ConfigError` if it can't work here."""
    if options.executor != ExecutorKind.SLURM:
        machine = machine_of(options)
        return _local_executor(settings, inherited_environment(environment), machine)
    if given := resource_options_given(options):
        raise ConfigError(
            f"{', '.join(given)}: not with --executor slurm, as Slurm itself knows what its nodes"
            " have"
        )
    if not 0 <= options.slurm_file_system <= 3600:
        raise ConfigError("--slurm-file-system must be from 0 to 3600 seconds")
    if not os.path.isabs(options.slurm_python):
        raise ConfigError("--slurm-python must be a whole path, from / on")
    commands = SlurmCommands(environment)
    if (missing := commands.missing_command()) is not None:
        raise ConfigError(
            f"--executor slurm needs Slurm's command {missing}, which is not on the PATH; start"
            " the agent where jobs can be submitted, with the PATH that finds it"
        )
    slurm_settings = SlurmSettings(
        options=checked_options(options.slurm_options),
        python=options.slurm_python,
        file_system_seconds=options.slurm_file_system,
    )
    if settings.isolation.users is not None:
        raise ConfigError("--job-user: jobs in Slurm run as the user who submits them")
    isolator = Isolator(settings.workdir, settings.isolation, inherited_environment(environment))
    return SlurmExecutor(SubmitHost(settings.workdir, commands, slurm_settings, isolator))


def _local_executor(
    settings: AgentSettings, environment: Mapping[str, str], machine: Machine
) -> LocalExecutor:
    umask = -1
    if settings.isolation.users is not None:
        # job users pass through the work directory, where all else is the agent's alone
        umask = os.umask(0o077)
    isolator = Isolator(settings.workdir, settings.isolation, environment)
    return LocalExecutor(settings.workdir, environment, isolator, machine, umask)
