"""What every program of ours does to its own process: where it lies, what it hands on, its loop."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import os
import resource
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")

PASSED_VARIABLES = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "MODULEPATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    ]
)
PASSED_PREFIXES = ("LC_",)

CONTAINER_VARIABLES = (
    *("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS"),
    *("CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF", "CONTAINERS_REGISTRIES_CONF"),
)
"""Where an agent's podman finds its images and settings; no job sees them."""

_APPLICATION = Path(__file__).parent
"""The folder that holds the program, in a clone as where pip has put it."""


def data_file(name: str) -> Path:
    """Return a file that ships with the program, by its path from the program's folder."""
    return _APPLICATION / name


def program(*arguments: str) -> list[str]:
    """Return the command that runs this program again, with other arguments."""
    return [sys.executable, str(_APPLICATION / "orchestrator.py"), *arguments]


def agent_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what an embedded agent may see of an environment: nothing secret."""
    containers = {name: own[name] for name in CONTAINER_VARIABLES if name in own}
    return {**inherited_environment(own), **containers}


def inherited_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what jobs may see of an environment."""
    return {
        name: value
        for name, value in own.items()
        if name in PASSED_VARIABLES or name.startswith(PASSED_PREFIXES)
    }


_FIRST_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)


def raise_descriptor_limit() -> None:
    """Let this process open as many files and connections as it may at all."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """Return how many descriptors this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def lower_descriptor_limit_of(pid: int) -> None:
    """Give a child the limit that this process was started with: select(2) ends at 1,024."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, _FIRST_LIMIT)


def hide_variable(name: str) -> None:
    """Blank a variable where /proc/PID/environ shows it to others; ``os.environ`` keeps it.

    The kernel shows the memory that the process was started with (proc(5)); getenv(3) returns
    where in it the value stands.
    """
    value = os.environ.get(name)
    if value is None:
        return
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    if address := getenv(os.fsencode(name)):
        ctypes.memset(address, ord("x"), len(os.fsencode(value)))


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a program's coroutine to its end, as :func:`asyncio.run` does.

    The event loop is uvloop's where it is installed (the extra ``speed``), else asyncio's own.
    It does the same with less processor time; nothing depends on it.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        module = importlib.import_module("uvloop")
    except ImportError:
        return None
    return cast("Callable[[], asyncio.AbstractEventLoop]", module.new_event_loop)


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what a task group failed of first; the rest is what its end brought about."""
    failure: BaseException = group
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
