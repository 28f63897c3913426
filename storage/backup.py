"""Backup: a whole, checked copy of a database, also while a server runs on it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TypeAlias

from records import StoreError, StoreRefused, digest_of
from storage.database import opened_by_command
from storage.schema import demand_ours

Progress: TypeAlias = Callable[[int, int], None]
"""Told how much is done, of how much in all."""


_BACKUP_PAGES = 512


def back_up(path: str, target: str, progress: Progress) -> None:
    """Copy the database to ``target``, whole and checked, also while a server runs on it.

    Raises :class:`StoreRefused` if there is no database, or something at ``target`` already,
    and :class:`StoreError` if the copy could not be made or is damaged.
    """
    if os.path.exists(target):
        raise StoreRefused(f"{target}: already exists; choose another name")
    if not os.access(os.path.dirname(os.path.abspath(target)), os.W_OK | os.X_OK):
        raise StoreRefused(f"{target}: its directory is not there, or can't be written to")
    unfinished = f"{target}.unfinished"
    try:
        with opened_by_command(path) as source:
            # A read transaction of the source's own pins one snapshot. Without it the backup
            # begins anew at every write of the server (sqlite.org/c3ref/backup_finish.html).
            source.execute("BEGIN")
            source.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            demand_ours(source, path)
            _create_private(unfinished)
            with closing(sqlite3.connect(unfinished, isolation_level=None)) as copy:
                source.backup(
                    copy,
                    pages=_BACKUP_PAGES,
                    progress=lambda _, left, total: progress(total - left, total),
                )
                _forget_agent_token(copy)
                found = copy.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if found != "ok":
            raise StoreError(f"{target}: the copy is damaged: {found}")
        _sync(unfinished)
        os.rename(unfinished, target)
    except OSError as error:
        raise StoreError(f"{target}: {error.strerror}") from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def _create_private(path: str) -> None:
    """Make an empty file that only its owner reads, before the first byte is in it."""
    with suppress(FileNotFoundError):
        os.unlink(path)  # left by a backup that was killed
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _forget_agent_token(copy: sqlite3.Connection) -> None:
    """Keep of the agent token what it takes to know it again: whoever has a backup is no agent."""
    copy.execute("PRAGMA secure_delete = ON")
    row = copy.execute("SELECT value FROM setting WHERE name = 'agent_token'").fetchone()
    if row is not None:
        copy.execute("BEGIN")
        copy.execute(
            "INSERT OR REPLACE INTO setting (name, value) VALUES ('agent_token_sha256', ?)",
            (digest_of(row[0]),),
        )
        copy.execute("DELETE FROM setting WHERE name = 'agent_token'")
        copy.execute("COMMIT")


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
