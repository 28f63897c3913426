"""Changes of a job's state, each with its line of history, and which attempt may make them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from events import Transition
from jobs import (
    ACTIVE_STATES,
    FINAL_STATES,
    TRANSITIONS,
    Demand,
    JobState,
    Resources,
    Step,
    Usage,
)
from records import IllegalTransition, Superseded, UserQueue
from storage.blobs import has_result
from storage.checksums import checksum_of_row, stored_state
from storage.database import Database


@dataclass(frozen=True, slots=True)
class JobRow:
    """A job as the statements that change it need it."""

    id: int
    user_id: int
    service: str
    state: JobState
    attempts: int
    lost_starts: int


def transition(
    db: Database, job: JobRow, after: JobState, reason: str, message: str | None = None
) -> None:
    """Change a job's state now; see :func:`pass_through`."""
    pass_through(db, job, [Step(after, reason, time.time())], message)


def pass_through(
    db: Database,
    job: JobRow,
    steps: Sequence[Step],
    message: str | None = None,
    usage: Usage | None = None,
) -> None:
    """Take a job to the state of the last step, and write its history.

    ``message`` is what a user is told of the job from now on; None leaves it as it is, and a job
    that is cleaned has it added to what is told of its end. No other statement changes either,
    so whoever follows the feed knows both. ``usage`` is for the feed; its place is the attempt.
    """
    states = [job.state, *(step.state for step in steps)]
    for before, after in pairwise(states):
        if after not in TRANSITIONS[before]:
            raise IllegalTransition(f"job {job.id}: {before} can't become {after}")
    began_at = next((step.at for step in steps if step.state is JobState.RUNNING), None)
    last = steps[-1]
    # fetched to its end: only then is the statement done
    ((created_at, started_at, told, *needed),) = db.execute(
        _SET_STATE[last.state],
        {
            "state": last.state,
            "at": last.at,
            "job": job.id,
            "message": message,
            "began_at": began_at,
        },
    ).fetchall()
    context = JobContext(created_at, demand_of(needed))
    for before, step in zip(states, steps[:-1], strict=False):
        started = began_at if step.state is JobState.RUNNING else None
        announce(db, job, before, step, context, started_at=started)
    announce(
        *(db, job, states[-2], last, context), started_at=started_at, message=told, usage=usage
    )


