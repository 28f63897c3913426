"""Statements that answer questions about jobs: lists, details, attempts, places in the queue."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from events import Transition
from jobs import ACTIVE_STATES, FINAL_STATES, FileSpec, JobState, Resources, Usage
from records import (
    AttemptRecord,
    JobDetails,
    JobFilter,
    JobIds,
    JobPage,
    JobSummary,
    StoredResult,
)
from storage.checksums import stored_state
from storage.database import Database
from storage.history import HISTORY_OF_JOB, transition_of

QUEUE_POSITION = """
    SELECT 1 + (SELECT count(*) FROM (
        SELECT 1 FROM job AS other WHERE other.state = 'Queued'
            AND other.service = job.service AND other.user_id = job.user_id
            AND other.priority > job.priority
        UNION ALL
        SELECT 1 FROM job AS other WHERE other.state = 'Queued'
            AND other.service = job.service AND other.user_id = job.user_id
            AND other.priority = job.priority AND other.id < job.id
        LIMIT :limit - 1))
    FROM job WHERE id = :job AND state = 'Queued'"""


LARGEST_ID = 2**63 - 1
_EXAMINE_JOBS = 10_000
_EXAMINE_AT_ONCE = 1000
_FLOOR_OF_TIME = """SELECT min(id) FROM (
    SELECT id FROM job INDEXED BY job_created WHERE created_at >= ?
    ORDER BY created_at LIMIT 1000)"""
"""The first job since then. More than one are looked at since clocks are set back at times."""


_NAMED_JOBS = """SELECT value FROM json_each(:asked)
    WHERE value < :before AND value >= :floor ORDER BY value DESC LIMIT :step"""


_ANY_JOBS = """SELECT id FROM job WHERE id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""


_JOBS_OF_USER = """SELECT id FROM job INDEXED BY job_user
    WHERE user_id = :user_id AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""


_JOBS_OF_SERVICE = """SELECT id FROM job INDEXED BY job_service
    WHERE service = :service AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""


_TAGGED_JOBS = """SELECT job_id FROM tag INDEXED BY tag_search
    WHERE key = :tag_key AND value = :tag_value AND job_id < :before AND job_id >= :floor
    ORDER BY job_id DESC LIMIT :step"""


_WAITING_JOBS = """SELECT id FROM job INDEXED BY job_waiting
    WHERE state = 'Queued' AND id < :before AND id >= :floor ORDER BY id DESC LIMIT :step"""


