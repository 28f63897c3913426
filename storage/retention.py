"""Retention: what is old enough to lose its files, and keys that no longer count."""

from __future__ import annotations

import time
from typing import cast

from jobs import JobState
from storage.blobs import Blobs, doom_files_of_job
from storage.database import Database
from storage.file import DatabaseFile
from storage.output import doom_output
from storage.transitions import job_of, transition
from storage.uploads import KEY_SECONDS

_CLEAN_JOBS = 100
_FORGET_KEYS = 1000


class Retention:
    """Cleaning in bounded steps; the caller has the clock and repeats them."""

    def __init__(self, file: DatabaseFile, blobs: Blobs) -> None:
        self._file = file
        self._blobs = blobs

    async def oldest_final_change(self) -> float | None:
        """Return when the job that retention reaches first became final, in Unix seconds."""
        rows = await self._file.rows(
            "SELECT min(changed_at) FROM job"
            " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
        )
        return cast("float | None", rows[0][0])

    async def clean_jobs_final_since(self, cutoff: float) -> int:
        """Mark some jobs that became final before ``cutoff`` as Cleaned, and doom their bytes.

        Returns how many; the caller asks again until it gets none.
        """

        def operation(db: Database) -> int:
            rows = db.execute(
                "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
                " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
                " AND changed_at <= ? ORDER BY changed_at LIMIT ?",
                (cutoff, _CLEAN_JOBS),
            ).fetchall()
            for row in rows:
                job = job_of(row)
                doom_files_of_job(db, job.id)
                doom_output(db, job.id)
                message = f"files of the {job.state} job removed by retention"
                transition(db, job, JobState.CLEANED, "retention", message)
            return len(rows)

        cleaned = await self._file.write(operation)
        self._blobs.to_erase.set()
        return cleaned

    async def forget_old_keys(self) -> int:
        """Remove some idempotency keys that count no more; returns how many, to be repeated."""
        cutoff = time.time() - KEY_SECONDS
        return await self._file.write(
            lambda db: (
                db.execute(
                    "DELETE FROM idempotency WHERE (user_id, key) IN"
                    " (SELECT user_id, key FROM idempotency WHERE created_at <= ?"
                    " ORDER BY created_at LIMIT ?)",
                    (cutoff, _FORGET_KEYS),
                ).rowcount
            )
        )
