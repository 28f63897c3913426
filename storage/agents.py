"""Agents: who connected, who is drained, and what happened to them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import cast

from events import AgentChange, AgentChangeKind
from records import KnownAgent, digest_of
from storage.database import Database
from storage.file import DatabaseFile


class Agents:
    """What is stored of the agents."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    async def record_connection(self, agent_id: str, name: str, secret: str | None = None) -> bool:
        """Remember an agent's name, and that it connected with a secret (None: it has none).

        Returns False, and changes nothing, if the id first came with another secret.
        """
        now = time.time()
        digest = None if secret is None else digest_of(secret)

        def operation(db: Database) -> bool:
            known = db.execute(
                "SELECT secret_sha256 FROM agent WHERE id = ?", (agent_id,)
            ).fetchone()
            if known is not None and known[0] not in (None, digest):
                return False
            db.execute(
                "INSERT INTO agent (id, name, seen_at, secret_sha256) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (id) DO UPDATE SET name = excluded.name, away_seconds = 0,"
                " seen_at = excluded.seen_at, secret_sha256 = excluded.secret_sha256",
                (agent_id, name, now, digest),
            )
            _write_change(db, agent_id, name, AgentChangeKind.CONNECTED)
            return True

        return await self._file.write(operation)

    async def is_secret_of(self, agent_id: str, secret: str | None) -> bool:
        """Say whether an agent that shows this secret may have the id: it is new, or its own."""
        rows = await self._file.rows("SELECT secret_sha256 FROM agent WHERE id = ?", (agent_id,))
        return not rows or rows[0][0] in (None, None if secret is None else digest_of(secret))

    async def record_absences(self, seconds: Mapping[str, float]) -> None:
        """Remember for how long agents have been away, by their ids."""
        rows = [(away, agent_id) for agent_id, away in seconds.items()]
        await self._file.write(
            lambda db: db.executemany("UPDATE agent SET away_seconds = ? WHERE id = ?", rows)
        )

    async def absences(self) -> dict[str, float]:
        """Return for how long agents had been away, by their ids, when that was last recorded."""
        rows = await self._file.rows("SELECT id, away_seconds FROM agent WHERE away_seconds > 0")
        return dict(rows)

    async def record_change(self, agent_id: str, name: str, kind: AgentChangeKind) -> None:
        """Write down what happened to an agent, if it has ever connected."""

        def operation(db: Database) -> None:
            if db.execute("SELECT 1 FROM agent WHERE id = ?", (agent_id,)).fetchone():
                _write_change(db, agent_id, name, kind)

        await self._file.write(operation)

    async def drained(self) -> list[KnownAgent]:
        """Return the agents that get no jobs because an operator said so."""
        rows = await self._file.rows("SELECT id, name FROM agent WHERE is_drained")
        return [KnownAgent(*row) for row in rows]

    async def set_drained(self, name: str, is_drained: bool) -> list[KnownAgent]:
        """Let the agents of this name or id get no jobs, or get them again.

        Returns all of them, the one that connected last first.
        """
        kind = AgentChangeKind.DRAINING if is_drained else AgentChangeKind.RESUMED

        def operation(db: Database) -> list[KnownAgent]:
            rows = db.execute(
                "SELECT id, name, is_drained FROM agent WHERE id = ?1 OR name = ?1"
                " ORDER BY seen_at DESC",
                (name,),
            ).fetchall()
            for agent_id, agent_name, was_drained in rows:
                if bool(was_drained) is not is_drained:
                    db.execute(
                        "UPDATE agent SET is_drained = ? WHERE id = ?", (is_drained, agent_id)
                    )
                    _write_change(db, agent_id, agent_name, kind)
            return [KnownAgent(row[0], row[1]) for row in rows]

        return await self._file.write(operation)


def _write_change(db: Database, agent_id: str, name: str, kind: AgentChangeKind) -> None:
    """Write one line of the agents' history, to be published with the commit."""
    at = time.time()
    row_id = db.execute(
        "INSERT INTO agent_history (agent_id, name, at, kind) VALUES (?, ?, ?, ?)",
        (agent_id, name, at, kind),
    ).lastrowid
    db.announce(AgentChange(cast(int, row_id), agent_id, name, at, kind))
