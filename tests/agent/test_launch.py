"""Jobs are run by supervisors that a fork server makes; all may die, none holds a secret."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from agent.supervision.launcher import Launcher, LaunchRequest, LifeLine
from tests.faults.sabotage import through
from tests.harness import AgentProcess, Server, curl, eventually, lines


def fork_servers(agent: int) -> list[psutil.Process]:
    """Return the fork servers of an agent process that have not ended."""
    found = []
    for process in psutil.Process(agent).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith("supervision.forkserver") for word in process.cmdline()):
                found.append(process)
    return found


def zombies_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the children that nobody has waited for."""
    return [child for child in process.children() if child.status() == psutil.STATUS_ZOMBIE]


async def test_fork_servers_that_are_killed_cost_no_job_and_start_none_twice(
    bare_server: Server, new_agent: Callable[[str], AgentProcess], tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    agent = new_agent("broad")
    await agent.start("--slots", "8")
    await agent.wait_connected()
    assert agent.process is not None
    jobs: list[int] = []
    for number in range(8):
        for process in fork_servers(agent.process.pid):
            process.kill()
        # all run at the same time, so that each needs a supervisor of its own
        script = f"echo {number} >> {witness}; until [ -e {go} ]; do sleep 0.05; done"
        jobs.append(await bare_server.upload(script, user=number + 1))
        await eventually(lambda: len(lines(witness)) == len(jobs), "it runs")
    go.touch()
    for job_id in jobs:
        await bare_server.result(job_id)
    assert sorted(map(int, lines(witness))) == list(range(8)), "each was started exactly once"
    assert agent.log().count("event=fork_server_started") > 2
    assert bare_server.query("SELECT count(*) FROM attempt") == [(8,)]


async def test_a_fork_server_that_hangs_delays_jobs_and_loses_none(server: Server) -> None:
    agent = await server.agent_pid()
    await eventually(lambda: len(fork_servers(agent)) == 1, "the fork server is up")
    (process,) = fork_servers(agent)
    process.suspend()
    late, killed = await server.upload("echo late > out"), await server.upload("echo too late")
    await server.wait(late, "Submitted")
    await server.wait(killed, "Submitted")
    await curl("-X", "POST", f"{server.url}/terminate/{killed}")
    process.resume()
    assert (await server.result(late)).read("out") == b"late\n"
    assert (await server.status(killed))["status"] == "Killed"


async def test_a_fork_server_that_never_comes_back_is_replaced(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    agent = new_agent("patient")
    agent.through = through({"constants": {"agent.executors.local._START_SECONDS": 3.0}})
    await agent.start()
    await agent.wait_connected()
    assert agent.process is not None
    (process,) = fork_servers(agent.process.pid)
    process.suspend()
    job_id = await bare_server.upload("echo late > out")
    assert (await bare_server.result(job_id, seconds=60)).read("out") == b"late\n"
    assert "event=fork_server_hangs" in agent.log()
    assert fork_servers(agent.process.pid) != [process]
    assert bare_server.query("SELECT count(*) FROM attempt") == [(1,)]


async def test_a_supervisor_runs_one_job_after_the_other_and_mixes_nothing_up(
    server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    script = f"echo $PPID $ORCHESTRATOR_JOB_ID $PWD >> {witness}; echo $ORCHESTRATOR_JOB_ID > out"
    jobs: list[int] = []
    for end in ("exit 3", "setsid sleep 1000 &", "cd /; rm $OLDPWD/run.sh", "kill -9 $$", "exit 0"):
        jobs.append(await server.upload(f"{script}; {end}"))
        await server.wait(jobs[-1])
    seen = [line.split() for line in lines(witness)]
    assert len({supervisor for supervisor, *_ in seen}) == 1
    assert [int(job_id) for _, job_id, _ in seen] == jobs
    assert len({place for *_, place in seen}) == len(jobs)
    for job_id in jobs:
        assert server.stored_result(job_id).read("out") == b"%d\n" % job_id
    assert not [process for process in server.processes() if process.name() == "sleep"]


async def test_supervisors_killed_while_they_have_no_job_cost_no_attempt(
    server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    for number in (signal.SIGTERM, signal.SIGKILL):
        await server.result(await server.upload(f"echo $PPID >> {witness}"))
        idle = psutil.Process(int(lines(witness)[-1]))
        idle.send_signal(number)
        # as soon as possible: the agent may not have heard of it yet
        await server.result(await server.upload("true"))
        await eventually(lambda idle=idle: not idle.is_running(), "it is gone")  # type: ignore[misc]
    assert server.query("SELECT DISTINCT number FROM attempt") == [(1,)]


async def test_supervisors_without_a_job_end_with_their_agent(
    bare_server: Server, new_agent: Callable[[str], AgentProcess], tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = new_agent("mortal")
    await agent.start()
    await bare_server.result(await bare_server.upload(f"echo $PPID > {witness}"))
    idle = psutil.Process(int(lines(witness)[0]))
    assert idle.is_running()
    await agent.kill()
    await eventually(lambda: not idle.is_running(), "the supervisor ends, too")


async def test_a_late_request_to_kill_a_job_does_not_hit_the_next_one(tmp_path: Path) -> None:
    """The signal is sent when the job has ended and the agent has not heard of it yet."""
    launcher = Launcher(tmp_path, {"PATH": os.environ["PATH"]})
    for number in range(4):
        directory = tmp_path / str(number)
        (directory / "job").mkdir(parents=True)
        (directory / "job" / "run.sh").write_text("true")
        life_line = await launched(launcher, directory)
        # No turn of the event loop here: what the supervisor says meanwhile stays unread.
        pid = int(os.readlink(directory / "process").split()[0])
        wait_for_file(directory / "exit")
        os.kill(pid, signal.SIGTERM)
        assert await life_line.wait_for_end()
        assert exit_code(directory) == 0
    launcher.close()


async def test_a_supervisor_that_dies_before_it_is_asked_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = Launcher(tmp_path, {"PATH": os.environ["PATH"]})
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.sh").write_text("exit 7")
    ask, asked = launcher._ask_for_supervisor, 0

    async def ask_in_vain_at_first(theirs: socket.socket) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            await ask(theirs)

    monkeypatch.setattr(launcher, "_ask_for_supervisor", ask_in_vain_at_first)
    life_line = await launcher.launch(LaunchRequest(tmp_path, {}, None, 1.0, ("bash", "run.sh")))
    assert await life_line.wait_for_end()
    assert exit_code(tmp_path) == 7
    assert asked == 2
    launcher.close()


async def test_what_a_job_gives_up_before_it_runs_its_supervisor_keeps(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {"PATH": os.environ["PATH"]}, "agent.isolation.before_exec")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.sh").write_text("grep NoNewPrivs /proc/self/status /proc/$PPID/status")
    request = LaunchRequest(
        tmp_path, {}, None, 1.0, ("bash", "run.sh"), preparation={"own": {"new_privileges": False}}
    )
    life_line = await launcher.launch(request)
    assert await life_line.wait_for_end()
    own, of_supervisor = (tmp_path / "stdout.log").read_text().splitlines()
    assert own.endswith("1")
    assert of_supervisor.endswith("0")
    launcher.close()


async def test_a_job_whose_preparation_fails_is_not_started(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {"PATH": os.environ["PATH"]}, "agent.isolation.before_exec")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.sh").write_text("touch witness")
    steps = {"own": {"landlock": {"no": "such policy"}, "network": True}}
    request = LaunchRequest(tmp_path, {}, None, 1.0, ("bash", "run.sh"), preparation=steps)
    life_line = await launcher.launch(request)
    assert not await life_line.wait_for_start()
    assert not (tmp_path / "job" / "witness").exists()
    assert "NotPrepared" in (tmp_path / "supervisor.log").read_text()
    launcher.close()


async def test_a_program_that_is_not_there_is_an_exit_code(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, {"PATH": os.environ["PATH"]}, "agent.isolation.before_exec")
    for number, preparation in enumerate((None, {"own": {"new_privileges": False}})):
        directory = tmp_path / str(number)
        (directory / "job").mkdir(parents=True)
        request = LaunchRequest(directory, {}, None, 1.0, ("no-such-program",), preparation)
        life_line = await launcher.launch(request)
        assert await life_line.wait_for_end()
        assert exit_code(directory) == 127
        assert "cannot start no-such-program" in (directory / "stderr.log").read_text()
    launcher.close()


async def launched(launcher: Launcher, directory: Path) -> LifeLine:
    """Have a job run as an agent does: once more if its supervisor has died before."""
    for _ in range(2):
        life_line = await launcher.launch(
            LaunchRequest(directory, {}, None, 1.0, ("bash", "run.sh"))
        )
        if await life_line.wait_for_start():
            return life_line
    raise AssertionError("no supervisor runs the job")


def exit_code(directory: Path) -> int:
    """Return what the exit record says of a job that ended by itself."""
    record = json.loads((directory / "exit").read_text())
    assert record["kind"] == "exited"
    assert isinstance(record["code"], int)
    return record["code"]


def wait_for_file(path: Path) -> None:
    """Wait without a turn of the event loop."""
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is made"
        os.sched_yield()


async def test_the_fork_server_ends_with_its_agent_and_leaves_no_zombie(
    bare_server: Server, new_agent: Callable[[str], AgentProcess], tmp_path: Path
) -> None:
    agent = new_agent("mortal")
    await agent.start()
    for _ in range(3):
        await bare_server.result(await bare_server.upload("true"))
    assert agent.process is not None
    (fork_server,) = fork_servers(agent.process.pid)
    assert zombies_of(fork_server) == []
    witness, go = tmp_path / "witness", tmp_path / "go"
    job_id = await bare_server.upload(
        f"echo $PPID >> {witness}; until [ -e {go} ]; do sleep 0.05; done; echo done > out"
    )
    await eventually(lambda: len(lines(witness)) == 1, "it runs")
    supervisor = psutil.Process(int(lines(witness)[0]))
    assert supervisor.ppid() == fork_server.pid
    await agent.kill()
    await eventually(lambda: not fork_server.is_running(), "the fork server ends, too")
    assert supervisor.is_running()
    await agent.start()
    go.touch()
    assert (await bare_server.result(job_id)).read("out") == b"done\n"
    agent.process.terminate()
    assert await asyncio.wait_for(agent.process.wait(), 60) == 0


async def test_what_is_above_a_job_holds_no_connection_and_no_variable_of_the_agent(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    agent = new_agent("discreet")
    await agent.start(environment={"OTHER_SECRET": "password", "LC_PROOF": "is passed on"})
    job_id = await bare_server.upload(
        "ls -l /proc/$$/fd > own_files; ls -l /proc/$PPID/fd > files_above;"
        "cat /proc/$PPID/environ /proc/$(cut -d' ' -f4 /proc/$PPID/stat)/environ > variables_above"
    )
    archive = await bare_server.result(job_id)
    assert archive.read("variables_above").count(b"LC_PROOF=is passed on") == 2
    assert b"password" not in archive.read("variables_above")
    # its own end of the socket to the agent
    assert archive.read("files_above").count(b"socket:") == 1
    assert b"pipe:" not in archive.read("files_above")
    assert b"pipe:" not in archive.read("own_files")
