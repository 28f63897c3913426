"""What a supervisor leaves in an attempt's directory, whoever started it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from agent.outcomes import Exit, ExitKind


def exit_record(attempt: Path) -> Exit | None:
    """Return how the job ended; None if the supervisor has not said so."""
    try:
        record = json.loads((attempt / "exit").read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    return Exit(ExitKind(record["kind"]), record.get("code", 0))


def supervisor_errors(attempt: Path) -> str:
    """Return the end of what a failing supervisor wrote, as one line."""
    with suppress(OSError):
        text = (attempt / "supervisor.log").read_text(encoding="utf-8", errors="replace")
        return " ".join(text.split())[-300:]
    return ""
