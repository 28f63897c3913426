"""What a supervisor leaves in an attempt's directory, whoever started it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent import plain_files
from agent.outcomes import Exit, ExitKind, JobLost
from jobs import Usage


def exit_record(attempt: Path) -> Exit | None:
    """Return how the job ended; None if the supervisor has not said so.

    Raises :class:`JobLost` if what is there is not what a supervisor writes.
    """
    try:
        record = json.loads(plain_files.read_text(attempt / "exit"))
        usage = _usage_of(record["usage"]) if "usage" in record else None
        return Exit(
            ExitKind(record["kind"]),
            record.get("code", 0),
            memory_used=record.get("used", 0),
            usage=usage,
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise JobLost(f"the record of the job's end can't be read: {error}") from None


def write_exit_record(attempt: Path, kind: ExitKind) -> None:
    """Say how the job ended in the place of a supervisor that can't."""
    plain_files.replace_text(attempt / "exit", json.dumps({"kind": kind}))


def usage_of(attempt: Path, ended: Exit) -> Usage | None:
    """Return what a job used that ended so; None if its supervisor could not say so."""
    if ended.usage is not None:
        return ended.usage
    with suppress(OSError, ValueError, KeyError, TypeError):
        # it had processes to end first, so this is a file of its own
        return _usage_of(json.loads(plain_files.read_text(attempt / "usage")))
    return None


def _usage_of(record: Mapping[str, Any]) -> Usage:
    return Usage(
        float(record["cpu_seconds"]), int(record["peak_memory"]), float(record["wall_seconds"])
    )


def supervisor_errors(attempt: Path) -> str:
    """Return the end of what a failing supervisor wrote, as one line."""
    with suppress(OSError):
        text = plain_files.read_text(attempt / "supervisor.log")
        return " ".join(text.split())[-300:]
    return ""
