"""Jobs as users see them: state, details, queues, and their end by request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs import JobState
from records import (
    JobDetails,
    JobFilter,
    JobPage,
    JobRequest,
    JobStatus,
    JobTimes,
    UserQueue,
)
from storage.database import Database
from storage.file import DatabaseFile
from storage.queries import LARGEST_ID, QUEUE_POSITION, find_jobs, job_details
from storage.statuses import LatestStatuses
from storage.transitions import job_with_id, transition
from storage.uploads import request_of

POSITION_LIMIT = 10_000
"""How far :meth:`Jobs.queue_position` counts: about a millisecond."""


class Jobs:
    """Asking about jobs, and ending them."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
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
        return JobStatus(rows[0][0], JobState(rows[0][1]), rows[0][2]) if rows else None

    async def owner_of(self, job_id: int) -> int | None:
        """Return the user of a job, None if there is no such job."""
        rows = await self._file.rows("SELECT user_id FROM job WHERE id = ?", (job_id,))
        return int(rows[0][0]) if rows else None

    async def find(self, wanted: JobFilter, before: int | None, limit: int) -> JobPage:
        """Return the newest jobs of those asked for whose id is below ``before`` (None: any).

        Looks at a bounded number of jobs, so a page may hold few or none and yet have a next.
        """
        top = LARGEST_ID if before is None else before
        return await self._file.read_snapshot(lambda db: find_jobs(db, wanted, top, limit))

    async def details(self, job_id: int) -> JobDetails | None:
        """Return all that is known of a job but its history, None if there is no such job."""
        return await self._file.read_snapshot(lambda db: job_details(db, job_id))

    async def request(self, job_id: int) -> JobRequest | None:
        """Return what the submitter of a job asked for, None if there is no such job."""
        return await self._file.read(lambda db: request_of(db, job_id))

    async def queue_lengths(self) -> dict[UserQueue, int]:
        """Return how many jobs wait in each queue. Takes about 0.1 s for a million jobs."""
        rows = await self._file.rows(
            "SELECT service, user_id, count(*) FROM job WHERE state = 'Queued'"
            " GROUP BY service, user_id"
        )
        return {UserQueue(service, user_id): waiting for service, user_id, waiting in rows}

    async def queue_position(self, job_id: int) -> int | None:
        """Return a job's place in its queue, the first being 1; None if it does not wait.

        Counts up to ``POSITION_LIMIT``, which also stands for every place further back.
        """
        rows = await self._file.rows(QUEUE_POSITION, {"job": job_id, "limit": POSITION_LIMIT})
        return int(rows[0][0]) if rows else None

    async def times_of_last(self, limit: int) -> list[JobTimes]:
        """Return the times of the jobs that ended last, oldest first."""
        rows = await self._file.rows(
            """SELECT service, created_at, started_at, finished_at FROM job
               WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')
               ORDER BY changed_at DESC LIMIT ?""",
            (limit,),
        )
        return [JobTimes(*row) for row in reversed(rows)]

    async def kill(self, job_id: int, message: str) -> None:
        """End a job that has not ended. Raises :class:`IllegalTransition` if it has.

        Its attempt, if it has one, may still deliver what the job left.
        """

        def operation(db: Database) -> None:
            transition(db, job_with_id(db, job_id), JobState.KILLED, message, message)

        await self._file.write(operation)

    async def withdraw(self, job_id: int, message: str) -> bool:
        """Kill a job if it is queued; returns whether it did."""

        def operation(db: Database) -> bool:
            job = job_with_id(db, job_id)
            if job.state is not JobState.QUEUED:
                return False
            transition(db, job, JobState.KILLED, message, message)
            return True

        return await self._file.write(operation)
