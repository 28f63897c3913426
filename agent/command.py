"""The command line of an agent, and its signals."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import config
import runtime
from agent.agent import Agent
from agent.executor_options import add_executor_options, default_slots, executor_of
from agent.executors.slurm_submission import with_joined_values
from agent.isolation.choice import IsolationSettings
from agent.isolation.job_user import parsed as parsed_job_user
from agent.resource_options import add_resource_options
from agent.settings import AgentRefused, AgentSettings
from config import ConfigError, LogFormat
from jobs import IsolationKind
from runtime import first_failure
from telemetry import logs
from telemetry.logs import event

log = logging.getLogger("orchestrator.agent")

_DEFAULT_KINDS = (
    *(IsolationKind.AUTO, IsolationKind.NONE, IsolationKind.LANDLOCK, IsolationKind.BUBBLEWRAP),
)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of ``orchestrator agent``."""
    parser = argparse.ArgumentParser(
        prog="orchestrator agent",
        description="Run jobs of an Orchestrator server on this machine.",
        epilog=f"The token may also be given in {config.AGENT_TOKEN_VARIABLE}.",
    )
    parser.add_argument("--server", required=True, metavar="URL", help="http://host:5000")
    parser.add_argument("--name", default=socket.gethostname(), help="default: the host's name")
    parser.add_argument(
        "--slots",
        type=int,
        help="jobs at a time (default: one for each core; 100 with --executor slurm)",
    )
    parser.add_argument("--services", metavar="A,B", help="services it offers (default: all)")
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="where its jobs run")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="holds the agent token")
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how long SIGTERM lets running jobs finish; those left run on for the next start,"
        " as they do at once after a second SIGTERM (default: 300)",
    )
    parser.add_argument(
        "--idle-exit",
        type=float,
        metavar="SECONDS",
        help="end after so long without a job (default: never)",
    )
    parser.add_argument(
        "--end-time",
        type=float,
        metavar="UNIX_TIME",
        help="end at this moment; --drain-timeout earlier it takes nothing new (default: never)",
    )
    parser.add_argument(
        "--log-format", choices=list(LogFormat), default=LogFormat.TEXT, help="default: text"
    )
    add_resource_options(parser)
    _add_isolation_options(parser)
    add_executor_options(parser)
    parser.add_argument("--embedded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=config.VERSION)
    return parser.parse_args(with_joined_values(arguments))


def _add_isolation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--isolation",
        choices=[str(kind) for kind in _DEFAULT_KINDS],
        default=IsolationKind.AUTO,
        help="what keeps jobs from what is not theirs, for services that do not say (default:"
        " landlock where the kernel has it, else none)",
    )
    parser.add_argument(
        "--job-user",
        metavar="NAME|FIRST-LAST",
        help="for an agent that is root: the user that jobs run as, or a range of user ids of"
        " which each job has its own",
    )
    parser.add_argument(
        "--allow-root-jobs",
        action="store_true",
        help="offer services with an isolation although their jobs run as root, against which"
        " none holds",
    )
    parser.add_argument(
        "--hide",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="what no job may see, besides the work directory and the token; may be repeated",
    )


def _isolation_of(options: argparse.Namespace, slots: int) -> IsolationSettings:
    secrets = list(options.hide)
    if options.token_file is not None and not str(options.token_file).startswith("/dev/"):
        secrets.append(options.token_file)
    users = None
    if options.job_user is not None:
        if os.geteuid() != 0:
            raise ConfigError("--job-user: only an agent that is root can run jobs as others")
        try:
            users = parsed_job_user(options.job_user, slots)
        except ValueError as error:
            raise ConfigError(f"--job-user {error}") from None
    return IsolationSettings(
        default=IsolationKind(options.isolation),
        users=users,
        are_root_jobs_allowed=options.allow_root_jobs,
        secrets=tuple(path.absolute() for path in secrets),
    )


