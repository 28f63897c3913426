"""The control group of one job, by which the kernel keeps its memory within a limit.

The agent makes it and sets the limit (``agent/control_groups.py``). Whatever is started while
the supervisor stands in it belongs to it, with all descendants. When they want more memory than
there is for them, the kernel kills all of them together. Source: cgroup-v2.rst of Linux,
"memory.oom.group".
"""

import contextlib
import os
from collections.abc import Iterator


class ControlGroup:
    """The group of a job that is about to be started, or none."""

    def __init__(self, paths: list[str] | None) -> None:
        """``paths`` are those of the job's group and of the supervisor's own; None for no group."""
        self._job, self._own = paths or ("", "")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Have what is started meanwhile belong to the group. Raises :class:`OSError`."""
        if not self._job:
            yield
            return
        _move_to(self._job)
        try:
            yield
        finally:
            _move_to(self._own)

    def was_out_of_memory(self) -> bool:
        """Whether the kernel has killed processes of it, as they wanted more than the limit."""
        if not self._job:
            return False
        with contextlib.suppress(OSError), open(f"{self._job}/memory.events", "rb") as file:
            counts = dict(line.split() for line in file.read().splitlines())
            return int(counts.get(b"oom_kill", b"0")) > 0
        return False

    def remove(self) -> None:
        """Remove it; where a process of it is left, the agent does so at its next start."""
        if self._job:
            with contextlib.suppress(OSError):
                os.rmdir(self._job)


def _move_to(group: str) -> None:
    descriptor = os.open(f"{group}/cgroup.procs", os.O_WRONLY)
    try:
        os.write(descriptor, b"0")  # the process that writes
    finally:
        os.close(descriptor)
