"""Jobs that an agent hands to a real Slurm of one node."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import AgentProcess, Server, curl, eventually, lines, running_server
from tests.slurm_cluster import NODE, SlurmCluster, StandIn


@pytest.fixture
async def slurm_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent of its own."""
    environment = {"KILL_GRACE": "2", "MAX_ATTEMPTS": "2", "LEASE": "60"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server


@pytest.fixture
async def agent(slurm_server: Server, slurm: SlurmCluster) -> AsyncIterator[AgentProcess]:
    """An agent on the submit host, which is the node as well; not started yet."""
    agent = AgentProcess(slurm_server, "login")
    yield agent
    if agent.process is not None:
        await agent.kill()
    slurm.cancel_all()


@pytest.fixture
def stand_in(slurm: SlurmCluster, tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "stand-in", slurm.environment)


async def _start(agent: AgentProcess, slurm: SlurmCluster | StandIn, *arguments: str) -> None:
    await agent.start(
        *("--executor", "slurm", "--slurm-file-system", "2", *arguments),
        environment=slurm.environment,
    )


async def _details(server: Server, job: int) -> dict[str, Any]:
    return (await curl(f"{server.url}/jobs/{job}")).json()


async def _waits_for(server: Server, job: int, words: str, seconds: float = 30) -> dict[str, Any]:
    """Wait until the job says that it waits for this reason; returns its details."""
    deadline = time.monotonic() + seconds
    while words not in str((details := await _details(server, job))["waiting_reason"]):
        assert time.monotonic() < deadline, details
        await asyncio.sleep(0.1)
    return details


@contextmanager
def _drained_node(slurm: SlurmCluster) -> Iterator[None]:
    slurm.command("scontrol", "update", f"nodename={NODE}", "state=drain", "reason=test")
    try:
        yield
    finally:
        slurm.command("scontrol", "update", f"nodename={NODE}", "state=resume")


async def test_jobs_end_as_they_would_on_the_agents_own_machine(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster
) -> None:
    await _start(agent, slurm)
    job = await slurm_server.upload(
        'cat input; echo $SLURM_JOB_ID > number; echo "$ORCHESTRATOR_JOB_ID" >&2;'
        " mkdir a; echo deep > a/b",
        {"input": b"hi"},
    )
    failing = await slurm_server.upload("exit 7")
    signalled = await slurm_server.upload("kill -SEGV $$")
    (slurm_server.directory / "run.sh").write_text("sleep 600 & sleep 600")
    answer = await curl(
        *(f"{slurm_server.url}/upload", "-F", "file=@run.sh", "-F", "user_id=1"),
        *("-F", "service=example", "-F", "timeout=1"),
        cwd=slurm_server.directory,
    )
    late = int(answer.json()["id"])

    result = await slurm_server.result(job)
    assert result.read("stdout.log") == b"hi"
    assert result.read("stderr.log").decode().strip() == str(job)
    assert result.read("a/b") == b"deep\n"
    assert int(result.read("number")) > 0
    states = ["Queued", "Processing", "Submitted", "Running", "Completed"]
    assert slurm_server.transitions(job) == states
    assert "exit code 7" in (await slurm_server.wait(failing, "Failed"))["message"]
    assert "signal 11" in (await slurm_server.wait(signalled, "Failed"))["message"]
    assert "timed out after 1 s" in (await slurm_server.wait(late, "Failed"))["message"]
    # nothing is left, neither here nor there
    await eventually(lambda: not list((agent.workdir / "attempts").iterdir()), "tidied up")
    assert not list((agent.workdir / "slurm").iterdir())


async def test_a_job_sees_no_secret_and_its_script_is_on_no_command_line(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster, tmp_path: Path
) -> None:
    token = slurm_server.query("SELECT value FROM setting WHERE name = 'agent_token'")[0][0]
    token_file = tmp_path / "token"
    token_file.write_text(token)
    token_file.chmod(0o600)
    await _start(agent, slurm, "--token-file", str(token_file))
    job = await slurm_server.upload(
        "env; tr '\\0' ' ' < /proc/$PPID/cmdline; tr '\\0' '\\n' < /proc/$PPID/environ",
        {"weird $(name) 'x'.txt": b"1"},
    )
    printed = (await slurm_server.result(job)).read("stdout.log").decode()
    assert token not in printed
    assert "SLURM_JOB_ID=" in printed
    assert "weird" not in printed
    assert "SLURM_JWT" not in printed


async def test_a_job_that_waits_in_slurm_says_why_and_can_be_ended(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster
) -> None:
    await _start(agent, slurm)
    with _drained_node(slurm):
        job = await slurm_server.upload("echo $SLURM_JOB_ID")
        cancelled = await slurm_server.upload("true")
        unwanted = await slurm_server.upload("true")
        details = await _waits_for(slurm_server, job, "in Slurm as ")
        assert "Nodes required for job are DOWN" in details["waiting_reason"] or (
            "ReqNodeNotAvail" in (await _waits_for(slurm_server, job, ": "))["waiting_reason"]
        )
        assert details["status"] == "Submitted"
        reason = (await _waits_for(slurm_server, cancelled, "in Slurm as "))["waiting_reason"]
        await _waits_for(slurm_server, unwanted, "in Slurm as ")

        # by the cluster's admin: no second attempt
        number = reason.split()[3].rstrip(":;")
        slurm.command("scancel", number)
        ended = await slurm_server.wait(cancelled, "Failed")
        assert f"cancelled in Slurm: job {number}" in ended["message"]
        assert slurm_server.transitions(cancelled)[-2:] == ["Submitted", "Failed"]
        # by the user
        assert (await curl("-X", "POST", f"{slurm_server.url}/terminate/{unwanted}")).status == 200
        assert slurm_server.transitions(unwanted)[-1] == "Killed"
        assert sorted(slurm.job_states()) == ["CANCELLED", "CANCELLED", "PENDING"]
    assert (await slurm_server.result(job)).read("stdout.log").strip()
    assert (await _details(slurm_server, job))["waiting_reason"] is None


async def test_a_running_job_shows_its_output_and_its_files_and_is_ended_with_its_tree(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster
) -> None:
    await _start(agent, slurm)
    script = (
        "trap 'echo told; exit 0' TERM; echo alive; echo part > file;"
        " setsid sleep 1000 & while true; do sleep 0.1; done"
    )
    job = await slurm_server.upload(script)
    await slurm_server.wait(job, "Running")
    url = slurm_server.url
    await _eventually_in(b"alive", f"{url}/jobs/{job}/logs?stream=stdout")
    partial = await curl(f"{url}/download_partial/{job}")
    assert partial.status == 200
    assert b"file" in partial.body
    assert (await curl("-X", "POST", f"{url}/terminate/{job}")).status == 200
    assert slurm_server.transitions(job)[-1] == "Killed"
    assert slurm_server.stored_result(job).read("stdout.log") == b"alive\ntold\n"
    # its environment tells the job's processes
    mark = str(agent.workdir / "attempts")
    for process in slurm.processes():
        with contextlib.suppress(psutil.Error):
            assert mark not in process.environ().get("ORCHESTRATOR_JOB_DIRECTORY", "")


async def _eventually_in(words: bytes, url: str) -> None:
    deadline = time.monotonic() + 40
    while words not in (answer := await curl(url)).body:
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.1)


