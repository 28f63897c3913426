"""POST /terminate: a job ends with all its processes, wherever it is."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.harness import (
    AgentProcess,
    Answer,
    Server,
    curl,
    eventually,
    lines,
    running_server,
)

NewAgent = Callable[[str], AgentProcess]


async def terminate(server: Server, job_id: int) -> Answer:
    return await curl("-X", "POST", f"{server.url}/terminate/{job_id}")


def killed(job_id: int) -> Answer:
    body = f'{{"id": {job_id}, "status": "Killed", "message": "Job terminated"}}'
    return Answer(200, body.encode())


async def test_a_queued_job_never_runs(bare_server: Server, new_agent: NewAgent) -> None:
    job_id, other = await bare_server.upload("true"), await bare_server.upload("true")
    assert await terminate(bare_server, job_id) == killed(job_id)
    assert await bare_server.status(job_id) == killed(job_id).json()
    await new_agent("late").start()
    await bare_server.result(other)
    assert bare_server.transitions(job_id) == ["Queued", "Killed"]


TREES = {
    "children": "sleep 1000 & sleep 1000 & wait",
    "setsid": "setsid sleep 1000 & sleep 1000",
    "double fork": "(setsid nohup bash -c 'sleep 1000' > /dev/null 2>&1 &) ; sleep 1000",
    "ignores SIGTERM": "trap '' TERM; while true; do sleep 1000; done",
    "ignores it deeper": "(trap '' TERM; setsid bash -c 'sleep 1000; sleep 1000' &) ; sleep 1000",
    "stopped": "sleep 1000 & kill -STOP $!; kill -STOP $$",
    "fork chain": 'f() { (f &) ; }; export -f f; (f &); echo "chain" >&2; sleep 1000',
}


async def test_the_whole_tree_of_a_running_job_ends(tmp_path: Path) -> None:
    async with running_server(
        tmp_path / "server", "--slots", "8", environment={"KILL_GRACE": "0.5"}
    ) as server:

        async def grow_and_fell(number: int, tree: str) -> None:
            witness = tmp_path / f"witness-{number}"
            script = f"echo partial > partial; echo up > {witness}\n{tree}"
            job_id = await server.upload(script, user=number)
            await eventually(lambda: lines(witness) == ["up"], f"{tree} is under way")
            assert await terminate(server, job_id) == killed(job_id)
            # what it wrote is kept with the job
            assert server.stored_result(job_id).read("partial") == b"partial\n"

        await asyncio.gather(*(grow_and_fell(*tree) for tree in enumerate(TREES.values())))
        left = [p for p in server.processes() if p.name() in ("sleep", "bash")]
        assert left == []
        attempts = server.directory / "orchestrator.db.agent" / "attempts"
        await eventually(lambda: os.listdir(attempts) == [], "their directories are removed")
        await server.result(await server.upload("true"))


async def test_unknown_and_final_jobs_are_refused(server: Server) -> None:
    for job_id in (7, "x", 2**64):
        answer = await curl("-X", "POST", f"{server.url}/terminate/{job_id}")
        assert (answer.status, answer.json()["status"]) == (404, "Unknown")
    done = await server.upload("true")
    await server.result(done)
    answer = await terminate(server, done)
    assert answer.status == 409
    assert answer.json() == {
        "id": done,
        "status": "Unknown",
        "message": "the job is already Completed",
    }
    gone = await server.upload("sleep 1000")
    await server.wait(gone, "Running")
    assert (await terminate(server, gone)).status == 200
    answer = await terminate(server, gone)
    assert (answer.status, "Killed" in answer.json()["message"]) == (409, True)


async def test_terminations_at_any_moment_end_each_job_once(server: Server) -> None:
    jobs = [await server.upload(f"sleep {number % 4 * 0.4}") for number in range(40)]
    answers = await asyncio.gather(*(terminate(server, job_id) for job_id in jobs for _ in (1, 2)))
    for job_id in jobs:
        status = await server.wait(job_id)
        assert status["status"] in ("Killed", "Completed")
        finals = [s for s in server.transitions(job_id) if s in ("Killed", "Completed", "Failed")]
        assert finals == [status["status"]]
    assert {answer.status for answer in answers} <= {200, 409}
    assert 200 in {answer.status for answer in answers}
    # no quota and no slot was lost on the way
    later = [await server.upload("true") for _ in range(12)]
    await asyncio.gather(*(server.result(job_id) for job_id in later))


async def test_a_job_whose_agent_is_away_is_killed_when_it_returns_and_keeps_what_it_left(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = new_agent("away")
    await agent.start("--slots", "2")
    running = await bare_server.upload(
        f"echo partial > out; echo said; echo $$ > {witness}; sleep 1000"
    )
    os.mkfifo(tmp_path / "go")
    ended = await bare_server.upload(f"read line < {tmp_path / 'go'}; echo whole > out")
    await eventually(lambda: bool(lines(witness)), "it runs")
    await bare_server.wait(ended, "Running")
    shell = int(lines(witness)[0])
    await agent.kill()
    await asyncio.to_thread((tmp_path / "go").write_text, "go\n")
    record = agent.attempt(ended) / "exit"
    await eventually(record.exists, "the other has ended by itself")
    for job_id in (running, ended):
        assert await terminate(bare_server, job_id) == killed(job_id)
    assert psutil.pid_exists(shell)
    await bare_server.kill()  # what is expected of the agent is not forgotten
    await bare_server.start("--no-agent")
    await agent.start("--slots", "2")
    await eventually(lambda: not psutil.pid_exists(shell), "it is killed")
    attempts = agent.workdir / "attempts"
    await eventually(lambda: os.listdir(attempts) == [], "both are delivered and cleaned")
    partial = bare_server.stored_result(running)
    assert (partial.read("out"), partial.read("stdout.log")) == (b"partial\n", b"said\n")
    assert bare_server.stored_result(ended).read("out") == b"whole\n"
    for job_id in (running, ended):
        assert await bare_server.status(job_id) == killed(job_id).json()
        assert bare_server.transitions(job_id)[-2:] == ["Running", "Killed"]
    await bare_server.check()


async def test_a_kill_goes_on_after_the_agent_was_killed_in_it(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = new_agent("dies")
    await agent.start()
    job_id = await bare_server.upload(f"trap '' TERM; echo $$ > {witness}; sleep 1000; sleep 1000")
    await eventually(lambda: bool(lines(witness)), "it runs")
    request = asyncio.create_task(terminate(bare_server, job_id))
    mark = agent.attempt(1) / "kill"
    await eventually(mark.exists, "the agent has begun to kill")
    agent.send(signal.SIGKILL)
    await agent.start()
    assert await request == killed(job_id)
    shell = int(lines(witness)[0])
    await eventually(lambda: not psutil.pid_exists(shell), "it is killed")
    await eventually(lambda: os.listdir(mark.parent.parent) == [], "and cleaned")
