"""What every kind of isolation takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import RUN_SCRIPT, Isolation

PREPARING_MODULE = "agent.isolation.before_exec"
"""What the fork server loads, so that it can be called before a job's program runs."""

SCRIPT_ARGV = ("bash", RUN_SCRIPT)
"""What runs a job, in its directory."""


class CannotIsolate(Exception):
    """This machine can't give what was asked for; the message says why, in one sentence."""


@dataclass(frozen=True, slots=True)
class JobUser:
    """Whom a job runs as, where the agent is root; ``home`` is None if there is none."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    name: str | None = None
    home: str | None = None

    def ids(self) -> list[object]:
        """Return what tells the kernel who this is: user, group, further groups."""
        return [self.uid, self.gid, list(self.groups)]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an attempt lies: its job's directory, private temporary directory, and logs.

    All else in ``attempt`` is a record that the job must not reach.
    """

    attempt: Path

    @property
    def job(self) -> Path:
        """The job's working directory."""
        return self.attempt / "job"

    @property
    def temporary(self) -> Path:
        """What the job gets as TMPDIR; it is no part of the result."""
        return self.attempt / "tmp"

    @property
    def logs(self) -> tuple[Path, Path]:
        """Where its output is captured; a job may open them again, as /dev/stdout."""
        return self.attempt / "stdout.log", self.attempt / "stderr.log"


@dataclass(frozen=True, slots=True)
class Allotment:
    """What a job has of the machine; None is what there is. ``memory`` is in bytes."""

    cpus: int | None = None
    memory: int | None = None
    gpus: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Confinement:
    """One job to be confined: ``isolation.kind`` is never ``auto`` here.

    ``argv`` is what is to run in its directory, whatever is put before it. ``variables`` are
    those that the job is given beyond what all jobs inherit.
    """

    isolation: Isolation
    place: Place
    argv: tuple[str, ...] = SCRIPT_ARGV
    user: JobUser | None = None
    allotment: Allotment = Allotment()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Enclosure:
    """How a confined job is started: see :class:`LaunchRequest` of the launcher."""

    argv: tuple[str, ...]
    variables: Mapping[str, str]
    preparation: Mapping[str, Any] | None = None