async def test_jobs_survive_the_death_of_the_agent_in_slurms_queue_and_on_the_node(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster, tmp_path: Path
) -> None:
    await _start(agent, slurm)
    script = "echo run >> {0}/{1}; until [ -e {0}/go ]; do sleep 0.05; done"
    running = await slurm_server.upload(script.format(tmp_path, "running"))
    await slurm_server.wait(running, "Running")
    with _drained_node(slurm):
        waiting = await slurm_server.upload(script.format(tmp_path, "waiting"))
        await _waits_for(slurm_server, waiting, "in Slurm as")
        await agent.kill()
        (tmp_path / "go").touch()
        await _start(agent, slurm)
        await slurm_server.wait(running, "Completed")
        assert slurm_server.transitions(waiting)[-1] == "Submitted"
    await slurm_server.wait(waiting, "Completed")
    assert lines(tmp_path / "running") == lines(tmp_path / "waiting") == ["run"]
    await eventually(lambda: slurm.job_states() == ["COMPLETED", "COMPLETED"], "both, once")


async def test_an_answer_of_sbatch_that_is_lost_or_late_submits_nothing_twice(
    slurm_server: Server,
    agent: AgentProcess,
    slurm: SlurmCluster,
    stand_in: StandIn,
    tmp_path: Path,
) -> None:
    stand_in.put(
        "sbatch",
        f'echo called >> {tmp_path}/calls; "$REAL/sbatch" "$@" > /dev/null\n'
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation'"
        " >&2\nexit 1",
    )
    await _start(agent, stand_in)
    lost = await slurm_server.upload(f"echo run >> {tmp_path}/lost")
    await slurm_server.wait(lost, "Completed")
    # the agent dies while sbatch has submitted, and has not said so
    stand_in.put(
        "sbatch",
        f'echo called >> {tmp_path}/calls; "$REAL/sbatch" "$@"; touch {tmp_path}/late; sleep 600',
    )
    late = await slurm_server.upload(f"echo run >> {tmp_path}/runs")
    await eventually((tmp_path / "late").exists, "the late sbatch has submitted")
    await agent.kill()
    await _start(agent, stand_in)
    await slurm_server.wait(late, "Completed")
    assert lines(tmp_path / "lost") == lines(tmp_path / "runs") == ["run"]
    assert lines(tmp_path / "calls") == ["called", "called"]
    await eventually(lambda: slurm.job_states() == ["COMPLETED", "COMPLETED"], "both, once")


