"""Jobs are launched through a fork server, which may die at any moment and holds no secret."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.harness import AgentProcess, Server, curl, eventually, lines


def fork_servers(agent: int) -> list[psutil.Process]:
    """Return the fork servers of an agent process that have not ended."""
    found = []
    for process in psutil.Process(agent).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(word.endswith("forkserver.py") for word in process.cmdline()):
                found.append(process)
    return found


def zombies_of(process: psutil.Process) -> list[psutil.Process]:
    """Return the children that nobody has waited for."""
    return [child for child in process.children() if child.status() == psutil.STATUS_ZOMBIE]


async def test_fork_servers_that_are_killed_cost_no_job_and_start_none_twice(
    server: Server, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    os.mkfifo(go)
    waiting = await server.upload(f"echo 0 >> {witness}; read line < {go}; echo $line > out")
    await eventually(lambda: len(lines(witness)) == 1, "it runs")
    agent = await server.agent_pid()

    async def keep_killing() -> None:
        while True:
            for process in fork_servers(agent):
                process.kill()
            await asyncio.sleep(0.25)  # a new one needs time to come up

    killing = asyncio.create_task(keep_killing())
    others = [await server.upload(f"echo {user} >> {witness}", user=user) for user in range(1, 25)]
    for job_id in others:
        await server.result(job_id)
    killing.cancel()
    await asyncio.to_thread(go.write_text, "survived\n")
    assert (await server.result(waiting)).read("out") == b"survived\n"
    assert sorted(map(int, lines(witness))) == list(range(25)), "each was started exactly once"
    assert server.log().count("event=fork_server_started") > 2
    assert server.query("SELECT count(*) FROM attempt") == [(25,)]


async def test_a_fork_server_that_hangs_delays_jobs_and_loses_none(server: Server) -> None:
    await server.result(await server.upload("true"))
    (process,) = fork_servers(await server.agent_pid())
    process.suspend()
    late, killed = await server.upload("echo late > out"), await server.upload("echo too late")
    await server.wait(late, "Submitted")
    await server.wait(killed, "Submitted")
    await curl("-X", "POST", f"{server.url}/terminate/{killed}")
    process.resume()
    assert (await server.result(late)).read("out") == b"late\n"
    assert (await server.status(killed))["status"] == "Killed"


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
    witness = tmp_path / "witness"
    job_id = await bare_server.upload(f"echo $PPID >> {witness}; sleep 1; echo done > out")
    await eventually(lambda: len(lines(witness)) == 1, "it runs")
    supervisor = psutil.Process(int(lines(witness)[0]))
    assert supervisor.ppid() == fork_server.pid
    await agent.kill()
    await eventually(lambda: not fork_server.is_running(), "the fork server ends, too")
    assert supervisor.is_running()
    await agent.start()
    assert (await bare_server.result(job_id)).read("out") == b"done\n"
    agent.process.terminate()
    assert await asyncio.wait_for(agent.process.wait(), 10) == 0


async def test_what_is_above_a_job_holds_no_socket_and_no_variable_of_the_agent(
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
    assert b"socket:" not in archive.read("files_above")
    assert b"pipe:" not in archive.read("own_files")
