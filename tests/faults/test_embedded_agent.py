"""The embedded agent comes back, whatever kept it from being started."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime
from commands.embedded_agent import run_agent
from config import Settings
from tests.harness import Server, eventually


async def test_a_server_without_descriptors_for_its_agent_starts_it_when_there_are_some(
    server: Server,
) -> None:
    agent = await server.agent_pid()
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{server.pid}/fd"))
    # what is below the highest and free is less than the pipes and the fork of a process take
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    try:
        os.kill(agent, signal.SIGKILL)
        await eventually(
            lambda: "event=embedded_agent_not_started" in server.log(), "it could not be started"
        )
        assert not server.has_ended()
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    await server.result(await server.upload("true"))
    assert await server.stop() == 0


def test_an_agent_that_dies_at_once_does_not_take_the_server_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    start = asyncio.create_subprocess_exec

    async def start_and_lose(*command: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*command, **options)
        await process.wait()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_lose)
    monkeypatch.setattr(
        runtime, "program", lambda *_: [sys.executable, "-c", "raise SystemExit(7)"]
    )
    settings = Settings(db_path=str(tmp_path / "orchestrator.db"))
    assert runtime.run(run_agent("http://127.0.0.1:1", settings, "token")) == 7