async def test_of_two_batch_jobs_of_an_attempt_one_runs_it(
    slurm_server: Server,
    agent: AgentProcess,
    slurm: SlurmCluster,
    stand_in: StandIn,
    tmp_path: Path,
) -> None:
    # what a submission that Slurm takes after it has been given up would come to
    stand_in.put(
        "sbatch",
        f'cat > {tmp_path}/script; "$REAL/sbatch" "$@" < {tmp_path}/script > /dev/null\n'
        f'"$REAL/sbatch" "$@" < {tmp_path}/script',
    )
    await _start(agent, stand_in)
    job = await slurm_server.upload(
        f"echo run >> {tmp_path}/runs; until [ -e {tmp_path}/go ]; do sleep 0.05; done; echo done"
    )
    await eventually(lambda: "FAILED" in slurm.job_states(), "one finds it taken, and ends")
    (tmp_path / "go").touch()
    assert (await slurm_server.result(job)).read("stdout.log") == b"done\n"
    assert lines(tmp_path / "runs") == ["run"]
    assert len(slurm.job_states()) == 2


async def test_who_ends_a_job_in_slurm_decides_whether_it_is_run_again(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster, tmp_path: Path
) -> None:
    await _start(agent, slurm)
    script = "echo $SLURM_JOB_ID >> {0}/{1}; until [ -e {0}/go ]; do sleep 0.05; done"
    cancelled = await slurm_server.upload(script.format(tmp_path, "cancelled"))
    await eventually(lambda: len(lines(tmp_path / "cancelled")) == 1, "it runs")
    slurm.command("scancel", lines(tmp_path / "cancelled")[0])
    ended = await slurm_server.wait(cancelled, "Failed")
    assert "cancelled in Slurm" in ended["message"]
    assert len(lines(tmp_path / "cancelled")) == 1
    # not by anybody: the node fails
    lost = await slurm_server.upload(script.format(tmp_path, "lost"))
    await eventually(lambda: len(lines(tmp_path / "lost")) == 1, "it runs")
    slurm.command("scontrol", "update", f"nodename={NODE}", "state=down", "reason=test")
    await eventually(lambda: "NODE_FAIL" in agent.log(), "the agent hears of it", 90)
    slurm.resume_node()
    await eventually(lambda: len(lines(tmp_path / "lost")) == 2, "it runs again", 90)
    (tmp_path / "go").touch()
    await slurm_server.wait(lost, "Completed")
    history = (await curl(f"{slurm_server.url}/jobs/{lost}/history")).json()["history"]
    assert any("NODE_FAIL" in line["message"] for line in history)


