"""Retention: what is old enough to lose its files, and keys that no longer count."""

from __future__ import annotations

from storage.blobs import Blobs
from storage.cleaning import clean_job
from storage.clock import SteadyClock
from storage.database import Database
from storage.file import DatabaseFile
from storage.transitions import job_of
from storage.uploads import KEY_SECONDS

_CLEAN_JOBS = 100
_FORGET_KEYS = 1000
_REMOVED = "removed by retention"


class Retention:
    """Cleaning in bounded steps; the caller repeats them. Ages are by the steady clock."""

    def __init__(self, file: DatabaseFile, blobs: Blobs, clock: SteadyClock) -> None:
        self._file = file
        self._blobs = blobs
        self._clock = clock

    async def oldest_age(self) -> float | None:
        """Return how many seconds ago the job ended that retention reaches first, None for none."""
        rows = await self._file.rows(
            "SELECT min(aged_from) FROM job"
            " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
        )
        return None if rows[0][0] is None else self._clock.now() - float(rows[0][0])

    async def clean_some(self, max_age: float) -> int:
        """Clean some jobs that ended at least ``max_age`` seconds ago, the oldest first.

        Returns how many; the caller asks again until it gets none.
        """

        def operation(db: Database) -> int:
            self._clock.save(db)
            rows = db.execute(
                "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
                " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
                " AND aged_from <= steady_now() - ? ORDER BY aged_from LIMIT ?",
                (max_age, _CLEAN_JOBS),
            ).fetchall()
            for row in rows:
                clean_job(db, job_of(row), _REMOVED)
            return len(rows)

        cleaned = await self._file.write(operation)
        self._blobs.to_erase.set()
        return cleaned

    async def forget_old_keys(self) -> int:
        """Remove some idempotency keys that no longer count; returns how many, to be repeated."""
        return await self._file.write(
            lambda db: (
                db.execute(
                    "DELETE FROM idempotency WHERE (user_id, key) IN"
                    " (SELECT user_id, key FROM idempotency WHERE created_at <= steady_now() - ?"
                    " ORDER BY created_at LIMIT ?)",
                    (KEY_SECONDS, _FORGET_KEYS),
                ).rowcount
            )
        )
