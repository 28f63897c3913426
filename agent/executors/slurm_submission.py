"""What is submitted to Slurm for an attempt: name, options, script. Nothing in it is a job's own.

The script that a user sent, the names of its files and of its service never reach a command line:
the script for Slurm names the attempt's directory, which the agent has named.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import ConfigError
from jobs import Resources

_ROOM_SECONDS = 120.0  # between our time limit and Slurm's, which acts up to a minute early
_WARNING_SECONDS = 30.0  # between Slurm's SIGTERM and its time limit, beside the grace period
_MAX_WARNING_SECONDS = 65535  # sbatch(1), --signal
_ROOM_BYTES = 64 * 1024**2  # of the supervisor, and for our memory limit to act first
_MIB = 1024**2

_OURS = (
    *("array", "batch", "chdir", "clusters", "error", "export", "export-file", "get-user-env"),
    *("gid", "help", "input", "job-name", "no-requeue", "nodes", "ntasks", "open-mode", "output"),
    *("parsable", "quiet", "requeue", "signal", "test-only", "uid", "usage", "verbose", "version"),
    *("wait", "wrap"),
)
_OURS_SHORT = "aDeiJhMNnoQvVW"
"""Options of sbatch(1) that would take a job away from the agent."""


def checked_options(text: str) -> tuple[str, ...]:
    """Split an operator's options for sbatch. Raises :class:`ConfigError` for what can't be."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the Slurm options {text!r} can't be read: {error}") from None
    return checked_words(words)


def checked_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return an operator's options for sbatch. Raises :class:`ConfigError` for what can't be."""
    text = shlex.join(words)
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            raise ConfigError(
                f"the Slurm options {text!r}: {word!r} is no option; write --partition=gpu, with"
                " an equals sign"
            )
        name = word[2:].partition("=")[0]
        # sbatch takes any beginning of a name
        is_ours = word.startswith("--") and any(ours.startswith(name) for ours in _OURS)
        if is_ours or (not word.startswith("--") and word[1] in _OURS_SHORT):
            raise ConfigError(f"the Slurm options {text!r}: the agent itself sets {word!r}")
    return tuple(words)


def with_joined_values(arguments: Sequence[str]) -> list[str]:
    """Write the options for sbatch in the one form that argparse takes for them.

    A value that begins with a dash it would take for an option.
    """
    joined: list[str] = []
    words = iter(arguments)
    for word in words:
        value = next(words, None) if word == "--slurm-options" else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


@dataclass(frozen=True, slots=True)
class Request:
    """What an attempt asks of Slurm."""

    name: str
    directory: Path
    output: Path
    resources: Resources
    timeout_seconds: float | None
    grace_seconds: float
    options: Sequence[str]

    def arguments(self) -> list[str]:
        """Return the options for sbatch: the operator's, then ours, which win."""
        resources, grace = self.resources, self.grace_seconds
        warning = min(math.ceil(grace + _WARNING_SECONDS), _MAX_WARNING_SECONDS)
        arguments = [
            *self.options,
            f"--job-name={self.name}",
            # a % begins a pattern there
            f"--output={str(self.output).replace('%', '%%')}",
            f"--chdir={self.directory}",
            *("--nodes=1", "--ntasks=1", "--no-requeue"),
            f"--cpus-per-task={resources.cpus}",
            f"--signal=B:TERM@{warning}",
        ]
        if resources.memory:
            arguments.append(f"--mem={math.ceil((resources.memory + _ROOM_BYTES) / _MIB)}M")
        if resources.gpus:
            arguments.append(f"--gres=gpu:{resources.gpus}")
        if self.timeout_seconds is not None:
            seconds = self.timeout_seconds + grace + warning + _ROOM_SECONDS
            arguments.append(f"--time={math.ceil(seconds / 60)}")
        return arguments


def batch_script(words: Sequence[str]) -> str:
    """Return the script that has Slurm run a command, which takes the place of the shell."""
    return f"#!/bin/sh\nexec {shlex.join(words)} < /dev/null\n"
