"""History: what happened to jobs and agents, append-only, and reading it in its order."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

from events import AgentChange, AgentChangeKind, Transition
from jobs import Usage
from storage.checksums import stored_state
from storage.file import DatabaseFile

_TRANSITIONS = """
    SELECT history.id, history.job_id, user_id, service, attempt, at, from_state, to_state, reason,
        cpu_seconds, peak_memory, wall_seconds
    FROM history JOIN job ON job.id = history.job_id
    LEFT JOIN attempt ON attempt.job_id = history.job_id AND attempt.number = history.attempt
        AND history.to_state IN ('Completed', 'Failed', 'Killed')"""

HISTORY_OF_JOB = _TRANSITIONS + " WHERE history.job_id = ? ORDER BY history.id"
_TRANSITIONS_BETWEEN = (
    _TRANSITIONS
    + """ WHERE history.id > ?1 AND history.id <= ?2
        AND (?3 IS NULL OR user_id = ?3) AND (?4 IS NULL OR service = ?4)
    ORDER BY history.id LIMIT ?5"""
)
_EXAMINE_TRANSITIONS = 5000


class History:
    """Reading what happened."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    async def of_job(self, job_id: int) -> list[Transition]:
        """Return all transitions of a job, oldest first; none if there is no such job."""
        return [transition_of(row) for row in await self._file.rows(HISTORY_OF_JOB, (job_id,))]

    async def transitions_after(
        self, last_id: int, limit: int, user_id: int | None = None, service: str | None = None
    ) -> tuple[list[Transition], int]:
        """Return transitions that follow one, oldest first, of a user and a service if asked for.

        Looks at a bounded number, so there may be none of those asked for though more follow:
        the second value is the id up to which it looked, ``last_id`` at the end.
        """

        def operation(db: sqlite3.Connection) -> tuple[list[Transition], int]:
            ((newest,),) = db.execute("SELECT coalesce(max(id), 0) FROM history").fetchall()
            end = max(last_id, min(last_id + _EXAMINE_TRANSITIONS, newest))
            rows = db.execute(
                _TRANSITIONS_BETWEEN, (last_id, end, user_id, service, limit)
            ).fetchall()
            found = [transition_of(row) for row in rows]
            return found, found[-1].id if len(found) == limit else end

        return await self._file.read_long(operation)

    async def agent_changes_after(self, last_id: int, limit: int) -> list[AgentChange]:
        """Return the agent changes that follow one, oldest first."""
        rows = await self._file.rows(
            "SELECT id, agent_id, name, at, kind FROM agent_history WHERE id > ?"
            " ORDER BY id LIMIT ?",
            (last_id, limit),
        )
        return [AgentChange(*(*row[:4], AgentChangeKind(row[4]))) for row in rows]

    async def last_ids(self) -> tuple[int, int]:
        """Return the ids of the last transition and the last agent change, 0 for none."""
        rows = await self._file.rows(
            "SELECT (SELECT coalesce(max(id), 0) FROM history),"
            " (SELECT coalesce(max(id), 0) FROM agent_history)"
        )
        return (rows[0][0], rows[0][1])


def transition_of(row: Sequence[Any]) -> Transition:
    """Make the record of a line of the history."""
    row_id, job_id, user_id, service, attempt, at, before, after, reason, *used = row
    return Transition(
        row_id,
        job_id,
        user_id,
        service,
        attempt,
        at,
        None if before is None else stored_state(before),
        stored_state(after),
        reason,
        usage=Usage(*used) if any(amount is not None for amount in used) else None,
    )
