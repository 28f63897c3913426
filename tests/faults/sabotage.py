"""Runs a program of the project with a fault built in: ``sabotage.py PLAN PROGRAM ARGUMENTS…``.

The faults are put in from outside, by replacing what the program takes from the standard
library, so that the program itself has no code for tests. PLAN is JSON:

``kill``: ``{"statement": REGEX, "moment": "after" or "committed", "count": N}`` ends the
process with SIGKILL at the Nth SQL statement that matches: right after it, within its
transaction, or right after the commit that follows, when nobody has been told of it yet.

``sync``: on SIGUSR1 every fsync(2) and fdatasync(2) of the process fails with EIO from then on.

``constants``: ``{"module.NAME": VALUE, ...}`` replaces constants of the program, for what nobody
would have a test wait for.

``clock``: path of a file with a number of seconds by which the wall clock is wrong. It is
read at each look at the clock, so the clock jumps when the file changes.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import platform
import re
import runpy
import signal
import sqlite3
import sys
import time
from collections.abc import Iterable
from ctypes import c_ubyte, c_uint, c_ushort
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


def _replace(constants: dict[str, object]) -> None:
    for path, value in constants.items():
        module, _, name = path.rpartition(".")
        found = importlib.import_module(module)
        assert hasattr(found, name), path
        setattr(found, name, value)


class _Instruction(ctypes.Structure):
    _fields_ = (("code", c_ushort), ("if_true", c_ubyte), ("if_false", c_ubyte), ("value", c_uint))


class _Filter(ctypes.Structure):
    _fields_ = (("length", c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


_SYNC_CALLS = {"x86_64": (74, 75, 317), "aarch64": (82, 83, 277)}
_NO_NEW_PRIVILEGES, _SET_FILTER, _ALL_THREADS = 38, 1, 1
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _FAIL = 0x7FFF0000, 0x00050000 | errno.EIO


def _fail_syncs(*_: object) -> None:
    """Have the kernel refuse to sync, by a filter of system calls (seccomp(2)) on all threads."""
    fsync, fdatasync, seccomp = _SYNC_CALLS[platform.machine()]
    program = (_Instruction * 5)(
        _Instruction(_LOAD, 0, 0, 0),
        _Instruction(_JUMP_IF_EQUAL, 1, 0, fsync),
        _Instruction(_JUMP_IF_EQUAL, 0, 1, fdatasync),
        _Instruction(_RETURN, 0, 0, _FAIL),
        _Instruction(_RETURN, 0, 0, _ALLOW),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    what = _Filter(len(program), program)
    if libc.syscall(seccomp, _SET_FILTER, _ALL_THREADS, ctypes.byref(what)) != 0:
        os._exit(99)


def main() -> None:
    """Build the faults in and become the program."""
    plan = json.loads(sys.argv[1])
    sys.argv = sys.argv[2:]
    sys.path[0] = str(PROJECT)
    if "kill" in plan:
        _kill_at(**plan["kill"])
    if plan.get("sync"):
        signal.signal(signal.SIGUSR1, _fail_syncs)
    if "clock" in plan:
        _set_clock_by(plan["clock"])
    _replace(plan.get("constants", {}))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
