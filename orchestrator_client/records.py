"""What the server tells, as records: jobs, files, agents, services, events."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from orchestrator_client.errors import UnexpectedAnswer


class JobState(enum.StrEnum):
    """How far a job is. ``Unknown`` stands for a state that this client has not heard of."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    SUBMITTED = "Submitted"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    INVALID = "Invalid"
    KILLED = "Killed"
    CLEANED = "Cleaned"
    UNKNOWN = "Unknown"

    @classmethod
    def _missing_(cls, value: object) -> JobState:
        return cls.UNKNOWN

    @property
    def has_ended(self) -> bool:
        """Whether a job in this state will no longer run."""
        return self in _FINAL_STATES


_FINAL_STATES = frozenset(
    {
        JobState.COMPLETED,
        JobState.FAILED,
        JobState.INVALID,
        JobState.KILLED,
        JobState.CLEANED,
    }
)


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as the server described it at one moment.

    Times are in UTC, ``timeout`` in seconds, ``memory`` and sizes in bytes. ``outcome`` is how a
    job ended, also once its files were removed (``Cleaned``). ``exit_code`` is that of its last
    attempt. ``waiting`` says why a job does not run yet. What only the details have (``exit_code``,
    ``waiting``, ``result_size``) is None in lists. ``raw`` is the whole answer.
    """

    id: int
    state: JobState
    message: str
    user_id: int
    service: str
    name: str
    priority: int
    timeout: int | None
    tags: Mapping[str, str]
    agent: str | None
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    outcome: JobState | None
    exit_code: int | None
    waiting: str | None
    result_size: int | None
    raw: Mapping[str, Any]

    @property
    def is_successful(self) -> bool:
        """Whether it ended as ``Completed``."""
        return JobState.COMPLETED in (self.state, self.outcome)


@dataclass(frozen=True, slots=True)
class JobFile:
    """A file of a job: its path, ``file``, ``directory`` or ``link``, and its size in bytes."""

    path: str
    kind: str
    size: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``kind`` is ``job`` or ``agent``, ``data`` what the server sent.

    ``position`` brings what follows it (``client.events(after=...)``).
    """

    kind: str
    position: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BulkAnswer:
    """What became of a request for many jobs; ``jobs`` are the new ones of a rerun."""

    matched: int
    done: int
    skipped: int
    jobs: tuple[int, ...]


def job_info(body: Mapping[str, Any]) -> JobInfo:
    """Make a record of a job's summary or details. Raises :class:`UnexpectedAnswer`."""
    try:
        state = JobState(body["status"])
        attempts = body.get("attempts") or ()
        result = body.get("result")
        outcome = body.get("outcome") or (state if state.has_ended else None)
        return JobInfo(
            id=int(body["id"]),
            state=state,
            message=str(body["message"]),
            user_id=int(body["user_id"]),
            service=str(body["service"]),
            name=str(body["name"]),
            priority=int(body["priority"]),
            timeout=body["timeout"],
            tags=dict(body["tags"]),
            agent=body["agent"],
            created_at=_time(body["created_at"]),
            started_at=_time(body["started_at"]),
            finished_at=_time(body["finished_at"]),
            outcome=None if outcome is None else JobState(outcome),
            exit_code=attempts[-1]["exit_code"] if attempts else None,
            waiting=body.get("waiting_reason"),
            result_size=None if result is None else int(result["size"]),
            raw=body,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"the server describes a job in another way: {error!r}") from None


def bulk_answer(body: Mapping[str, Any]) -> BulkAnswer:
    """Make a record of the answer to a request for many jobs."""
    try:
        return BulkAnswer(
            int(body["matched"]),
            int(body["done"]),
            int(body["skipped"]),
            tuple(int(job_id) for job_id in body.get("jobs") or ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnexpectedAnswer(f"the server answers in another way: {error!r}") from None


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
