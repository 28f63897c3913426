"""What stands behind the seam of executors may die with its agent at any step."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from tests.harness import AgentProcess, Server, curl, eventually, lines

_ENDED = {
    "run": 1,
    "execution": 2,
    "check": 2,
    "before the start": 1,
    "while it starts": 1,
    "after the start": 1,
    "before the wait": 1,
    "after the wait": 1,
    "usage": 1,
    "forget": 1,
}
"""The steps, and how many attempts there are: one that left no trace is made again."""

_KILLED = ["before the kill", "after the mark", "after the kill", "forget"]


def crashing_agent(server: Server) -> AgentProcess:
    agent = AgentProcess(server, "mortal")
    agent.through = (str(Path(__file__).with_name("crashing_executor.py")),)
    return agent


async def crash(agent: AgentProcess) -> None:
    """Wait until the agent has killed itself, and start it again."""
    assert agent.process is not None
    assert await asyncio.wait_for(agent.process.wait(), 60) == -signal.SIGKILL, agent.log()
    await agent.start()


@pytest.mark.parametrize(("step", "attempts"), _ENDED.items(), ids=_ENDED)
async def test_an_agent_that_dies_at_a_step_starts_the_job_once_and_loses_nothing(
    patient_server: Server, tmp_path: Path, step: str, attempts: int
) -> None:
    witness = tmp_path / "witness"
    agent = crashing_agent(patient_server)
    job_id = await patient_server.upload(f"echo runs >> {witness}; echo output; echo kept > file")
    await agent.start(environment={"CRASH_AT": step})
    await crash(agent)
    archive = await patient_server.result(job_id)
    assert (archive.read("file"), archive.read("stdout.log")) == (b"kept\n", b"output\n")
    assert lines(witness) == ["runs"]
    assert patient_server.query("SELECT count(*) FROM attempt") == [(attempts,)]
    held = agent.workdir / "attempts"
    await eventually(lambda: not list(held.iterdir()), "the agent has tidied up")


@pytest.mark.parametrize("step", _KILLED)
async def test_an_agent_that_dies_while_it_kills_a_job_ends_it_after_its_return(
    patient_server: Server, tmp_path: Path, step: str
) -> None:
    witness = tmp_path / "witness"
    agent = crashing_agent(patient_server)
    job_id = await patient_server.upload(f"echo early > file; echo runs >> {witness}; sleep 1000")
    await agent.start(environment={"CRASH_AT": step})
    await eventually(lambda: lines(witness) == ["runs"], "it runs")
    await patient_server.wait(job_id, "Running")
    await curl("-X", "POST", f"{patient_server.url}/terminate/{job_id}")
    await crash(agent)
    assert (await patient_server.wait(job_id))["status"] == "Killed"
    # the server does not wait for an absent agent, but takes what it brings later
    held = agent.workdir / "attempts"
    await eventually(lambda: not list(held.iterdir()), "the agent has delivered and tidied up")
    assert patient_server.stored_result(job_id).read("file") == b"early\n"
    assert lines(witness) == ["runs"]
    assert not [process for process in patient_server.processes() if process.name() == "sleep"]


async def test_an_agent_with_another_executor_leaves_alone_what_the_one_before_runs(
    patient_server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = crashing_agent(patient_server)
    job_id = await patient_server.upload(f"echo runs >> {witness}; echo kept > file")
    await agent.start(environment={"CRASH_AT": "before the start"})
    assert agent.process is not None
    assert await asyncio.wait_for(agent.process.wait(), 60) == -signal.SIGKILL
    through, agent.through = agent.through, ()
    await agent.start()
    assert await asyncio.wait_for(agent.process.wait(), 60) == 2
    assert "--executor crashing" in agent.log()
    assert lines(witness) == []
    agent.through = through
    await agent.start()
    assert (await patient_server.result(job_id)).read("file") == b"kept\n"
    assert lines(witness) == ["runs"]
    assert patient_server.query("SELECT count(*) FROM attempt") == [(1,)]
