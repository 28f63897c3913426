"""A clock that does not jump: what retention and idempotency keys are aged by.

The wall clock may be set: by a year when a battery was empty, by hours by hand. Nothing may
lose its files for that. This clock began equal to the wall clock and goes on with the time that
has passed, which the kernel counts since the machine was started. Time in which the machine was
off can't be told from a wall clock that was set meanwhile, so at most an hour of it counts:
what is cleaned later than it might be does no harm.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from storage.database import Database
from telemetry.logs import event

log = logging.getLogger("orchestrator.store")

_MAX_TIME_OFF_SECONDS = 3600.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SETTING = "steady_clock"


@dataclass(frozen=True, slots=True)
class _Reading:
    """What the clocks showed at one moment; ``uptime`` counts from the start ``boot``."""

    steady: float
    wall: float
    uptime: float
    boot: str


class SteadyClock:
    """Seconds that only ever pass."""

    def __init__(self) -> None:
        self._start = _Reading(0.0, 0.0, 0.0, "")

    def begin(self, db: Database) -> None:
        """Go on from where the database's last server was."""
        row = db.execute("SELECT value FROM setting WHERE name = ?", (_SETTING,)).fetchone()
        wall, uptime, boot = time.time(), _uptime(), _BOOT_ID.read_text().strip()
        last = None if row is None else _parsed(row[0])
        steady = wall if last is None else _advanced(last, wall, uptime, boot)
        self._start = _Reading(steady, wall, uptime, boot)
        db.create_function("steady_now", 0, self.now)
        self.save(db)

    def now(self) -> float:
        """Return the present time in seconds."""
        return self._start.steady + _uptime() - self._start.uptime

    def save(self, db: Database) -> None:
        """Write down what the clock shows, for after a restart of the machine."""
        reading = _Reading(self.now(), time.time(), _uptime(), self._start.boot)
        db.execute(
            "INSERT INTO setting (name, value) VALUES (?, ?)"
            " ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            (_SETTING, json.dumps(asdict(reading))),
        )


def _parsed(text: str) -> _Reading | None:
    try:
        fields = json.loads(text)
        steady, wall, uptime = (float(fields[name]) for name in ("steady", "wall", "uptime"))
        return _Reading(steady, wall, uptime, str(fields["boot"]))
    except (ValueError, TypeError, KeyError):
        event(log, "steady_clock_unreadable", level=logging.WARNING, set_to="wall clock")
        return None


def _advanced(last: _Reading, wall: float, uptime: float, boot: str) -> float:
    if boot == last.boot and uptime >= last.uptime:
        return last.steady + uptime - last.uptime
    return last.steady + min(max(0.0, wall - last.wall), _MAX_TIME_OFF_SECONDS)


def _uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)  # goes on while the machine sleeps