_ACTIVE_JOBS = """SELECT id FROM job INDEXED BY job_active
    WHERE state IN ('Processing', 'Submitted', 'Running') AND id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""


_UNSUCCESSFUL_JOBS = """SELECT id FROM job INDEXED BY job_unsuccessful
    WHERE state IN ('Failed', 'Invalid', 'Killed') AND id < :before AND id >= :floor
    ORDER BY id DESC LIMIT :step"""


_MATCHING_JOBS = """
    SELECT job.id, job.state, job.message, job.user_id, job.service, job.name, job.priority,
        job.timeout, job.created_at, job.changed_at, job.started_at, job.finished_at,
        job.attempt_id, job.outcome, job.cpus, job.memory, job.gpus, agent.name,
        job.needed_cpus, job.needed_memory, job.needed_gpus
    FROM json_each(:ids) AS candidate CROSS JOIN job ON job.id = candidate.value
        LEFT JOIN attempt ON attempt.id = job.attempt_id
        LEFT JOIN agent ON agent.id = attempt.agent_id
    WHERE (:asked IS NULL OR job.id IN (SELECT value FROM json_each(:asked)))
        AND (:user_id IS NULL OR job.user_id = :user_id)
        AND (:service IS NULL OR job.service = :service)
        AND (:states IS NULL OR job.state IN (SELECT value FROM json_each(:states)))
        AND (:since IS NULL OR job.created_at >= :since)
        AND (:text IS NULL OR instr(lower(job.message), lower(:text)))
        AND (:agent IS NULL OR EXISTS (
            SELECT 1 FROM attempt AS tried JOIN agent AS trier ON trier.id = tried.agent_id
            WHERE tried.job_id = job.id AND trier.name = :agent))
        AND (:tags IS NULL OR NOT EXISTS (
            SELECT 1 FROM json_each(:tags) AS asked WHERE NOT EXISTS (
                SELECT 1 FROM tag WHERE tag.job_id = job.id
                    AND tag.key = json_extract(asked.value, '$[0]')
                    AND tag.value = json_extract(asked.value, '$[1]'))))
    ORDER BY job.id DESC LIMIT :limit"""


def find_jobs(db: Database, wanted: JobFilter, before: int, limit: int) -> JobPage:
    """Return some of the jobs asked for, newest first; looks at a bounded number of jobs."""
    found, next_before = _find_rows(db, wanted, before, limit)
    return JobPage(tuple(_summaries_of(db, found)), next_before)


def find_job_ids(db: Database, wanted: JobFilter, before: int, limit: int) -> JobIds:
    """Return the ids of some of the jobs asked for, as :func:`find_jobs`."""
    found, next_before = _find_rows(db, wanted, before, limit)
    return JobIds(tuple(row[0] for row in found), next_before)


def _find_rows(
    db: Database, wanted: JobFilter, before: int, limit: int
) -> tuple[list[Sequence[Any]], int | None]:
    """Go through candidates of the most selective index, newest first, and pick what matches."""
    candidates = _candidates_for(wanted)
    parameters = _parameters_of(wanted)
    floor = 0
    if wanted.since is not None:
        oldest = db.execute(_FLOOR_OF_TIME, (wanted.since,)).fetchone()[0]
        floor = LARGEST_ID if oldest is None else oldest
    found: list[Sequence[Any]] = []
    examined, step, has_more = 0, limit + 1, True
    while has_more and len(found) <= limit and examined < _EXAMINE_JOBS:
        place = {"before": before, "floor": floor, "step": step}
        ids = [row[0] for row in db.execute(candidates, {**parameters, **place})]
        here = {"ids": json.dumps(ids), "limit": limit + 1 - len(found)}
        found += db.execute(_MATCHING_JOBS, {**parameters, **here})
        examined += len(ids)
        has_more = len(ids) == step
        before = ids[-1] if ids else before
        step = _EXAMINE_AT_ONCE
    if len(found) > limit:
        found = found[:limit]
        before, has_more = found[-1][0], True
    return found, before if has_more else None


_COUNTED = """SELECT state, sum(jobs) FROM job_count
    WHERE (:user_id IS NULL OR user_id = :user_id) AND (:service IS NULL OR service = :service)
    GROUP BY state"""


def is_counted(wanted: JobFilter) -> bool:
    """Whether the number of jobs asked for is kept, and no job need be looked at."""
    return not (wanted.ids or wanted.agent or wanted.text or wanted.tags) and wanted.since is None


def kept_counts(db: Database, wanted: JobFilter) -> Counter[JobState]:
    """Return how many jobs are in each state, where :func:`is_counted`."""
    rows = db.execute(_COUNTED, _parameters_of(wanted))
    counts = {stored_state(state): jobs for state, jobs in rows}
    asked = wanted.states or counts.keys()
    return Counter({state: jobs for state, jobs in counts.items() if jobs and state in asked})


def count_some(
    db: Database, wanted: JobFilter, before: int
) -> tuple[Counter[JobState], int | None]:
    """Count the states of a bounded number of jobs; returns where to go on, None at the end."""
    found, next_before = _find_rows(db, wanted, before, _EXAMINE_JOBS)
    return Counter(stored_state(row[1]) for row in found), next_before


def _candidates_for(wanted: JobFilter) -> str:
    if wanted.ids:
        return _NAMED_JOBS
    if wanted.states and wanted.states <= frozenset(ACTIVE_STATES):
        return _ACTIVE_JOBS
    if wanted.tags:
        return _TAGGED_JOBS
    if wanted.user_id is not None:
        return _JOBS_OF_USER
    if wanted.states and wanted.states <= {JobState.FAILED, JobState.INVALID, JobState.KILLED}:
        return _UNSUCCESSFUL_JOBS
    if wanted.service is not None:
        return _JOBS_OF_SERVICE
    if wanted.states == {JobState.QUEUED}:
        return _WAITING_JOBS
    return _ANY_JOBS


def _parameters_of(wanted: JobFilter) -> dict[str, Any]:
    tag = wanted.tags[0] if wanted.tags else (None, None)
    return {
        "asked": json.dumps(sorted(wanted.ids)) if wanted.ids else None,
        "user_id": wanted.user_id,
        "service": wanted.service,
        "states": json.dumps(sorted(wanted.states)) if wanted.states else None,
        "agent": wanted.agent,
        "since": wanted.since,
        "text": wanted.text,
        "tags": json.dumps(wanted.tags) if wanted.tags else None,
        "tag_key": tag[0],
        "tag_value": tag[1],
    }


def _summaries_of(db: Database, rows: Sequence[Sequence[Any]]) -> list[JobSummary]:
    tags: dict[int, list[tuple[str, str]]] = {}
    found = db.execute(
        "SELECT tag.job_id, tag.key, tag.value"
        " FROM json_each(?) AS asked JOIN tag ON tag.job_id = asked.value"
        " ORDER BY tag.job_id, tag.key",
        (json.dumps([row[0] for row in rows]),),
    )
    for job_id, key, value in found:
        tags.setdefault(job_id, []).append((key, value))
    return [_summary_of(row, tuple(tags.get(row[0], ()))) for row in rows]


def _summary_of(row: Sequence[Any], tags: tuple[tuple[str, str], ...]) -> JobSummary:
    outcome = None if row[13] is None else stored_state(row[13])
    needed = Resources(*row[18:])
    return JobSummary(
        *(row[0], stored_state(row[1]), *row[2:13], outcome, *row[14:18], tags, needed)
    )


def job_details(db: Database, job_id: int) -> JobDetails | None:
    """Return all about one job, None if there is none."""
    parameters = _parameters_of(JobFilter())
    rows = db.execute(_MATCHING_JOBS, {**parameters, "ids": f"[{job_id}]", "limit": 1}).fetchall()
    if not rows:
        return None
    files = db.execute(
        "SELECT name, size, sha256 FROM input_file WHERE job_id = ? ORDER BY position", (job_id,)
    )
    result = db.execute(
        "SELECT blob.id, blob.size, blob.sha256 FROM job"
        " JOIN attempt ON attempt.id = job.attempt_id JOIN blob ON blob.id = attempt.result_blob"
        " WHERE job.id = ? AND blob.state = 'sealed'",
        (job_id,),
    ).fetchone()
    return JobDetails(
        _summaries_of(db, rows)[0],
        _attempts_of(db, job_id),
        tuple(FileSpec(*row) for row in files),
        None if result is None else StoredResult(*result),
    )


def _attempts_of(db: Database, job_id: int) -> tuple[AttemptRecord, ...]:
    history = [transition_of(row) for row in db.execute(HISTORY_OF_JOB, (job_id,))]
    attempts = db.execute(
        "SELECT attempt.id, number, agent.name, exit_code, cpu_seconds, peak_memory, wall_seconds"
        " FROM attempt JOIN agent ON agent.id = attempt.agent_id WHERE job_id = ? ORDER BY number",
        (job_id,),
    )
    return tuple(
        _attempt_record(row, [line for line in history if line.attempt == row[1]])
        for row in attempts
    )


def _attempt_record(row: Sequence[Any], history: Sequence[Transition]) -> AttemptRecord:
    """Tell an attempt from its lines of the history, of which those after its end may be many."""
    reached = {line.after: line.at for line in history}
    end = next((line for line in history if line.after not in ACTIVE_STATES), None)
    attempt_id, number, agent, exit_code, *usage = row
    return AttemptRecord(
        id=attempt_id,
        number=number,
        agent=agent,
        exit_code=exit_code,
        assigned_at=reached.get(JobState.PROCESSING),
        started_at=reached.get(JobState.RUNNING),
        ended_at=None if end is None else end.at,
        outcome=None if end is None else end.after,
        message="" if end is None else end.reason,
        usage=Usage(*usage),
    )


assert {
    JobState.COMPLETED,
    JobState.FAILED,
    JobState.INVALID,
    JobState.KILLED,
} == FINAL_STATES, "the SQL above names the final states"