def _settings_of(options: argparse.Namespace, token: str | None) -> AgentSettings:
    name = config.checked_agent_name(options.name)
    slots = default_slots(options) if options.slots is None else options.slots
    if not 1 <= slots <= 4096:
        raise ConfigError("--slots must be from 1 to 4096")
    if options.idle_exit is not None and not 0 < options.idle_exit < math.inf:
        raise ConfigError("--idle-exit must be more than 0 seconds")
    server = options.server.rstrip("/")
    if not server.startswith(("http://", "https://")):
        raise ConfigError("--server must begin with http:// or https://")
    services = None
    if options.services is not None:
        services = tuple(part.strip() for part in options.services.split(",") if part.strip())
    return AgentSettings(
        server=server,
        name=name,
        slots=slots,
        services=services,
        workdir=(options.workdir or default_workdir(name, server)).absolute(),
        token=token,
        isolation=_isolation_of(options, slots),
    )


def default_workdir(name: str, server: str) -> Path:
    """Return a directory that outlives a restart of the machine (XDG base directories).

    One for each server: what an agent holds for one server, another does not know, and would
    have it dropped.
    """
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    place = re.sub(r"[^A-Za-z0-9.-]+", "_", urlsplit(server).netloc)
    return Path(state) / "orchestrator" / f"{name}@{place}"


def _read_token(options: argparse.Namespace) -> str | None:
    if options.embedded:
        return config.checked_token(sys.stdin.readline())
    if options.token_file is not None:
        try:
            return config.checked_token(options.token_file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{options.token_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{options.token_file}: is not a text in UTF-8") from None
    return None


def _hide_token_variable(arguments: Sequence[str]) -> None:
    """Start again without the token in the environment, which any job could read in /proc."""
    token = os.environ.get(config.AGENT_TOKEN_VARIABLE)
    if token is None:
        return
    receiving, sending = os.pipe()
    os.write(sending, token.encode())
    os.close(sending)
    os.set_inheritable(receiving, True)
    environment = dict(os.environ)
    del environment[config.AGENT_TOKEN_VARIABLE]
    own = runtime.program("agent", *arguments)
    if not any(argument.startswith("--token-file") for argument in arguments):
        own += ["--token-file", f"/dev/fd/{receiving}"]
    os.execve(sys.executable, own, environment)


async def _serve(settings: AgentSettings, options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.embedded:
        loop.add_reader(sys.stdin.fileno(), stop.set)  # end of file: the server is gone
    agent = Agent(settings, executor_of(options, settings, os.environ))
    serving = asyncio.create_task(agent.run(), name="agent")
    reasons: list[Coroutine[None, None, object]] = [stop.wait()]
    if options.idle_exit is not None:
        reasons.append(agent.wait_idle(options.idle_exit))
    if options.end_time is not None:
        reasons.append(asyncio.sleep(options.end_time - options.drain_timeout - time.time()))
    await _first_of(serving, *reasons)
    if options.embedded:
        loop.remove_reader(sys.stdin.fileno())
    elif not serving.done():
        stop.clear()
        seconds = options.drain_timeout
        if options.end_time is not None:
            seconds = max(0.0, min(seconds, options.end_time - time.time()))
        await _first_of(serving, stop.wait(), agent.drain(), seconds=seconds)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    event(log, "agent_stopped", agent=settings.name)


async def _first_of(
    task: asyncio.Task[None],
    *others: Coroutine[None, None, object],
    seconds: float | None = None,
) -> None:
    """Wait until the task or one of the others is over, or the time is; end the others."""
    waits = [asyncio.ensure_future(other) for other in others]
    try:
        await asyncio.wait({task, *waits}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def main(arguments: Sequence[str]) -> int:
    """Run an agent until it is told to stop; returns the exit status."""
    options = parse_arguments(arguments)
    _hide_token_variable(arguments)
    logs.configure(LogFormat(options.log_format))
    try:
        settings = _settings_of(options, _read_token(options))
        runtime.run(_serve(settings, options))
    except* (ConfigError, AgentRefused) as group:
        sys.stderr.write(f"orchestrator agent: {first_failure(group)}\n")
        return_code = 2
    except* KeyboardInterrupt:  # before it was ready to stop in order
        sys.stderr.write("orchestrator agent: interrupted\n")
        return_code = 128 + signal.SIGINT
    else:
        return_code = 0
    return return_code
