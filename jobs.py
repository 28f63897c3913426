"""What a job is: its states and their transitions, its files."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

RUN_SCRIPT = "run.sh"
"""The file that every job has and that the agent starts with bash."""


class JobState(enum.StrEnum):
    """The public name of every state a job can be in."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    SUBMITTED = "Submitted"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    INVALID = "Invalid"
    KILLED = "Killed"
    CLEANED = "Cleaned"


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.PROCESSING, JobState.INVALID, JobState.KILLED}),
    # Failed, here and below: the last allowed attempt was lost
    JobState.PROCESSING: frozenset(
        {
            JobState.SUBMITTED,
            JobState.QUEUED,
            JobState.INVALID,
            JobState.FAILED,
            JobState.KILLED,
        }
    ),
    JobState.SUBMITTED: frozenset(
        {JobState.RUNNING, JobState.QUEUED, JobState.FAILED, JobState.KILLED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.COMPLETED, JobState.FAILED, JobState.QUEUED, JobState.KILLED}
    ),
    JobState.COMPLETED: frozenset({JobState.CLEANED}),
    JobState.FAILED: frozenset({JobState.CLEANED}),
    JobState.INVALID: frozenset({JobState.CLEANED}),
    JobState.KILLED: frozenset({JobState.CLEANED}),
    JobState.CLEANED: frozenset(),
}
"""The one table of allowed transitions; whoever changes a state asks it."""

ACTIVE_STATES = (JobState.PROCESSING, JobState.SUBMITTED, JobState.RUNNING)
"""States in which an agent holds the job, in the order in which they are passed."""

FINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.INVALID, JobState.KILLED})
"""States that end a job; only retention (to Cleaned) follows."""


def has_ended(state: JobState) -> bool:
    """Say whether no attempt of a job in this state is or will be under way."""
    return state is not JobState.QUEUED and state not in ACTIVE_STATES


# --- file names -------------------------------------------------------------------

_MAX_NAME_BYTES = 255


def file_name_problem(name: str) -> str | None:
    """Say why ``name`` may not be the name of an uploaded file, or None if it may.

    A job's input is one flat directory, so a name is one path component: not empty,
    not ``.`` or ``..``, without separators, control characters or lone surrogates,
    and at most 255 bytes in UTF-8 (NAME_MAX of the usual file systems).
    """
    if not name:
        return "is empty"
    if name in (".", ".."):
        return "is a directory"
    if "/" in name or "\\" in name:
        return "contains a path separator"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if len(encoded) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    return None


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One input file of a job: plain name, length in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str