async def test_a_slurmctld_that_is_away_loses_nothing_and_the_agent_says_so(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster, tmp_path: Path
) -> None:
    await _start(agent, slurm)
    script = "echo run >> {0}/{1}; until [ -e {0}/go ]; do sleep 0.05; done"
    running = await slurm_server.upload(script.format(tmp_path, "running"))
    await slurm_server.wait(running, "Running")
    slurm.stop_controller()
    try:
        new = await slurm_server.upload(script.format(tmp_path, "new"))
        (tmp_path / "go").touch()
        # its end is known without Slurm
        await slurm_server.wait(running, "Completed")

        async def problem() -> str:
            agents = (await curl(f"{slurm_server.url}/agents")).json()["agents"]
            return str(agents[0]["problem"])

        deadline = time.monotonic() + 40
        while "Slurm has not answered since" not in await problem():
            assert time.monotonic() < deadline, agent.log()
            await asyncio.sleep(0.2)
        await _waits_for(slurm_server, new, "not certain yet whether Slurm has the job")
    finally:
        slurm.start_controller()
    await slurm_server.wait(new, "Completed", seconds=60)
    assert lines(tmp_path / "new") == lines(tmp_path / "running") == ["run"]
    await _eventually_in(b'"problem": null', f"{slurm_server.url}/agents")


async def test_a_job_that_is_not_listed_or_in_an_unknown_state_has_not_ended(
    slurm_server: Server,
    agent: AgentProcess,
    slurm: SlurmCluster,
    stand_in: StandIn,
    tmp_path: Path,
) -> None:
    stand_in.put("squeue", f"echo asked >> {tmp_path}/asked; exit 0")
    await _start(agent, stand_in)
    script = "echo run >> {0}/{1}; until [ -e {0}/go ]; do sleep 0.05; done"
    unlisted = await slurm_server.upload(script.format(tmp_path, "unlisted"))
    await slurm_server.wait(unlisted, "Running")
    asked = len(lines(tmp_path / "asked"))
    await eventually(lambda: len(lines(tmp_path / "asked")) > asked + 1, "asked again", 30)
    stand_in.put("squeue", '"$REAL/squeue" "$@" | sed "s/|RUNNING|/|MOVED_TO_THE_MOON|/"')
    unknown = await slurm_server.upload(script.format(tmp_path, "unknown"))
    await slurm_server.wait(unknown, "Running")
    (tmp_path / "go").touch()
    await slurm_server.wait(unlisted, "Completed")
    await slurm_server.wait(unknown, "Completed")
    assert lines(tmp_path / "unlisted") == lines(tmp_path / "unknown") == ["run"]


