"""What jobs must not see on this machine, and what they need to run at all.

There are two grades. What is *secret* (the agent's work directory with all other jobs, the
server's database, the token) no setting shows. What is *hidden* (homes, temporary directories,
devices) a service may list as ``readable`` or ``writable``.
"""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.isolation.base import CannotIsolate, JobUser
from jobs import Isolation

SHARED_MEMORY = "/dev/shm"

SOFTWARE = (
    *(".local/bin", ".local/lib", ".local/share/uv", ".local/share/mamba", ".conda", ".mamba"),
    *(".miniconda3", ".miniforge3", ".micromamba", ".pyenv", ".rbenv", ".nvm", ".asdf", ".sdkman"),
    *(".cargo/bin", ".rustup", ".juliaup", ".julia", ".R", ".spack", ".modulerc"),
)
"""What of a home's names with a dot holds programs, and not secrets."""

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts")
_GPU_DIRECTORIES = ("dri", "kfd", "dxg", "infiniband")
_ALWAYS_HIDDEN = (
    *("/tmp", "/var/tmp", "/dev", "/home", "/root"),
    "/run",
)
OF_RUN = (
    *("/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"),
    *("/run/nscd", "/run/current-system", "/run/opengl-driver"),
)
"""What of /run a job needs: how names are looked up, and where NixOS has its programs."""

_NEEDED = ("/usr", "/etc", "/proc", "/dev")
_FIRST_PERSON = 1000  # from here on, accounts are people's


@dataclass(frozen=True, slots=True)
class Reach:
    """What is out of reach on this machine: absolute paths without links.

    ``homes`` are hidden but for what has no dot in front and :data:`SOFTWARE`.
    """

    secret: tuple[str, ...]
    hidden: tuple[str, ...]
    homes: tuple[str, ...]

    def problem_with(self, isolation: Isolation) -> str | None:
        """Say why what a service lists can't be granted, or None if it can."""
        for name, paths in (("readable", isolation.readable), ("writable", isolation.writable)):
            for path in paths:
                real = os.path.realpath(path)
                if not os.path.exists(real):
                    return f"{path}, which its jobs are to find {name}, is not there"
                for secret in self.secret:
                    if is_within(secret, real) or is_within(real, secret):
                        return f"{path} can't be {name}: it would show {secret} to its jobs"
        return None


def survey(workdir: Path, secrets: Iterable[Path], user: JobUser | None) -> Reach:
    """Look at this machine. ``secrets`` are files that no job may see.

    Raises :class:`CannotIsolate` if the work directory is where it can't be hidden.
    """
    secret = [os.path.realpath(path) for path in (workdir, *secrets)]
    if problem := _problem_with_workdir(secret[0]):
        raise CannotIsolate(problem)
    mounts = _mounts()
    secret = _with_aliases(secret, mounts)
    own = user.home if user is not None else os.path.expanduser("~")
    homes = [] if own is None else [os.path.realpath(own)]
    homes = [
        home
        for home in homes
        if os.path.isdir(home)
        and not any(is_within(needed, home) for needed in _NEEDED)
        and not any(is_within(home, path) for path in secret)
    ]
    others = (*_ALWAYS_HIDDEN, *_homes_of_people(), os.path.expanduser("~"))
    hidden = {os.path.realpath(path) for path in others}
    # an unusual account must not hide the system from all jobs
    hidden = {path for path in hidden if not any(is_within(n, path) for n in _NEEDED[:3])}
    concealed = _with_aliases([path for path in sorted(hidden) if path not in homes], mounts)
    return Reach(tuple(secret), tuple(concealed), tuple(homes))


def is_within(path: str, directory: str) -> bool:
    """Whether a path is a directory or lies in it."""
    return path == directory or path.startswith(f"{directory.rstrip('/')}/")


def devices() -> list[str]:
    """Return the devices that every job may use."""
    return [f"/dev/{name}" for name in _DEVICES]


def gpu_devices() -> list[str]:
    """Return the devices of GPUs, and of the networks between them."""
    found = [f"/dev/{name}" for name in _GPU_DIRECTORIES if os.path.exists(f"/dev/{name}")]
    if os.path.exists("/dev/nvidiactl"):  # else the listing, at each job, is spared
        found += sorted(str(path) for path in Path("/dev").glob("nvidia*"))
    return found


def real_paths(paths: Sequence[str]) -> list[str]:
    """Return the paths without links in them."""
    return [os.path.realpath(path) for path in paths]


def _problem_with_workdir(workdir: str) -> str | None:
    bash = os.path.realpath(shutil.which("bash") or "/bin/bash")
    if any(is_within(needed, workdir) for needed in (*_NEEDED, bash)):
        return (
            f"the work directory {workdir} holds what jobs need to run, so it can't be hidden from"
            " them: choose another place with --workdir"
        )
    if any(is_within(workdir, place) for place in ("/dev", "/proc", "/sys")):
        return (
            f"the work directory {workdir} can't be hidden from jobs, which need that file system:"
            " choose another place with --workdir"
        )
    return None


def _homes_of_people() -> list[str]:
    return [
        account.pw_dir
        for account in pwd.getpwall()
        if account.pw_uid >= _FIRST_PERSON and account.pw_dir.count("/") > 1
    ]


# --- the same place under another name --------------------------------------------


@dataclass(frozen=True, slots=True)
class _Mount:
    device: str
    root: str
    point: str


def _mounts() -> list[_Mount]:
    """Read proc_pid_mountinfo(5)."""
    found: list[_Mount] = []
    text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    for line in text.splitlines():
        _, _, device, root, point, *_ = line.split(" ")
        found.append(_Mount(device, _unescaped(root), _unescaped(point)))
    return found


def _unescaped(text: str) -> str:
    return (
        text.encode("utf-8", "surrogateescape")
        .decode("unicode_escape")
        .encode("latin-1")
        .decode("utf-8", "surrogateescape")
    )


def _with_aliases(paths: Sequence[str], mounts: Sequence[_Mount]) -> list[str]:
    """Return the paths, and where a bind mount shows the same, or a part of it, once more."""
    found = list(paths)
    for path in paths:
        above = [mount for mount in mounts if is_within(path, mount.point)]
        if not above:
            continue
        own = max(reversed(above), key=lambda mount: len(mount.point))
        inner = _joined(own.root, path[len(own.point.rstrip("/")) :])
        for mount in mounts:
            if mount.device != own.device or mount == own:
                continue
            if is_within(inner, mount.root):
                found.append(_joined(mount.point, inner[len(mount.root.rstrip("/")) :]))
            elif is_within(mount.root, inner):
                found.append(mount.point)
    return list(dict.fromkeys(found))


def _joined(top: str, rest: str) -> str:
    return f"{top.rstrip('/')}{rest}" or "/"
