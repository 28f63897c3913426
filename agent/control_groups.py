"""Control groups for jobs, where the agent was given a place to make them.

That is so where it was started in a group of its own below one that was delegated to it, and that
holds no process: a unit of systemd with ``Delegate=yes`` and ``DelegateSubgroup=``. In the
delegated group itself systemd may have to start the next process of the unit, which the kernel
forbids once groups for jobs are there. Only version 2 is used (cgroups(7)).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from telemetry.logs import event

log = logging.getLogger("orchestrator.control_groups")

_FLAGS = ("trusted.delegate", "user.delegate")  # systemd.resource-control(5), Delegate=


@dataclass(frozen=True, slots=True)
class Delegated:
    """A group ``top`` in which the agent may make others, and its ``own`` one there."""

    top: Path
    own: Path

    def make(self, name: str, memory_bytes: int) -> tuple[str, str] | None:
        """Make the group of a job; returns what its supervisor must know of it.

        None if it can't be made: the supervisor looks at the memory in any case.
        """
        path = self._path_of(name)
        try:
            path.mkdir(exist_ok=True)
            (path / "memory.max").write_text(str(memory_bytes), encoding="ascii")
            (path / "memory.oom.group").write_text("1", encoding="ascii")
            with suppress(FileNotFoundError):  # a kernel without swap
                (path / "memory.swap.max").write_text("0", encoding="ascii")
        except OSError as error:
            event(log, "not_made", level=logging.WARNING, path=path, error=str(error))
            return None
        return str(path), str(self.own)

    def remove(self, name: str) -> None:
        """Remove the group of a job whose supervisor did not."""
        with suppress(OSError):
            self._path_of(name).rmdir()

    def remove_unused(self) -> None:
        """Remove the groups of jobs that have ended while nobody was there to do it."""
        for path in self.top.glob(f"{self._path_of('*').name}"):
            with suppress(OSError):  # there is a process in it
                path.rmdir()

    def _path_of(self, name: str) -> Path:
        return self.top / f"{self.own.name}-job-{name}"


def delegated(mounts: Path, membership: Path) -> Delegated | None:
    """Return the group that was delegated to this process, if one was and memory is counted there.

    ``mounts`` is proc_pid_mountinfo(5), ``membership`` the file ``cgroup`` beside it.
    """
    own = _own_group(mounts, membership)
    if own is None:
        return None
    top = own.parent
    try:
        if not _is_delegated(top) or (top / "cgroup.procs").read_text(encoding="ascii"):
            return None
        if "memory" not in (top / "cgroup.controllers").read_text(encoding="ascii").split():
            return None
        (top / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
    except OSError as error:
        event(log, "not_usable", level=logging.WARNING, path=top, error=str(error))
        return None
    event(log, "delegated", path=top)
    return Delegated(top, own)


def _own_group(mounts: Path, membership: Path) -> Path | None:
    """Return the group of this process, None if it is the highest that is to be seen."""
    point = _mount_point(mounts.read_text(encoding="utf-8").splitlines())
    for line in membership.read_text(encoding="utf-8").splitlines():
        if point is not None and line.startswith("0::/") and line != "0::/":
            return point / line.removeprefix("0::/")
    return None


def _mount_point(lines: Iterable[str]) -> Path | None:
    for line in lines:
        place, _, source = line.partition(" - ")
        if source.startswith("cgroup2 "):
            return Path(place.split(" ")[4])
    return None


def _is_delegated(top: Path) -> bool:
    """Whether it was given away: by its owner, or by the mark of systemd, where we are root."""
    if os.geteuid() != 0:
        return os.access(top, os.W_OK)
    for flag in _FLAGS:
        with suppress(OSError):
            if os.getxattr(top, flag) == b"1":
                return True
    return False
