"""Runs a program of the project with a fault built in: ``sabotage.py PLAN PROGRAM ARGUMENTS…``.

The faults are put in from outside, by replacing what the program takes from the standard
library, so that the program itself has no code for tests. PLAN is JSON:

``kill``: ``{"statement": REGEX, "moment": "after" or "committed", "count": N}`` ends the
process with SIGKILL at the Nth SQL statement that matches: right after it, within its
transaction, or right after the commit that follows, when nobody has been told of it yet.

``clock``: path of a file with a number of seconds by which the wall clock is wrong. It is
read at each look at the clock, so the clock jumps when the file changes.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sqlite3
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent.parent


def through(plan: dict[str, object]) -> tuple[str, ...]:
    """Return what to put between ``python`` and the program."""
    return (__file__, json.dumps(plan))


def _kill_at(statement: str, moment: str, count: int) -> None:
    wanted = re.compile(statement)
    left = count

    class Connection(sqlite3.Connection):
        """SQLite's connection, which counts statements."""

        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            cursor = super().execute(sql, *parameters)
            _after(sql)
            return cursor

        def executemany(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:
            cursor = super().executemany(sql, rows)
            _after(sql)
            return cursor

    def _after(sql: str) -> None:
        nonlocal left
        left -= bool(wanted.search(sql))
        if left <= 0 and (moment == "after" or sql == "COMMIT"):
            os.kill(os.getpid(), signal.SIGKILL)

    sqlite3.Connection = Connection  # type: ignore[misc]


def _set_clock_by(path: str) -> None:
    true_time = time.time
    time.time = lambda: true_time() + float(Path(path).read_text())


def main() -> None:
    """Build the faults in and become the program."""
    plan = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(PROJECT)
    if "kill" in plan:
        _kill_at(**plan["kill"])
    if "clock" in plan:
        _set_clock_by(plan["clock"])
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
