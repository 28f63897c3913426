"""Jobs that turn against what watches over them: its files, its processes, its clock."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from tests.harness import AgentProcess, Server, curl, eventually, lines, running_server

NewAgent = Callable[[str], AgentProcess]

_RECORDS = (
    *("exit", "exit.new", "kill", "dropped", "stdout.log", "stderr.log", "supervisor.log"),
    *("result.zip", "result.zip.new", "finished.json", "finished.json.new"),
)


async def open_agent(new_agent: NewAgent, name: str) -> AgentProcess:
    """Return a started agent whose jobs may reach all that its user may."""
    agent = new_agent(name)
    await agent.start("--isolation", "none")
    await agent.wait_connected()
    return agent


@pytest.mark.parametrize("size", [10, 300_000], ids=["small", "large"])
async def test_links_that_a_job_puts_beside_its_directory_are_not_followed(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path, size: int
) -> None:
    victims = tmp_path / "victims"
    victims.mkdir()
    for name in _RECORDS:
        (victims / name).write_text("precious secret")
    await open_agent(new_agent, "careful")
    links = "; ".join(
        f"rm -f ../{name}; ln -s {victims}/{name} ../{name}" for name in _RECORDS if name != "kill"
    )
    job_id = await bare_server.upload(f"head -c {size} /dev/urandom > data; {links}; exit 3")
    answer = await bare_server.wait(job_id)
    archive = bare_server.stored_result(job_id)
    assert len(archive.read("data")) == size
    assert answer["status"] == "Failed"
    for name in archive.namelist():
        assert b"precious" not in archive.read(name)
    assert {path.read_text() for path in victims.iterdir()} == {"precious secret"}


async def test_a_job_that_replaces_its_directory_by_a_link_delivers_nothing_from_elsewhere(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("precious")
    await open_agent(new_agent, "careful")
    job_id = await bare_server.upload(f"cd ..; rm -r job; ln -s {tmp_path}/elsewhere job; exit 3")
    assert (await bare_server.wait(job_id))["status"] == "Failed"
    assert "secret" not in bare_server.stored_result(job_id).namelist()
    assert (tmp_path / "elsewhere" / "secret").read_text() == "precious"


@pytest.fixture
async def hasty_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server whose jobs have two seconds."""
    environment = {"LEASE": "60", "KILL_GRACE": "1", "SERVICE_EXAMPLE_TIMEOUT": "2"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server


@pytest.mark.parametrize("restarts", [False, True], ids=["with its agent", "adopted"])
async def test_a_job_that_stops_its_supervisor_ends_at_its_time_limit_all_the_same(
    hasty_server: Server, tmp_path: Path, restarts: bool
) -> None:
    witness = tmp_path / "witness"
    agent = AgentProcess(hasty_server, "watchful")
    await agent.start("--isolation", "none")
    job_id = await hasty_server.upload(
        f"echo early > file; setsid sleep 1000 & kill -STOP $PPID; echo $$ > {witness}; sleep 1000"
    )
    await eventually(lambda: bool(lines(witness)), "it runs")
    if restarts:
        await hasty_server.wait(job_id, "Running")
        await agent.kill()
        await agent.start("--isolation", "none")
    answer = await hasty_server.wait(job_id)
    assert (answer["status"], answer["message"]) == ("Failed", "timed out after 2 s")
    assert hasty_server.stored_result(job_id).read("file") == b"early\n"
    assert not [process for process in hasty_server.processes() if process.name() == "sleep"]
    # and the next job has a supervisor that works
    assert await hasty_server.result(await hasty_server.upload("true"))


async def test_a_job_that_stops_its_supervisor_can_be_terminated(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    await open_agent(new_agent, "watchful")
    job_id = await bare_server.upload(
        f"(while true; do kill -STOP $PPID; sleep 0.01; done) & echo $PPID > {witness}; sleep 1000"
    )
    await eventually(lambda: bool(lines(witness)), "it runs")
    await bare_server.wait(job_id, "Running")
    supervisor = psutil.Process(int(lines(witness)[0]))
    await curl("-X", "POST", f"{bare_server.url}/terminate/{job_id}")
    assert (await bare_server.wait(job_id))["status"] == "Killed"
    # it is gone, or it came to in time and waits for another job
    assert not supervisor.is_running() or supervisor.status() != psutil.STATUS_STOPPED
    assert not [process for process in bare_server.processes() if process.name() == "sleep"]


async def test_results_that_vanish_or_shrink_lose_their_attempts_and_no_connection(
    patient_server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = AgentProcess(patient_server, "robbed")
    await agent.start("--slots", "3")
    await agent.wait_connected()
    script = f"echo $ORCHESTRATOR_JOB_ID >> {witness}; head -c 3000000 /dev/urandom > data"
    waits = f"echo $ORCHESTRATOR_JOB_ID >> {witness}; sleep 1000"
    neighbour = await patient_server.upload(waits)
    await patient_server.wait(neighbour, "Running")
    go = tmp_path / "go"
    gone, short = [
        await patient_server.upload(f"until [ -e {go} ]; do sleep 0.05; done; {script}")
        for _ in range(2)
    ]
    for job_id in (gone, short):
        await patient_server.wait(job_id, "Running")
    await patient_server.kill()
    go.touch()
    reports = [agent.attempt(number) / "finished.json" for number in (2, 3)]
    await eventually(lambda: all(report.exists() for report in reports), "both have ended")
    (reports[0].parent / "result.zip").unlink()
    os.truncate(reports[1].parent / "result.zip", 1_000_000)
    await patient_server.start("--no-agent")
    for job_id in (gone, short):
        assert len((await patient_server.result(job_id)).read("data")) == 3_000_000
    assert sorted(map(int, lines(witness))) == sorted([neighbour, *(2 * [gone, short])])
    assert agent.log().count("event=attempt_lost") == 2
    assert agent.log().count("event=connected") == 2, "one for each life of the server"
    assert patient_server.transitions(neighbour).count("Running") == 1