async def test_a_refusal_fails_the_job_or_sets_the_agent_aside_by_whose_fault_it_is(
    tmp_path: Path, slurm: SlurmCluster
) -> None:
    environment = {"SERVICE_EXAMPLE_MAX_MEMORY": "1T"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        agent = AgentProcess(server, "login")
        await _start(agent, slurm)
        # more than any node has: no other way of asking would help
        (server.directory / "run.sh").write_text("true")
        answer = await curl(
            *(f"{server.url}/upload", "-F", "file=@run.sh", "-F", "user_id=1"),
            *("-F", "service=example", "-F", "memory=900G"),
            cwd=server.directory,
        )
        ended = await server.wait(int(answer.json()["id"]), "Failed")
        assert "Memory specification can not be satisfied" in ended["message"]
        assert len((await _details(server, int(answer.json()["id"])))["attempts"]) == 1
        # a mistake of the operator's, which all jobs of the agent meet
        await agent.kill()
        await _start(agent, slurm, "--slurm-options", "-pnowhere")
        await server.upload("true")
        await _eventually_in(b"invalid partition specified: nowhere", f"{server.url}/agents")
        shown = await _shown(server)
        assert "invalid partition specified: nowhere" in shown["set_aside"]
        assert shown["services_set_aside"] == []
        await agent.kill()
        slurm.cancel_all()


async def test_wrong_options_of_one_service_set_that_aside_and_others_go_on(
    tmp_path: Path, slurm: SlurmCluster
) -> None:
    environment = {
        "SERVICE_EXAMPLE_SLURM_OPTIONS": "--comment=right",
        "SERVICE_OTHER_SLURM_OPTIONS": "--partition=later",
        "SERVICE_OTHER_RUNS_PER_USER": "20",
        "SERVICE_OTHER_MAX_RUNS": "20",
    }
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        agent = AgentProcess(server, "login")
        await _start(agent, slurm)
        misled = [await server.upload("true", service="other") for _ in range(10)]
        await _eventually_in(b'"services_set_aside": [{', f"{server.url}/agents")
        shown = await _shown(server)
        (aside,) = shown["services_set_aside"]
        assert aside["service"] == "other"
        assert "invalid partition specified: later" in aside["reason"]
        assert shown["set_aside"] is None
        await server.wait(await server.upload("true"), "Completed")
        await _waits_for(server, misled[-1], "this service is set aside on agent login: ")
        # the cluster is mended: its jobs are tried again after a pause, first one, and all once
        # Slurm has taken that one, whenever it may run
        with _drained_node(slurm):
            slurm.command("scontrol", "create", "partitionname=later", f"nodes={NODE}")
            await _waits_for(server, misled[-1], "in Slurm as ", seconds=90)
        for job in misled:
            await server.wait(job, "Completed", seconds=90)
        assert (await _shown(server))["services_set_aside"] == []
        await agent.kill()
        slurm.cancel_all()


async def _shown(server: Server) -> dict[str, Any]:
    """Return what is said of the one agent."""
    (shown,) = (await curl(f"{server.url}/agents")).json()["agents"]
    assert isinstance(shown, dict)
    return shown


_GREEDY = """
squeue --noheader --jobs $SLURM_JOB_ID --format '%k %m %b'
exec python3 -c 'import time; x = b"x" * (300 << 20); time.sleep(600)'
"""


async def test_memory_over_the_limit_and_the_options_of_a_service_hold_in_slurm(
    tmp_path: Path, slurm: SlurmCluster
) -> None:
    environment = {
        "SERVICE_EXAMPLE_MEMORY": "64M",
        "SERVICE_EXAMPLE_SLURM_OPTIONS": "--comment=ours",
        "SERVICE_OTHER_SLURM_OPTIONS": "--wrap=true",
    }
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        agent = AgentProcess(server, "login")
        await _start(agent, slurm)
        job = await server.upload(_GREEDY)
        misled = await server.upload("true", service="other")
        ended = await server.wait(job, "Failed")
        assert "more than its 64 MiB" in ended["message"].replace("MB", "MiB")
        assert server.stored_result(job).read("stdout.log").split()[:2] == [b"ours", b"128M"]
        usage = (await _details(server, job))["usage"]
        assert usage["peak_memory"] > 64 << 20
        assert usage["wall_seconds"] > 0
        # it ends only after many tries, with pauses that grow: how long that takes is not of Slurm
        refused = b"the agent itself sets '--wrap=true'"
        await _eventually_in(refused, f"{server.url}/jobs/{misled}/history")
        await agent.kill()
        slurm.cancel_all()


_LATE = """#!/bin/sh
# a file system that shows ten seconds later what was written: the job runs in another directory
attempt=$5
mkdir {elsewhere}
cp -a $attempt {elsewhere}/
sed -i "s#$attempt#{elsewhere}/$(basename $attempt)#g" {elsewhere}/*/order
{python} $1 $2 $3 $4 {elsewhere}/$(basename $attempt) /nowhere $7 $8 $9 ${{10}}
"""


@pytest.mark.soak
async def test_a_file_system_that_shows_the_exit_record_10_s_late_does_not_lose_the_job(
    slurm_server: Server, agent: AgentProcess, slurm: SlurmCluster, tmp_path: Path
) -> None:
    wrapper, elsewhere = tmp_path / "python", tmp_path / "elsewhere"
    wrapper.write_text(_LATE.format(elsewhere=elsewhere, python=sys.executable))
    wrapper.chmod(0o755)
    await _start(agent, slurm, "--slurm-file-system", "40", "--slurm-python", str(wrapper))
    job = await slurm_server.upload(f"echo run >> {tmp_path}/runs; echo out")
    await eventually(lambda: bool(list(elsewhere.glob("*/nothing-left"))), "the job has ended")
    await eventually(lambda: "event=ended_in_slurm" in agent.log(), "Slurm says so", 40)
    await asyncio.sleep(10)
    attempt = next(elsewhere.iterdir())
    here = agent.workdir / "attempts" / attempt.name
    for name in ("stdout.log", "stderr.log", "slurm-claim", "process", "exit", "nothing-left"):
        (attempt / name).rename(here / name)
    assert (await slurm_server.result(job)).read("stdout.log") == b"out\n"
    assert lines(tmp_path / "runs") == ["run"]
