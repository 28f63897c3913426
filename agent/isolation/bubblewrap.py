"""bubblewrap: a job in namespaces of its own, with a file system put together for it.

It sees what Landlock would let it read, at the same paths and read-only, but no homes at all;
of devices the harmless ones, of processes its own. Source: bwrap(1) 0.8.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator

from agent.isolation import ruleset, seccomp
from agent.isolation.base import Confinement, Enclosure
from agent.isolation.before_exec import lasting_steps
from agent.isolation.reach import OF_RUN, Reach, gpu_devices, is_within, real_paths

_PROGRAM = "bwrap"


def problem() -> str | None:
    """Say why this machine can't give it, or None if it may; only a trial shows it."""
    if shutil.which(_PROGRAM) is None:
        return f"{_PROGRAM} is not installed (package bubblewrap)"
    return None


def gaps() -> list[str]:
    """Say what stays within reach although it should not."""
    found: list[str] = []
    if ruleset.abi() < ruleset.SCOPE_ABI:
        found.append(
            "abstract sockets of other programs can be reached unless network = false"
            f" (needs Landlock ABI {ruleset.SCOPE_ABI})"
        )
    if not seccomp.is_supported():
        found.append("no system call filter: kernel keyrings")
    return found


def enclose(confinement: Confinement, reach: Reach) -> Enclosure:
    """Say how a job is started that is confined so."""
    place, isolation, user = confinement.place, confinement.isolation, confinement.user
    argv = [
        *(_PROGRAM, "--die-with-parent", "--unshare-user", "--unshare-pid", "--unshare-ipc"),
        *("--unshare-uts", "--unshare-cgroup-try", "--cap-drop", "ALL"),
        *(() if isolation.network else ("--unshare-net",)),
        *_system(reach),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--bind", str(place.temporary), "/tmp", "--bind", str(place.temporary), "/var/tmp"),
    ]
    if confinement.allotment.gpus is None or confinement.allotment.gpus:
        for device in gpu_devices():
            argv += ["--dev-bind-try", device, device]
    for path in (*OF_RUN, *real_paths(isolation.readable)):
        argv += ["--ro-bind-try", path, path]
    for path in real_paths(isolation.writable):
        argv += ["--bind", path, path]
    job = str(place.job)
    # what holds the mounts is a tmpfs, in which nothing is to be made
    argv += ["--bind", job, job, "--remount-ro", "/", "--chdir", job, "--", *confinement.argv]
    return Enclosure(
        argv=tuple(argv),
        variables={**confinement.variables, "TMPDIR": "/tmp"},
        preparation={
            "lasting": lasting_steps(network=True),
            "own": {
                "user": None if user is None else user.ids(),
                "landlock": None,  # abstract sockets are of a network namespace, and that is shared
                "network": True,
            },
        },
    )


def _system(reach: Reach) -> Iterator[str]:
    """Yield the options that bind all that is not hidden, read-only."""
    hidden = (*reach.secret, *reach.hidden, *reach.homes, "/proc")
    for path, kind in sorted(ruleset.everything_but(hidden, (), ())):
        if kind == stat.S_IFLNK:
            yield from ("--symlink", os.readlink(path), path)
        elif not is_within(path, "/tmp"):
            yield from ("--ro-bind-try", path, path)
