"""Backup: a whole, checked copy of a database, also while a server runs on it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TypeAlias

from records import StoreError, StoreRefused
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
            with closing(sqlite3.connect(unfinished)) as copy:
                source.backup(
                    copy,
                    pages=_BACKUP_PAGES,
                    progress=lambda _, left, total: progress(total - left, total),
                )
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


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
