"""Jobs as users see them: state, details, queues, and their end by request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from jobs import FINAL_STATES, Demand, JobState, has_ended
from records import (
    IllegalTransition,
    JobDetails,
    JobFilter,
    JobIds,
    JobPage,
    JobRequest,
    JobStatus,
    JobTimes,
    NotEnded,
    UserQueue,
)
from storage.blobs import Blobs
from storage.checksums import stored_state
from storage.cleaning import clean_job
from storage.database import Database
from storage.file import DatabaseFile
from storage.queries import (
    LARGEST_ID,
    QUEUE_POSITION,
    count_some,
    find_job_ids,
    find_jobs,
    is_counted,
    job_details,
    kept_counts,
)
from storage.statuses import LatestStatuses
from storage.transitions import demand_of, job_with_id, transition
from storage.uploads import request_of

POSITION_LIMIT = 10_000
"""How far :meth:`Jobs.queue_position` counts: about a millisecond."""


_DELETED = "deleted"


class Jobs:
    """Asking about jobs, and ending them."""

    def __init__(self, file: DatabaseFile, blobs: Blobs) -> None:
        self._file = file
        self._blobs = blobs
        self._statuses = LatestStatuses()

    def doubt(self, events: Sequence[Any]) -> None:
        """For the writer, in its thread: readers may see from now on what this tells."""
        self._statuses.doubt(events)

    def take_in(self, events: Sequence[Any]) -> None:
        """For the writer: this is committed."""
        self._statuses.take_in(events)

    async def status(self, job_id: int) -> JobStatus | None:
        """Return a job's state and message, None if there is no such job."""
        return await self._statuses.get(job_id, self._read_status)

    async def _read_status(self, job_id: int) -> JobStatus | None:
        rows = await self._file.rows("SELECT id, state, message FROM job WHERE id = ?", (job_id,))
        return JobStatus(rows[0][0], stored_state(rows[0][1]), rows[0][2]) if rows else None

    async def owner_of(self, job_id: int) -> int | None:
        """Return the user of a job, None if there is no such job."""
        rows = await self._file.rows("SELECT user_id FROM job WHERE id = ?", (job_id,))
        return int(rows[0][0]) if rows else None

    async def find(self, wanted: JobFilter, before: int | None, limit: int) -> JobPage:
        """Return the newest jobs of those asked for whose id is below ``before`` (None: any).

        Looks at a bounded number of jobs, so a page may hold few or none and yet have a next.
        """
        top = LARGEST_ID if before is None else before
        return await self._file.read_long(lambda db: find_jobs(db, wanted, top, limit))

    async def find_ids(self, wanted: JobFilter, before: int | None, limit: int) -> JobIds:
        """Return the ids of the jobs that :meth:`find` returns, for what is done to many."""
        top = LARGEST_ID if before is None else before
        return await self._file.read_long(lambda db: find_job_ids(db, wanted, top, limit))

    async def counts(self, wanted: JobFilter) -> Counter[JobState]:
        """Return how many of the jobs asked for are in each state; a state of none is not there.

        Filters other than user, service and states have jobs looked at, some at a time, each
        job once; those that change meanwhile count as they were when they were looked at.
        """
        if is_counted(wanted):
            return await self._file.read(lambda db: kept_counts(db, wanted))
        counts: Counter[JobState] = Counter()
        before: int | None = LARGEST_ID
        while before is not None:
            some, before = await self._file.read_long(
                partial(count_some, wanted=wanted, before=before)
            )
            counts += some
        return counts

    async def details(self, job_id: int) -> JobDetails | None:
        """Return all that is known of a job but its history, None if there is no such job."""
        return await self._file.read_snapshot(lambda db: job_details(db, job_id))

    async def request(self, job_id: int) -> JobRequest | None:
        """Return what the submitter of a job asked for, None if there is no such job."""
        return await self._file.read(lambda db: request_of(db, job_id))

    async def queue_lengths(self) -> dict[tuple[UserQueue, Demand], int]:
        """Return how many jobs wait in each queue, by what they demand.

        Takes about 0.1 s for a million jobs.
        """
        rows = await self._file.rows(
            "SELECT service, user_id, count(*), needed_cpus, needed_memory, needed_gpus, avoided"
            " FROM job WHERE state = 'Queued'"
            " GROUP BY service, user_id, needed_cpus, needed_memory, needed_gpus, avoided"
        )
        return {(UserQueue(row[0], row[1]), demand_of(row[3:])): row[2] for row in rows}

    async def queue_position(self, job_id: int) -> int | None:
        """Return a job's place in its queue, the first being 1; None if it does not wait.

        Counts up to ``POSITION_LIMIT``, which also stands for every place further back.
        """
        rows = await self._file.rows(QUEUE_POSITION, {"job": job_id, "limit": POSITION_LIMIT})
        return int(rows[0][0]) if rows else None

    async def times_of_last(self, limit: int) -> list[JobTimes]:
        """Return the times of the jobs that ended last, oldest first."""
        rows = await self._file.rows(
            """SELECT service, created_at, started_at, finished_at, cpu_seconds, peak_memory
               FROM job LEFT JOIN attempt ON attempt.id = job.attempt_id
               WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')
               ORDER BY aged_from DESC LIMIT ?""",
            (limit,),
        )
        return [JobTimes(*row) for row in reversed(rows)]

    async def kill(self, job_id: int, message: str) -> None:
        """End a job that has not ended. Raises :class:`IllegalTransition` if it has.

        Its attempt, if it has one, may still deliver what the job left.
        """

        def operation(db: Database) -> None:
            job = job_with_id(db, job_id)
            if job is None:
                raise IllegalTransition(f"there is no job {job_id}")
            transition(db, job, JobState.KILLED, message, message)

        await self._file.write(operation)

    async def withdraw(self, job_id: int, message: str) -> bool:
        """Kill a job if it is queued; returns whether it did."""
        return await self.withdraw_many((job_id,), message) == [job_id]

    async def withdraw_many(self, job_ids: Sequence[int], message: str) -> list[int]:
        """Kill those of some jobs that are queued, in one transaction; returns which they were."""

        def operation(db: Database) -> list[int]:
            jobs = (job_with_id(db, job_id) for job_id in job_ids)
            queued = [job for job in jobs if job is not None and job.state is JobState.QUEUED]
            for job in queued:
                transition(db, job, JobState.KILLED, message, message)
            return [job.id for job in queued]

        return await self._file.write(operation)

    async def delete(self, job_id: int) -> JobStatus | None:
        """Free the bytes of a job that has ended; it is then Cleaned and keeps its outcome.

        Returns its status, None if there is no such job. Does nothing to a job that was
        cleaned before. Raises :class:`NotEnded`.
        """

        def operation(db: Database) -> None:
            job = job_with_id(db, job_id)
            if job is not None and not has_ended(job.state):
                raise NotEnded(f"job {job_id} has not ended: terminate it first")
            if job is not None and job.state is not JobState.CLEANED:
                clean_job(db, job, _DELETED)

        await self._file.write(operation)
        self._blobs.to_erase.set()
        return await self.status(job_id)

    async def delete_many(self, job_ids: Sequence[int]) -> int:
        """Delete those of some jobs that have ended, in one transaction; returns how many."""

        def operation(db: Database) -> int:
            jobs = (job_with_id(db, job_id) for job_id in job_ids)
            ended = [job for job in jobs if job is not None and job.state in FINAL_STATES]
            for job in ended:
                clean_job(db, job, _DELETED)
            return len(ended)

        deleted = await self._file.write(operation)
        self._blobs.to_erase.set()
        return deleted
