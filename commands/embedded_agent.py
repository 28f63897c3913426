"""The embedded agent: an agent process on the server's machine, kept alive beside it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import runtime
from config import Settings
from telemetry.logs import event

log = logging.getLogger("orchestrator")

_STOP_SECONDS = 3.0
_RESTART_SECONDS = 1.0


async def keep_agent(url: str, settings: Settings, token: str) -> None:
    """Keep an agent process on this machine alive for as long as the server runs."""
    while True:
        try:
            code = await run_agent(_local_url(url), settings, token)
        except OSError as error:  # no descriptors, no memory, no processes left: for now
            event(
                log,
                "embedded_agent_not_started",
                level=logging.ERROR,
                error=str(error),
                restart_s=_RESTART_SECONDS,
            )
        else:
            event(
                log,
                "embedded_agent_ended",
                level=logging.WARNING,
                code=code,
                restart_s=_RESTART_SECONDS,
            )
        await asyncio.sleep(_RESTART_SECONDS)


def _local_url(url: str) -> str:
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


async def run_agent(url: str, settings: Settings, token: str) -> int:
    """Run an agent to its end, and end it when cancelled; returns its exit code.

    Raises :class:`OSError` if it can't be started.
    """
    # The pipe stays open: its end tells the agent that the server is gone, however it went. The
    # token is in it before there is an agent, which may die at any moment.
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        os.write(writing, f"{token}\n".encode())
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(url, settings),
                stdin=reading,
                # whoever reads the server's output must not wait for the agent to end it
                stdout=asyncio.subprocess.DEVNULL,
                env=runtime.agent_environment(os.environ),
                # Ctrl-C in the terminal is for the server, which then stops the agent
                start_new_session=True,
            )
        finally:
            os.close(reading)
        try:
            runtime.lower_descriptor_limit_of(process.pid)
            return await process.wait()
        finally:
            await _stop_process(process)
    finally:
        os.close(writing)


def _command(url: str, settings: Settings) -> list[str]:
    workdir = Path(f"{settings.db_path}.agent").absolute()
    command = [*runtime.program("agent", "--embedded", "--server", url)]
    command += ["--name", "local", "--slots", str(settings.slots)]
    command += ["--workdir", str(workdir), "--log-format", settings.log_format]
    command += ["--isolation", settings.isolation]
    if settings.job_user is not None:
        command += ["--job-user", settings.job_user]
    if settings.allow_root_jobs:
        command += ["--allow-root-jobs"]
    for suffix in ("", "-wal", "-shm", "-journal"):
        command += ["--hide", f"{settings.db_path}{suffix}"]
    if settings.config_file is not None:  # a token may be in it
        command += ["--hide", settings.config_file]
    return command


async def _stop_process(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
