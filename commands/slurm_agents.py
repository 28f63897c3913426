"""Elastic agents: as many agents in allocations of Slurm as the queue wants.

This command holds nothing that counts. The allocations are in Slurm and the jobs at the server, so
it may be killed and started again at any time. The agents end by themselves when they are idle.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import re
import secrets
import signal
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import config
import runtime
from agent.executors.slurm_commands import (
    SlurmCommands,
    SlurmJob,
    SlurmSilent,
    Standing,
    SubmissionRefused,
)
from agent.executors.slurm_submission import checked_options
from commands.slurm_allocations import (
    AGENT_PREFIX,
    AgentSeen,
    Allocation,
    Limits,
    Plan,
    allocation_key,
    plan,
    seconds_of,
)
from config import ConfigError, LogFormat
from orchestrator_client.asynchronous import AsyncClient
from orchestrator_client.errors import OrchestratorError
from telemetry import logs
from telemetry.logs import event

log = logging.getLogger("orchestrator.slurm_agents")

_PAUSE_SECONDS = 5.0
_PATIENCE_SECONDS = 10.0  # with a server that gives no answer, at each look
_FIRST_BACK_OFF_SECONDS = 15.0
_LAST_BACK_OFF_SECONDS = 600.0
_SHORTEST_SECONDS = 120  # of an allocation
_API_TOKEN_VARIABLE = "ORCHESTRATOR_TOKEN"


@dataclass(slots=True)
class BackOff:
    """How long nothing is submitted after failures in a row."""

    failures: int = 0
    until: float = 0.0

    def note_failure(self, now: float) -> float:
        """Return for how many seconds nothing is to be submitted."""
        pause = min(_FIRST_BACK_OFF_SECONDS * 2.0**self.failures, _LAST_BACK_OFF_SECONDS)
        self.failures += 1
        self.until = now + pause
        return pause

    def note_success(self) -> None:
        """An agent came: the way works."""
        self.failures, self.until = 0, 0.0


class ElasticAgents:
    """Looks at the server and at Slurm, and submits what is missing."""

    def __init__(
        self,
        client: AsyncClient,
        commands: SlurmCommands,
        allocation: Allocation,
        limits: Limits,
    ) -> None:
        self._client = client
        self._commands = commands
        self._allocation = allocation
        self._limits = limits
        self._back_off = BackOff()
        self._expected: set[int] = set()  # allocations whose agent has not connected yet
        self._came: set[int] = set()

    async def run(self) -> None:
        """Look again and again; ends by cancellation."""
        while True:
            try:
                await self.step()
            except SlurmSilent as error:
                event(log, "slurm_silent", level=logging.WARNING, error=str(error))
            except OrchestratorError as error:
                event(log, "server_silent", level=logging.WARNING, error=str(error))
            await asyncio.sleep(_PAUSE_SECONDS)

    async def look(self) -> tuple[Plan, tuple[SlurmJob, ...]]:
        """Return what is to be done now, and the allocations there are."""
        services, agents = await asyncio.gather(self._client.services(), self._client.agents())
        allocations = tuple(
            job for job in await self._commands.jobs() if job.name == self._allocation.name
        )
        wanted = self._allocation.services
        seen = [_seen(agent) for agent in agents if _counts(agent, wanted)]
        self._note_agents({agent.name for agent in seen}, allocations)
        return plan(_queued(services, wanted), seen, allocations, self._limits), allocations

    async def step(self) -> None:
        """Look, and do what is to be done."""
        todo, allocations = await self.look()
        if todo.withdraw:
            for job_id in todo.withdraw:
                event(log, "allocation_withdrawn", slurm=job_id, why=todo.why)
                await self._commands.withdraw(job_id, self._allocation.name)
        now = asyncio.get_running_loop().time()
        for _ in range(todo.submit if now >= self._back_off.until else 0):
            await self._submit(todo, len(allocations))

    async def _submit(self, todo: Plan, count: int) -> None:
        try:
            number = await self._commands.submit(
                self._allocation.script(), self._allocation.arguments()
            )
        except SubmissionRefused as error:
            self._note_failure(f"Slurm refused the allocation: {error}")
        except SlurmSilent as error:
            # it may be there all the same: the next look tells
            self._note_failure(f"Slurm gave no answer: {error}")
        else:
            self._expected.add(number)
            event(log, "allocation_submitted", slurm=number, why=todo.why, known=count)

    def _note_agents(self, names: set[str], allocations: Sequence[SlurmJob]) -> None:
        """Notice allocations whose agent came, and those that ended without it."""
        for job in allocations:
            if f"{AGENT_PREFIX}{job.id}" in names and job.id not in self._came:
                self._came.add(job.id)
                self._back_off.note_success()
            if job.standing is not Standing.ENDED:
                self._expected.add(job.id)
        states = {job.id: job for job in allocations}
        for job_id in sorted(self._expected):
            job_or_none = states.get(job_id)
            if job_id not in self._came and not _has_ended(job_or_none):
                continue
            self._expected.discard(job_id)
            if job_id not in self._came and not _is_cancelled(job_or_none):
                self._note_failure(
                    f"allocation {job_id} ended, and its agent never connected;"
                    f" see {self._allocation.output / f'allocation-{job_id}.log'}"
                )

    def _note_failure(self, why: str) -> None:
        pause = self._back_off.note_failure(asyncio.get_running_loop().time())
        event(log, "allocation_failed", level=logging.WARNING, why=why, next_in=round(pause))


def _has_ended(job: SlurmJob | None) -> bool:
    return job is None or job.standing is Standing.ENDED


def _is_cancelled(job: SlurmJob | None) -> bool:
    return job is not None and job.state == "CANCELLED"


def _queued(services: Sequence[dict[str, Any]], wanted: Sequence[str] | None) -> int:
    return sum(
        int(service["queued"])
        for service in services
        if service["is_configured"] and (wanted is None or service["name"] in wanted)
    )


def _counts(agent: dict[str, Any], wanted: Sequence[str] | None) -> bool:
    """Say whether an agent may take the jobs that are looked at."""
    offered = agent["services"]
    is_fit = wanted is None or offered is None or bool(set(wanted) & set(offered))
    return bool(agent["is_connected"]) and is_fit


def _seen(agent: dict[str, Any]) -> AgentSeen:
    free = 0 if agent["is_drained"] else max(0, agent["slots"] - agent["busy"])
    return AgentSeen(str(agent["name"]), free)


# --- command line -----------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``orchestrator slurm-agents``."""
    parser.add_argument("--server", required=True, metavar="URL", help="as the nodes reach it")
    parser.add_argument("--max", required=True, type=int, metavar="N", help="agents at a time")
    parser.add_argument("--slots", type=int, default=1, help="jobs at a time, each (default: 1)")
    parser.add_argument(
        "--idle",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="an agent without a job for so long ends (default: 300)",
    )
    parser.add_argument("--time", default="4:00:00", help="of an allocation (default: 4:00:00)")
    parser.add_argument(
        "--drain",
        type=float,
        metavar="SECONDS",
        help="before its end an agent takes nothing new (default: a quarter of the time)",
    )
    parser.add_argument("--services", metavar="A,B", help="services they offer (default: all)")
    parser.add_argument("--slurm-options", default="", metavar="OPTIONS", help="for sbatch")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"holds the agent token, mode 0600; default: {config.AGENT_TOKEN_VARIABLE}",
    )
    parser.add_argument(
        "--state",
        type=Path,
        metavar="DIR",
        help="for the token and what allocations print; the nodes must see it"
        " (default: below ~/.local/state)",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="FILE",
        help=f"Python by its path on the nodes (default: {sys.executable})",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what it would do, and end")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Raises :class:`ConfigError`."""
    logs.configure(LogFormat.TEXT)
    limits, allocation = _settings_of(options)
    commands = SlurmCommands(os.environ)
    if (missing := commands.missing_command()) is not None:
        raise ConfigError(f"Slurm's command {missing} is not on the PATH")
    token = os.environ.get(_API_TOKEN_VARIABLE)
    if options.dry_run:
        return runtime.run(_dry_run(options.server, token, commands, allocation, limits))
    state = allocation.output
    lock = _lock(state)
    try:
        token_file = _token_file(options, state)
        runtime.run(
            _serve(
                options.server, token, commands, replace(allocation, token_file=token_file), limits
            )
        )
    finally:
        os.close(lock)
    return 0


async def _serve(
    server: str, token: str | None, commands: SlurmCommands, allocation: Allocation, limits: Limits
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncClient(server, token, patience=_PATIENCE_SECONDS) as client:
        agents = ElasticAgents(client, commands, allocation, limits)
        event(log, "started", server=server, max=limits.agents, name=allocation.name)
        serving = asyncio.create_task(agents.run(), name="elastic agents")
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        serving.cancel()
        with suppress(asyncio.CancelledError):
            await serving
    event(log, "stopped", note="the agents go on, and end when they are idle")


async def _dry_run(
    server: str, token: str | None, commands: SlurmCommands, allocation: Allocation, limits: Limits
) -> int:
    try:
        async with AsyncClient(server, token, patience=_PATIENCE_SECONDS) as client:
            todo, _ = await ElasticAgents(client, commands, allocation, limits).look()
    except (OrchestratorError, SlurmSilent) as error:
        sys.stderr.write(f"orchestrator slurm-agents: {error}\n")
        return 1
    sys.stdout.write(f"{todo.why}: would submit {todo.submit}, take back {len(todo.withdraw)}\n\n")
    sys.stdout.write(f"sbatch {' '.join(allocation.arguments())} << 'END'\n")
    sys.stdout.write(f"{allocation.script()}END\n")
    return 0


def _settings_of(options: argparse.Namespace) -> tuple[Limits, Allocation]:
    server = options.server.rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise ConfigError("--server must begin with http:// or https://")
    if not 1 <= options.max <= 10_000:
        raise ConfigError("--max must be from 1 to 10000")
    if not 1 <= options.slots <= 4096:
        raise ConfigError("--slots must be from 1 to 4096")
    if not 1 <= options.idle <= 86_400:
        raise ConfigError("--idle must be from 1 to 86400 seconds")
    seconds = seconds_of(options.time)
    if seconds < _SHORTEST_SECONDS:
        raise ConfigError(f"--time must be at least {_SHORTEST_SECONDS // 60} minutes")
    drain = seconds / 4 if options.drain is None else options.drain
    if not 0 <= drain < seconds:
        raise ConfigError("--drain must be at least 0, and less than the time of an allocation")
    services = None
    if options.services is not None:
        services = tuple(part.strip() for part in options.services.split(",") if part.strip())
    state = (options.state or _default_state(server)).absolute()
    allocation = Allocation(
        name=allocation_key(server, services),
        server=server,
        program=[options.python, *runtime.program()[1:]],
        token_file=options.token_file.absolute() if options.token_file else state / "token",
        output=state,
        slots=options.slots,
        services=services,
        seconds=seconds,
        idle_seconds=options.idle,
        drain_seconds=drain,
        options=checked_options(options.slurm_options),
    )
    return Limits(options.max, options.slots), allocation


def _default_state(server: str) -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    place = re.sub(r"[^A-Za-z0-9.-]+", "_", urlsplit(server).netloc)
    return Path(base) / "orchestrator" / f"slurm-agents@{place}"


def _lock(state: Path) -> int:
    """Keep a second command for the same server away."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{state}: {error.strerror}; choose another place with --state") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{state}: another slurm-agents works in this directory") from None
    return descriptor


def _token_file(options: argparse.Namespace, state: Path) -> Path:
    """Return the file with the token; makes one if the token is in the environment."""
    if options.token_file is not None:
        path = Path(options.token_file).absolute()
        try:
            mode = path.stat().st_mode
            config.checked_token(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
        if stat.S_IMODE(mode) & 0o077:
            raise ConfigError(f"{path}: others may read this token; chmod 600 it")
        return path
    token = os.environ.pop(config.AGENT_TOKEN_VARIABLE, None)
    if token is None:
        raise ConfigError(
            f"the agent token is needed: --token-file FILE, or {config.AGENT_TOKEN_VARIABLE};"
            " 'orchestrator agent-token' shows it where the server runs"
        )
    unfinished = state / f"token.{secrets.token_hex(4)}"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(config.checked_token(token))
    unfinished.rename(state / "token")
    return state / "token"