_SET_STATE: Mapping[JobState, str] = {
    **dict.fromkeys(
        JobState,
        "UPDATE job SET state = :state, changed_at = :at, message = coalesce(:message, message),"
        " started_at = coalesce(:began_at, started_at) WHERE id = :job"
        " RETURNING created_at, started_at, message,"
        " needed_cpus, needed_memory, needed_gpus, avoided",
    ),
    JobState.QUEUED: (
        "UPDATE job SET state = :state, changed_at = :at, message = coalesce(:message, message),"
        " started_at = NULL WHERE id = :job"
        " RETURNING created_at, started_at, message,"
        " needed_cpus, needed_memory, needed_gpus, avoided"
    ),
    **dict.fromkeys(
        FINAL_STATES,
        "UPDATE job SET state = :state, changed_at = :at, message = coalesce(:message, message),"
        " started_at = coalesce(:began_at, started_at), finished_at = :at, outcome = :state,"
        " aged_from = steady_now()"
        " WHERE id = :job"
        " RETURNING created_at, started_at, message,"
        " needed_cpus, needed_memory, needed_gpus, avoided",
    ),
    # still says how it ended
    JobState.CLEANED: (
        "UPDATE job SET state = :state, changed_at = :at,"
        " message = CASE message WHEN '' THEN :message ELSE message || '; ' || :message END"
        " WHERE id = :job RETURNING created_at, started_at, message,"
        " needed_cpus, needed_memory, needed_gpus, avoided"
    ),
}
"""How each state is entered; the times of a job are those of its last attempt."""


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the feed tells of a job with each of its transitions."""

    created_at: float
    demand: Demand


def announce(
    db: Database,
    job: JobRow,
    before: JobState | None,
    step: Step,
    context: JobContext,
    *,
    started_at: float | None = None,
    message: str = "",
    usage: Usage | None = None,
) -> None:
    """Write one line of a job's history, and have it told once it is committed.

    An active job has no ``message``.
    """
    row = (job.id, job.attempts, step.at, before, step.state, step.reason)
    row_id = db.execute(
        "INSERT INTO history (job_id, attempt, at, from_state, to_state, reason, crc32)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*row, checksum_of_row(row)),
    ).lastrowid
    db.announce(
        Transition(
            cast(int, row_id),
            job.id,
            job.user_id,
            job.service,
            job.attempts,
            step.at,
            before,
            step.state,
            step.reason,
            context.created_at,
            started_at,
            message,
            context.demand,
            usage,
        )
    )


def job_of_attempt(db: Database, attempt_id: int) -> JobRow:
    """Return the job whose current attempt this is; raises :class:`Superseded`."""
    row = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
        " WHERE id = (SELECT job_id FROM attempt WHERE id = ?) AND attempt_id = ?",
        (attempt_id, attempt_id),
    ).fetchone()
    if row is None:
        raise Superseded(f"attempt {attempt_id} was superseded")
    return job_of(row)


def first_of_queue(
    db: Database, queue: UserQueue, demands: Iterable[Demand]
) -> tuple[JobRow, Demand] | None:
    """Return the job that is next in a queue, of those with one of the demands; None for none."""
    firsts = [(row, demand) for demand in demands if (row := _first(db, queue, demand))]
    if not firsts:
        return None
    row, demand = min(firsts, key=lambda first: (-first[0][6], first[0][0]))
    return job_of(row), demand


def _first(db: Database, queue: UserQueue, demand: Demand) -> Sequence[Any] | None:
    needed = demand.resources
    row: Sequence[Any] | None = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts, priority FROM job"
        " WHERE state = 'Queued' AND service = ? AND user_id = ?"
        " AND needed_cpus = ? AND needed_memory = ? AND needed_gpus = ? AND avoided = ?"
        " ORDER BY priority DESC, id LIMIT 1",
        (
            *(queue.service, queue.user_id, needed.cpus, needed.memory, needed.gpus),
            " ".join(demand.avoided),
        ),
    ).fetchone()
    return row


def demand_of(row: Sequence[Any]) -> Demand:
    """Make the record of a row of cpus, memory, gpus and the agents to be avoided."""
    return Demand(Resources(*row[:3]), tuple(row[3].split()))


def job_with_id(db: Database, job_id: int) -> JobRow | None:
    """Return a job, None if there is no such job."""
    row = db.execute(
        "SELECT id, user_id, service, state, attempts, lost_starts FROM job WHERE id = ?",
        (job_id,),
    ).fetchone()
    return None if row is None else job_of(row)


def job_of(row: Sequence[Any]) -> JobRow:
    """Make the record of a row of id, user, service, state, attempts and lost starts."""
    return JobRow(row[0], row[1], row[2], stored_state(row[3]), row[4], row[5])


def active_job_of_attempt(db: Database, attempt_id: int) -> JobRow:
    """Return the job if this attempt holds it; raises :class:`Superseded`."""
    job = job_of_attempt(db, attempt_id)
    if job.state not in ACTIVE_STATES:
        raise Superseded(f"attempt {attempt_id}: its job is {job.state} already")
    return job


def receiving_job_of_attempt(db: Database, attempt_id: int) -> JobRow:
    """Return the job if this attempt may deliver: it is active, or killed without a result yet."""
    job = job_of_attempt(db, attempt_id)
    if job.state is JobState.KILLED and not has_result(db, attempt_id):
        return job
    return active_job_of_attempt(db, attempt_id)
