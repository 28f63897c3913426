"""Jobs that an agent hands to a real Slurm of one node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness import AgentProcess, Server, running_server
from tests.slurm_cluster import SlurmCluster


@pytest.fixture
async def slurm_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent of its own."""
    environment = {"KILL_GRACE": "2", "MAX_ATTEMPTS": "3"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server


@pytest.fixture
async def agent(slurm_server: Server, slurm: SlurmCluster) -> AsyncIterator[AgentProcess]:
    """An agent on the submit host, which is the node as well."""
    agent = AgentProcess(slurm_server, "login")
    await _start(agent, slurm)
    yield agent
    await agent.kill()
    slurm.command("scancel", "--user", "root")


async def _start(agent: AgentProcess, slurm: SlurmCluster, *arguments: str) -> None:
    await agent.start(
        *("--executor", "slurm", "--slurm-file-system", "3", *arguments),
        environment=slurm.environment,
    )


async def test_a_job_runs_on_a_node_and_its_result_comes_back(
    slurm_server: Server, agent: AgentProcess
) -> None:
    job = await slurm_server.upload(
        'cat input; echo $SLURM_JOB_ID > number; echo "$ORCHESTRATOR_JOB_ID" >&2', {"input": b"hi"}
    )
    result = await slurm_server.result(job)
    assert result.read("stdout.log") == b"hi"
    assert result.read("stderr.log").decode().strip() == str(job)
    assert int(result.read("number")) > 0
