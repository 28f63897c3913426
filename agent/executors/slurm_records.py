"""What lies in an attempt's directory for a job in Slurm, and what its node left there."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Command
from agent.executors.records import exit_record
from agent.outcomes import Exit
from agent.supervision.launcher import LaunchRequest
from telemetry.logs import event

log = logging.getLogger("orchestrator.slurm")

_SETTLE_SECONDS = 0.5  # between two processes of a job that hear of its end from Slurm
_NAME, _NUMBER, _CLAIM = "slurm-name", "slurm-id", "slurm-claim"


def name_in(attempt: Path) -> str | None:
    """Return the name of the batch job that was, perhaps, submitted for an attempt."""
    with suppress(FileNotFoundError):
        return os.readlink(attempt / _NAME)
    return None


class SlurmRecords:
    """The files of one attempt, asked of the file server anew where that matters."""

    def __init__(self, directory: AttemptDirectory) -> None:
        self._assign = directory.assign
        self.path = directory.path

    # --- who it is in Slurm

    def take_name(self) -> tuple[bool, str]:
        """Return whether no earlier process had a name for the batch job, and the name."""
        assign = self._assign
        # the last part: a server that was set up anew counts from 1 again
        name = f"orchestrator-{assign.job_id}-{assign.attempt_id}-{secrets.token_hex(6)}"
        try:
            os.symlink(name, self.path / _NAME)
        except FileExistsError:
            return False, os.readlink(self.path / _NAME)
        return True, name

    def name(self) -> str | None:
        """Return the batch job's name; None if none can have been submitted."""
        return name_in(self.path)

    def note_number(self, number: int) -> None:
        """Write down which number the batch job has."""
        with suppress(FileExistsError):
            os.symlink(str(number), self.path / _NUMBER)

    def was_submitted(self) -> bool:
        """Whether it is certain that there was a batch job."""
        return os.path.lexists(self.path / _NUMBER)

    def number(self) -> int | None:
        """Return the number of the batch job that has the attempt, or was submitted for it."""
        claimed = self.claimed_by()
        if claimed is not None:
            return claimed
        with suppress(FileNotFoundError):
            return int(os.readlink(self.path / _NUMBER))
        return None

    def claimed_by(self) -> int | None:
        """Return the number of the batch job that has the attempt, None if none has come yet."""
        with suppress(FileNotFoundError):
            return int(os.readlink(self.path / _CLAIM).split()[0])
        return None

    def write_order(self, command: Command) -> None:
        """Leave for the node what is to be done there."""
        request = LaunchRequest(
            self.path,
            command.variables,
            command.timeout_seconds,
            command.grace_seconds,
            command.argv,
            command.preparation,
            command.resources.memory or None,
            settle_seconds=_SETTLE_SECONDS,
        )
        unfinished = self.path / "order.new"
        unfinished.write_bytes(request.encode())
        unfinished.rename(self.path / "order")

    def log(self, name: str, fields: Mapping[str, object]) -> None:
        """Log an event of the attempt."""
        words = {"job": self._assign.job_id, "attempt": self._assign.attempt_id, **fields}
        event(log, name, **cast("dict[str, Any]", words))

    # --- what the node says

    def is_started(self) -> bool:
        """Whether a supervisor has taken the directory."""
        return os.path.lexists(self.path / "process")

    def is_nothing_left(self) -> bool:
        """Whether the job has ended, and its supervisor found no process of it alive."""
        return (self.path / "nothing-left").exists()

    def exit(self) -> Exit | None:
        """Return how the job ended, None if its supervisor has not said so."""
        return exit_record(self.path)

    def refresh(self) -> None:
        """Have an NFS client ask its server what is in the directory (close-to-open, nfs(5))."""
        with suppress(OSError):
            os.close(os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
