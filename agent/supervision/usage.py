"""What a job uses of the machine, and whether that is too much."""

import resource
import time

from agent.supervision import processes

_MEMORY_LOOK_SECONDS, _LONGEST_LOOK_SECONDS = 1.0, 16.0


class Usage:
    """What a job uses: CPU time, memory, time.

    CPU time is that of all processes that were waited for, by their parents or by this process,
    to which orphans come; only that of children of a parent that ignores SIGCHLD is missing. Memory
    is the most that was seen in use at once, and at least what the largest process had.
    """

    def __init__(self, memory_limit: int | None) -> None:
        self._limit = memory_limit
        self._started_at = time.monotonic()
        self._cpu_seconds = 0.0
        self._peak_memory = 0
        self._pause = _MEMORY_LOOK_SECONDS
        self._next_look = self._started_at + self._pause

    def add(self, spent: resource.struct_rusage) -> None:
        """Count a process that has ended, with those that it had waited for."""
        self._cpu_seconds += spent.ru_utime + spent.ru_stime
        self._peak_memory = max(self._peak_memory, spent.ru_maxrss * 1024)

    def until_next_look(self) -> float:
        """Return in how many seconds the memory should be looked at."""
        return max(0.0, self._next_look - time.monotonic())

    def look(self) -> int | None:
        """Look at the memory in use; returns how many bytes it is if that is over the limit."""
        if self._limit is None:
            # seldom for a job that runs long: nothing depends on it
            self._pause = min(2 * self._pause, _LONGEST_LOOK_SECONDS)
        pids = processes.tree()
        used = sum(map(processes.resident, pids))
        if self._limit is not None and used > self._limit:
            used = sum(map(processes.proportional, pids))  # what they share counts once
        self._peak_memory = max(self._peak_memory, used)
        self._next_look = time.monotonic() + self._pause
        return used if self._limit is not None and used > self._limit else None

    def record(self) -> dict[str, object]:
        """Return what is known at the end."""
        return {
            "cpu_seconds": round(self._cpu_seconds, 3),
            "peak_memory": self._peak_memory,
            "wall_seconds": round(time.monotonic() - self._started_at, 3),
        }
