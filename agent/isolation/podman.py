"""podman: a job in a container of its service's image, with the job's directory in it.

The process tree is podman, conmon and the container, all below the job's supervisor, which
ends them as it ends any job. What podman has written down about the container outlives them, so
:func:`sweep` removes it. Source: podman-run(1) 4.3.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.isolation.base import Confinement, Enclosure, Place
from agent.isolation.reach import gpu_devices
from runtime import CONTAINER_VARIABLES

_PROGRAM = "podman"
_LABEL = "orchestrator.agent"
_MAX_FILES, _MAX_PROCESSES = 1_048_576, 32_768  # what podman allows itself


def problem() -> str | None:
    """Say why this machine can't give it, or None if it may; only a trial of an image shows it."""
    if shutil.which(_PROGRAM) is None:
        return f"{_PROGRAM} is not installed"
    return None


def gaps() -> list[str]:
    """Say what stays within reach although it should not."""
    return []


@dataclass(frozen=True, slots=True)
class Way:
    """How podman works on a machine: with which runtime (None: its own choice), with limits or not.

    Limits of memory and processors need control groups that its user may use.
    """

    runtime: str | None = None
    has_limits: bool = True


WAYS = (Way(), Way("crun"), Way("runc"), *(Way(name, False) for name in (None, "crun", "runc")))
"""In the order in which they are tried."""


def enclose(confinement: Confinement, way: Way) -> Enclosure:
    """Say how a job is started in a container."""
    place, isolation, user = confinement.place, confinement.isolation, confinement.user
    allotment, job = confinement.allotment, str(place.job)
    variables = {**confinement.variables, "TMPDIR": "/tmp"}
    argv = [
        *(
            _PROGRAM,
            "--log-level=error",
            *(() if way.runtime is None else ("--runtime", way.runtime)),
        ),
        *("run", "--rm", "--read-only", "--pull=never"),
        # the name is this attempt's alone: what has it was left by a trial, or by a start in vain
        *("--replace", "--name", container_name(place)),
        *("--label", f"{_LABEL}={_workdir_digest(place.attempt.parent)}"),
        *("--user", "0:0" if user is None else f"{user.uid}:{user.gid}"),
        *("--cap-drop=all", "--security-opt=no-new-privileges", "--security-opt=label=disable"),
        *("--log-driver=none", "--entrypoint=", "--workdir", job),
        *(() if isolation.network else ("--network=none",)),
        *_limits(),
        *_bind(job, job),
        *_bind(str(place.temporary), "/tmp"),
    ]
    if allotment.cpus is not None and way.has_limits:
        argv.append(f"--cpus={allotment.cpus}")
    if allotment.memory is not None and way.has_limits:
        argv.append(f"--memory={allotment.memory}")
    if allotment.gpus:
        argv += [f"--device={device}" for device in gpu_devices()]
    for path in isolation.readable:
        argv += _bind(path, path, "ro")
    for path in isolation.writable:
        argv += _bind(path, path)
    for name in variables:
        argv += ["--env", name]  # the value is taken from podman's own environment
    assert isolation.image is not None
    return Enclosure(
        argv=(*argv, isolation.image, *confinement.argv),
        variables={**own_variables(os.environ), **variables},
    )


def container_name(place: Place) -> str:
    """Return the name of an attempt's container, which no other attempt on this machine has."""
    digest = _workdir_digest(place.attempt.parent)
    return f"orchestrator-{digest}-{place.attempt.name}"


def own_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of the agent's environment podman needs."""
    names = ("HOME", "TMPDIR", *CONTAINER_VARIABLES)
    return {name: environment[name] for name in names if name in environment}


def removal(name: str) -> list[str]:
    """Return the command that ends and removes a container, if it is there."""
    return [_PROGRAM, "--log-level=error", "rm", "--force", "--ignore", "--time=0", name]


def listing(attempts: Path) -> list[str]:
    """Return the command that prints the names of the containers of a work directory."""
    mark = f"label={_LABEL}={_workdir_digest(attempts)}"
    return [_PROGRAM, "ps", "--all", "--filter", mark, "--format", "{{.Names}}"]


def _workdir_digest(attempts: Path) -> str:
    return hashlib.sha256(os.fsencode(attempts)).hexdigest()[:12]


def _bind(source: str, target: str, *options: str) -> list[str]:
    return ["--mount", ",".join(("type=bind", f"src={source}", f"dst={target}", *options))]


def _limits() -> list[str]:
    """Keep the limits that there are: podman would raise them, which not everybody may."""
    found: list[str] = []
    for name, number, most in (
        ("nofile", resource.RLIMIT_NOFILE, _MAX_FILES),
        ("nproc", resource.RLIMIT_NPROC, _MAX_PROCESSES),
    ):
        soft, hard = (
            most if limit == resource.RLIM_INFINITY else min(limit, most)
            for limit in resource.getrlimit(number)
        )
        found.append(f"--ulimit={name}={soft}:{hard}")
    return found
