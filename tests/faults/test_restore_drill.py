"""A database that is restored from a backup while agents hold newer jobs: nothing is mixed up."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from config import AGENT_TOKEN_VARIABLE
from tests.harness import PROJECT, AgentProcess, Server, eventually, run, running_server

NewAgent = Callable[[str], AgentProcess]


async def _back_up(server: Server, copy: Path) -> None:
    command = (sys.executable, str(PROJECT / "orchestrator.py"), "backup", str(copy))
    code, output = await run(*command, "--db", str(server.database))
    assert code == 0, output.decode()


async def _restore(server: Server, copy: Path) -> None:
    await server.kill()
    for path in server.database.parent.glob(f"{server.database.name}*"):
        if path.is_file():
            path.unlink()
    copy.rename(server.database)
    await server.start("--no-agent")


@pytest.fixture
async def bare_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server whose agents may be away for long, and know its token after a restore, too."""
    environment = {"LEASE": "600", AGENT_TOKEN_VARIABLE: "a-token-that-the-operator-chose"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server


async def test_a_restored_server_mixes_no_jobs_with_those_that_agents_still_hold(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f"while [ ! -e {go} ]; do sleep 0.05; done; cp data out"

    async def submit(name: str, user: int) -> int:
        return await bare_server.upload(script, {"data": name.encode()}, user=user)

    # given: one agent that will live through it, one that is started again, one that comes late
    agents = [new_agent(name) for name in ("steady", "reborn", "late")]
    for agent in agents:
        await agent.start("--slots", "4")
        await agent.wait_connected()
    before = {await submit(f"before {n}", user=1): f"before {n}" for n in range(3)}
    for job_id in before:
        await bare_server.wait(job_id, "Running")
    await _back_up(bare_server, tmp_path / "backup.db")
    forgotten = [await submit(f"forgotten {n}", user=2) for n in range(3)]
    for job_id in forgotten:
        await bare_server.wait(job_id, "Running")
    # when: the server is restored, and gives out ids before all agents are back
    await agents[1].kill()
    await agents[2].kill()
    await _restore(bare_server, tmp_path / "backup.db")
    after = {await submit(f"after {n}", user=3): f"after {n}" for n in range(5)}
    await agents[1].start("--slots", "4")
    await agents[2].start("--slots", "4")
    for job_id in after:
        await bare_server.wait(job_id, "Running", "Completed")
    go.touch()
    # then: everybody gets the result of their own files, of the attempts that the backup knows
    for job_id, content in {**before, **after}.items():
        archive = await bare_server.result(job_id)
        assert archive.read("out") == content.encode(), bare_server.log()[-3000:]
    for agent in agents:
        attempts = agent.workdir / "attempts"
        await eventually(lambda path=attempts: not list(path.iterdir()), "nothing is left")  # type: ignore[misc]
    assert not [p for p in bare_server.processes() if p.name() == "sleep"]
    for job_id in before:
        assert bare_server.transitions(job_id).count("Running") == 1, "it went on where it was"
    await bare_server.stop()
    await bare_server.check()
