"""Incarnations: the lives of a database, one for each start of a server on it.

An id of an attempt means one attempt only together with its incarnation. A database that was
restored from a backup, or copied, gives out ids a second time, but the next start begins another
incarnation, however the file came where it is.
"""

from __future__ import annotations

import bisect
import secrets

from storage.database import Database
from storage.file import DatabaseFile

_MAX_LEAP = 1_000_000
"""How far ids go on above those that were given out: nobody may use them up by a claim."""


class Incarnations:
    """Which incarnation an attempt belongs to."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file
        self._firsts: list[int] = []
        self._names: list[str] = []

    @property
    def current(self) -> str:
        """The incarnation of what is assigned from now on."""
        return self._names[-1]

    def of(self, attempt_id: int) -> str:
        """Return the incarnation in which an attempt was made; empty if before there were any."""
        index = bisect.bisect_right(self._firsts, attempt_id) - 1
        return self._names[index] if index >= 0 else ""

    def begin(self, db: Database) -> None:
        """For the start: begin another incarnation."""
        # one in which no attempt was made is replaced
        db.execute(
            "INSERT OR REPLACE INTO incarnation (first_attempt, name)"
            " SELECT coalesce(max(seq), 0) + 1, ? FROM sqlite_sequence WHERE name = 'attempt'",
            (secrets.token_hex(8),),
        )
        rows = db.execute("SELECT first_attempt, name FROM incarnation ORDER BY first_attempt")
        for first, name in rows:
            self._firsts.append(first)
            self._names.append(name)

    async def skip_ids(self, attempt_id: int, job_id: int) -> None:
        """Have ids go on above those that an agent knows, of attempts and jobs."""

        def operation(db: Database) -> None:
            for table, known in (("attempt", attempt_id), ("job", job_id)):
                db.execute(
                    "INSERT INTO sqlite_sequence (name, seq) SELECT ?1, 0 WHERE NOT EXISTS"
                    " (SELECT 1 FROM sqlite_sequence WHERE name = ?1)",
                    (table,),
                )
                db.execute(
                    "UPDATE sqlite_sequence SET seq = ?2"
                    " WHERE name = ?1 AND seq < ?2 AND ?2 <= seq + ?3",
                    (table, known, _MAX_LEAP),
                )

        await self._file.write(operation)
