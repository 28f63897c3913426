"""Landlock: a job gives up, before it runs, what it may not reach. No other file system, no root.

What the kernel's version of Landlock lacks, and what no version has, is said by :func:`gaps`.
"""

from __future__ import annotations

import functools
import json
import os

from agent.isolation import ruleset, seccomp
from agent.isolation.base import Confinement, Enclosure
from agent.isolation.before_exec import lasting_steps
from agent.isolation.reach import (
    OF_RUN,
    SHARED_MEMORY,
    SOFTWARE,
    Reach,
    devices,
    gpu_devices,
    real_paths,
)

_LACKING = (
    (ruleset.REFER_ABI, "files can't be renamed from one directory to another"),
    (ruleset.TRUNCATE_ABI, "files of the agent's user that are named can be truncated"),
    (ruleset.IOCTL_ABI, "ioctl on devices is not restricted"),
    (ruleset.SCOPE_ABI, "processes of the agent's user can be sent signals"),
    (ruleset.SCOPE_ABI, "abstract sockets of other programs can be reached"),
)


def problem() -> str | None:
    """Say why this machine can't give it, or None if it can."""
    if ruleset.abi() == 0:
        return "the kernel has no Landlock, or it is turned off (security/landlock, lsm=)"
    return None


def gaps() -> list[str]:
    """Say what stays within reach although it should not."""
    version = ruleset.abi()
    found = [f"{text} (needs Landlock ABI {needed})" for needed, text in _LACKING]
    found = [text for text, (needed, _) in zip(found, _LACKING, strict=True) if version < needed]
    if not seccomp.is_supported():
        found.append("no system call filter: kernel keyrings, limits of other processes")
    found.append("modes and times of files that the job's user owns can be changed")
    found.append(f"files in {SHARED_MEMORY} can be opened by those who know their names")
    return found + [f"the socket {path} can be reached" for path in _open_sockets()]


def can_take_network() -> bool:
    """Whether ``network = false`` holds: TCP by Landlock, the rest by the filter."""
    return ruleset.abi() >= ruleset.NETWORK_ABI and seccomp.is_supported()


def enclose(confinement: Confinement, reach: Reach) -> Enclosure:
    """Say how a job is started that is confined so."""
    place, isolation = confinement.place, confinement.isolation
    gpus = confinement.allotment.gpus
    policy = {
        "standing": _standing(
            reach,
            tuple(real_paths(isolation.readable)),
            tuple(gpu_devices() if gpus is None or gpus else ()),
        ),
        "writable": [*real_paths(isolation.writable), str(place.job), str(place.temporary)],
        "logs": [str(log) for log in place.logs],
    }
    user = confinement.user
    return Enclosure(
        argv=confinement.argv,
        variables={**confinement.variables, "TMPDIR": str(place.temporary)},
        preparation={
            "lasting": lasting_steps(isolation.network),
            "own": {
                "user": None if user is None else user.ids(),
                "landlock": policy,
                "network": isolation.network,
            },
        },
    )


@functools.lru_cache(maxsize=64)
def _standing(reach: Reach, readable: tuple[str, ...], gpus: tuple[str, ...]) -> str:
    """Return what all jobs of a service may reach, as :func:`ruleset.restrict` takes it."""
    return json.dumps(
        {
            "hidden": [*reach.secret, *reach.hidden],
            "homes": reach.homes,
            "software": SOFTWARE,
            "readable": [*OF_RUN, *readable],
            "shared_memory": [SHARED_MEMORY],
            "devices": [*devices(), *gpus],
        }
    )


def _open_sockets() -> list[str]:
    """Return sockets through which a program of this user can have others act for it."""
    runtime = f"/run/user/{os.geteuid()}"
    known = (
        *(f"{runtime}/systemd/private", f"{runtime}/bus", f"{runtime}/podman/podman.sock"),
        *("/run/docker.sock", "/run/podman/podman.sock", "/run/containerd/containerd.sock"),
    )
    return [path for path in known if os.access(path, os.W_OK)]
