"""An agent's work directory: whose it is, and that nobody else uses it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from agent import plain_files
from agent.settings import AgentRefused
from telemetry.logs import event

log = logging.getLogger("orchestrator.agent")

_LOCK_SECONDS = 10.0
_LOCK_PAUSE_SECONDS = 0.05


@contextlib.contextmanager
def unusable_refused(workdir: Path) -> Iterator[None]:
    """Say what to do about a work directory in which nothing can be written."""
    try:
        yield
    except OSError as error:
        raise AgentRefused(
            f"{workdir}: {error.strerror}; an agent must be able to make this directory and to"
            " write in it: give its user that right, or choose another place with --workdir"
        ) from None


async def lock(workdir: Path) -> int:
    """Keep a second agent off the work directory; waits a moment for one that is ending."""
    with unusable_refused(workdir):
        workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        async with asyncio.timeout(_LOCK_SECONDS):
            await _take_lock(descriptor, workdir)
    except TimeoutError:
        os.close(descriptor)
        raise AgentRefused(
            f"{workdir}: another agent works in this directory; end it, or choose another place"
            " with --workdir"
        ) from None
    return descriptor


async def _take_lock(descriptor: int, workdir: Path) -> None:
    is_told = False
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if not is_told:
            event(log, "waiting_for_other_agent", workdir=workdir, seconds=_LOCK_SECONDS)
            is_told = True
        await asyncio.sleep(_LOCK_PAUSE_SECONDS)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an agent is, for as long as its work directory lives; ``secret`` proves it."""

    id: str
    secret: str = field(repr=False)


def identity(workdir: Path) -> Identity:
    """Return the identity that belongs to the work directory, made at the first start."""
    return Identity(
        _kept(workdir / "agent-id", lambda: uuid.uuid4().hex),
        _kept(workdir / "agent-secret", lambda: secrets.token_hex(32)),
    )


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Return what a file holds, made now if there is none."""
    with contextlib.suppress(FileNotFoundError):
        if text := path.read_text(encoding="ascii").strip():
            return text
    text = make()
    plain_files.replace_text(path, text)
    return text
