"""The agent's machine restarts, and clocks that jump."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import psutil

from tests.faults.sabotage import through
from tests.harness import AgentProcess, Server, eventually, lines, running_server


def end_all_but_the_server(server: Server) -> None:
    """Kill whatever runs for the server, jobs included."""
    for process in server.processes():
        if process.pid != server.pid:
            process.kill()
            process.wait(10)


def pretend_a_restart(agent: AgentProcess, server: Server) -> None:
    """End all that the agent's jobs run, and make it look as if another boot had run them."""
    end_all_but_the_server(server)
    for record in agent.workdir.glob("attempts/*/attempt.json"):
        fields = json.loads(record.read_text())
        record.write_text(json.dumps({**fields, "boot": "another"}))


async def test_after_a_restart_of_the_machine_jobs_are_started_again_and_told_why(
    bare_server: Server, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    os.mkfifo(go)
    agent = AgentProcess(bare_server, "reboots")
    await agent.start("--slots", "2")
    script = f"echo lost >> {witness}; [ $ORCHESTRATOR_ATTEMPT = 2 ] || sleep 1000"
    lost = await bare_server.upload(script)
    # what it wrote was not synced, so the record of its exit proves nothing
    script = f"echo ended >> {witness}; [ $ORCHESTRATOR_ATTEMPT = 2 ] || read line < {go}; exit 4"
    ended = await bare_server.upload(script)
    await eventually(lambda: sorted(lines(witness)) == ["ended", "lost"], "both run")
    for job_id in (lost, ended):
        await bare_server.wait(job_id, "Running")
    await agent.kill()
    await asyncio.to_thread(go.write_text, "end\n")
    record = agent.attempt(ended) / "exit"
    await eventually(record.exists, "one ends while no agent is there")
    pretend_a_restart(agent, bare_server)
    await agent.start("--slots", "2")
    await bare_server.wait(lost, "Completed")
    status = await bare_server.wait(ended)
    reasons = bare_server.query("SELECT reason FROM history WHERE to_state = 'Queued'")
    reason = "agent reboots lost it: the machine was restarted before the job had finished"
    assert reasons[2:] == [(reason,), (reason,)]
    assert (status["status"], status["message"]) == ("Failed", "run.sh ended with exit code 4")
    assert sorted(lines(witness)) == ["ended", "ended", "lost", "lost"]


async def test_a_pid_that_another_process_has_now_is_left_alone(
    bare_server: Server, tmp_path: Path
) -> None:
    agent = AgentProcess(bare_server, "careful")
    await agent.start()
    job_id = await bare_server.upload("[ $ORCHESTRATOR_ATTEMPT = 2 ] || sleep 1000")
    await bare_server.wait(job_id, "Running")
    await agent.kill()
    end_all_but_the_server(bare_server)
    stranger = psutil.Popen(["sleep", "1000"], cwd=tmp_path)
    try:
        (directory,) = agent.workdir.glob("attempts/*")
        record = directory / "process"
        start = os.readlink(record).split()[1]
        record.unlink()
        record.symlink_to(f"{stranger.pid} {start}")
        await agent.start()
        await bare_server.wait(job_id, "Completed")
        assert stranger.is_running()
        assert stranger.status() != psutil.STATUS_ZOMBIE
    finally:
        stranger.kill()
        stranger.wait()


async def test_clocks_that_jump_end_no_lease_and_no_job_early_or_late(tmp_path: Path) -> None:
    clock, witness, go = tmp_path / "clock", tmp_path / "witness", tmp_path / "go"
    clock.write_text("0")
    os.mkfifo(go)
    environment = {
        **{"LEASE": "8", "KILL_GRACE": "0.2"},
        **{"SERVICE_LONG_TIMEOUT": "3600", "SERVICE_SHORT_TIMEOUT": "1"},
    }

    def jump(hours: float) -> None:
        unfinished = tmp_path / "clock.new"
        unfinished.write_text(str(hours * 3600))
        unfinished.rename(clock)

    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        await server.stop()
        server.through = through({"clock": str(clock)})
        await server.start("--no-agent")
        agent = AgentProcess(server, "jumps")
        agent.through = server.through
        await agent.start("--slots", "2")
        try:
            long = await server.upload(f"echo $$ >> {witness}; read line < {go}", service="long")
            short = await server.upload("sleep 1000", service="short")
            await server.wait(short, "Running")
            await eventually(lambda: len(lines(witness)) == 1, "it runs")
            jump(5)
            status = await server.wait(short, "Failed")
            assert status["message"] == "timed out after 1 s"
            await agent.kill()
            jump(-10)
            await agent.start("--slots", "2")
            await eventually(lambda: agent.log().count("event=connected") == 2, "it is back")
            jump(20)
            await asyncio.to_thread(go.write_text, "end\n")
            await server.wait(long, "Completed")
            assert server.transitions(long).count("Processing") == 1
            assert len(lines(witness)) == 1
            lost = await server.upload("sleep 1000", service="long")
            await server.wait(lost, "Running")
            await agent.kill()
            jump(-20)
            await eventually(lambda: server.transitions(lost)[-1] == "Queued", "its lease ends")
        finally:
            await agent.kill()


async def test_a_result_that_is_damaged_on_the_agents_disk_is_made_again(
    bare_server: Server, tmp_path: Path
) -> None:
    agent, go = AgentProcess(bare_server, "rots"), tmp_path / "go"
    os.mkfifo(go)
    await agent.start()
    job_id = await bare_server.upload(f"head -c 1000000 /dev/urandom > out; read x < {go}")
    for attempt, restarts in ((1, False), (2, True)):
        await eventually(
            lambda count=attempt: bare_server.transitions(job_id).count("Running") == count,  # type: ignore[misc]
            "the attempt runs",
        )
        await bare_server.kill()
        await asyncio.to_thread(go.write_text, "end\n")
        directory = agent.attempt(attempt)
        await eventually((directory / "finished.json").exists, "it ends while no server is there")
        with open(directory / "result.zip", "r+b") as result:
            result.seek(500_000)
            result.write(b"rotten")
        if restarts:
            await agent.kill()
        await bare_server.start("--no-agent")
        if restarts:
            await agent.start()
    await asyncio.to_thread(go.write_text, "end\n")
    assert len((await bare_server.result(job_id)).read("out")) == 1_000_000
    reasons = bare_server.query("SELECT reason FROM history WHERE to_state = 'Queued'")
    assert reasons[1:] == [
        ("agent rots sent a result with another SHA-256 than it said",),
        ("agent rots lost it: the result archive is damaged",),
    ]
