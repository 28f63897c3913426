"""API tokens and the token of agents, for the server and for commands beside it."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from records import (
    KnownTokens,
    Role,
    StoreDamaged,
    StoreRefused,
    StoreUnavailable,
    Token,
    digest_of,
)
from storage.database import opened_by_command
from storage.file import DatabaseFile
from storage.schema import APPLICATION_ID, MIGRATIONS

_SECRET_BYTES = 32
_TOKENS_MADE = "tokens_made"  # a setting that is there from the first token on
_AGENT_TOKEN = "SELECT value FROM setting WHERE name = 'agent_token'"


class Tokens:
    """What the server asks about tokens."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    async def known(self) -> KnownTokens:
        """Return all API tokens, and whether there ever was one."""
        return await self._file.read(
            lambda db: KnownTokens(_tokens_by_digest(db), _were_tokens_made(db))
        )

    async def agent_token(self) -> str:
        """Return the token that the database was given when it was made, or restored."""
        return str((await self._file.rows(_AGENT_TOKEN))[0][0])

    async def agent_digests(self) -> frozenset[str]:
        """Return the digests of the tokens that agents may present.

        After a backup was restored that is also the one from before, of which the backup has the
        digest alone.
        """
        rows = await self._file.rows("SELECT value FROM setting WHERE name = 'agent_token_sha256'")
        return frozenset({digest_of(await self.agent_token()), *(row[0] for row in rows)})


def _tokens_by_digest(db: sqlite3.Connection) -> dict[str, Token]:
    rows = db.execute("SELECT sha256, name, role, user_id, created_at FROM token ORDER BY name")
    try:
        return {row[0]: Token(row[1], Role(row[2]), row[3], row[4]) for row in rows}
    except ValueError as error:
        raise StoreDamaged(f"a token is damaged: {error}") from None


def _were_tokens_made(db: sqlite3.Connection) -> bool:
    row = db.execute("SELECT value FROM setting WHERE name = ?", (_TOKENS_MADE,)).fetchone()
    return row is not None or db.execute("SELECT 1 FROM token").fetchone() is not None


# --- for commands, also beside a running server -----------------------------------


def new_secret() -> str:
    """Return a new secret that can't be guessed."""
    return secrets.token_urlsafe(_SECRET_BYTES)


@contextmanager
def _opened_for_tokens(path: str) -> Iterator[sqlite3.Connection]:
    with opened_by_command(path) as db:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID or version != len(MIGRATIONS):
            raise StoreRefused(f"{path}: start this version of the server on it once")
        db.execute("PRAGMA synchronous = FULL")
        yield db


def create_token(path: str, token: Token, sha256: str) -> None:
    """Store an API token by the digest of its secret. Raises :class:`StoreRefused`."""
    try:
        with _opened_for_tokens(path) as db:
            db.execute(
                "INSERT INTO token (name, sha256, user_id, role, created_at)"
                " VALUES (?, ?, ?, ?, ?)",
                (token.name, sha256, token.user_id, token.role, token.created_at),
            )
            db.execute(
                "INSERT INTO setting (name, value) VALUES (?, '1') ON CONFLICT DO NOTHING",
                (_TOKENS_MADE,),
            )
    except sqlite3.IntegrityError:
        raise StoreRefused(f"the token {token.name} already exists; revoke it first") from None


def forget_tokens(path: str) -> None:
    """Have a database be as if it had never had a token. Raises :class:`StoreRefused`."""
    with _opened_for_tokens(path) as db:
        if left := db.execute("SELECT count(*) FROM token").fetchone()[0]:
            raise StoreRefused(f"there are {left} tokens; revoke them first")
        db.execute("DELETE FROM setting WHERE name = ?", (_TOKENS_MADE,))


def list_tokens(path: str) -> list[Token]:
    """Return the API tokens of a database, by name. Raises :class:`StoreRefused`."""
    with _opened_for_tokens(path) as db:
        return list(_tokens_by_digest(db).values())


def revoke_token(path: str, name: str) -> None:
    """Remove an API token. Raises :class:`StoreRefused` if there is none of that name."""
    with _opened_for_tokens(path) as db:
        # also if it was made by a version that did not write this down
        db.execute(
            "INSERT INTO setting (name, value) VALUES (?, '1') ON CONFLICT DO NOTHING",
            (_TOKENS_MADE,),
        )
        if not db.execute("DELETE FROM token WHERE name = ?", (name,)).rowcount:
            raise StoreRefused(f"there is no token {name}")


def read_agent_token(path: str) -> str:
    """Return the agent token of the database at ``path``, also while a server runs on it.

    Raises :class:`StoreRefused` when there is no such database or no token in it.
    """
    try:
        with opened_by_command(path) as db:
            row = db.execute(_AGENT_TOKEN).fetchone()
    except StoreUnavailable as error:
        raise StoreRefused(str(error)) from None
    except sqlite3.OperationalError as error:
        raise StoreRefused(f"{path}: {error}") from None
    if row is None:
        raise StoreRefused(f"{path}: there is no agent token in it")
    return str(row[0])
