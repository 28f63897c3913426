"""How an attempt may come out, as the rooms of the agent tell each other."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from jobs import Usage


class JobLost(Exception):
    """The attempt can't go on here; the message says why. Another attempt may succeed."""


class LostByService(JobLost):
    """It can't go on for what its service's settings ask for; jobs of other services may."""


class JobInvalid(Exception):
    """The job can't run anywhere; the message says why."""


class ExitKind(enum.StrEnum):
    """How a job ended."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMEOUT = "timeout"
    KILLED = "killed"
    MEMORY = "memory"
    """It used more memory than it may."""
    ENDED_OUTSIDE = "ended outside"
    """By somebody else: not by itself, by us or for a reason of ours; the message says by whom."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job ended; ``code`` is the exit code or the signal's number, if there is one.

    ``memory_used`` are the bytes that were over the limit. ``usage`` is None where that is not
    known, or stands in a record of its own.
    """

    kind: ExitKind
    code: int = 0
    message: str = ""
    memory_used: int = 0
    usage: Usage | None = None
