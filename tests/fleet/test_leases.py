"""Crashes, lost agents and strangers: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from config import AGENT_TOKEN_VARIABLE
from tests.harness import (
    POLL_SECONDS,
    PROJECT,
    AgentProcess,
    Server,
    curl,
    eventually,
    lines,
    run,
    running_server,
)
from wire import codec, messages
from wire.frames import encode_frame

NewAgent = Callable[[str], AgentProcess]


async def test_every_job_completes_after_the_server_was_killed(
    server: Server, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    script = f"echo $ORCHESTRATOR_JOB_ID >> {witness}; sleep 0.3; echo $ORCHESTRATOR_JOB_ID > out"
    jobs = [await server.upload(script, user=number) for number in range(16)]
    for seen in (4, 8):
        await eventually(lambda seen=seen: len(lines(witness)) >= seen, "jobs go on")  # type: ignore[misc]
        await server.kill()
        await server.start("--slots", "4")
    for job_id in jobs:
        archive = await server.result(job_id)
        assert archive.read("out") == f"{job_id}\n".encode()
    assert sorted(map(int, lines(witness))) == jobs, "each was started exactly once"


async def test_a_job_survives_its_agent_and_is_adopted(server: Server, tmp_path: Path) -> None:
    witness, go, end = tmp_path / "witness", tmp_path / "go", tmp_path / "end"
    os.mkfifo(go)
    os.mkfifo(end)
    waiting = await server.upload(f"echo a >> {witness}; read line < {go}; echo $line > out")
    ending = await server.upload(f"echo b >> {witness}; read line < {end}; exit 5")
    await eventually(lambda: len(lines(witness)) == 2, "both run")
    agent = psutil.Process(await server.agent_pid())
    agent.suspend()
    await asyncio.to_thread(end.write_text, "unseen\n")
    agent.kill()
    status = await server.wait(ending)
    assert (status["status"], status["message"]) == ("Failed", "run.sh ended with exit code 5")
    await asyncio.to_thread(go.write_text, "adopted\n")
    assert (await server.result(waiting)).read("out") == b"adopted\n"
    assert sorted(lines(witness)) == ["a", "b"], "neither was started again"


@pytest.mark.lease(3)
async def test_a_job_of_a_lost_agent_goes_to_another_and_the_old_attempt_is_superseded(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    script = f"echo $ORCHESTRATOR_ATTEMPT $$ >> {witness}; echo $ORCHESTRATOR_ATTEMPT > out; "
    script += "if [ $ORCHESTRATOR_ATTEMPT = 1 ]; then sleep 1000; fi"
    first, second = new_agent("first"), new_agent("second")
    await first.start()
    await first.wait_connected()
    job_id = await bare_server.upload(script)
    await eventually(lambda: len(lines(witness)) == 1, "the first attempt runs")
    first.send(signal.SIGSTOP)
    await second.start()
    archive = await bare_server.result(job_id)
    assert archive.read("out") == b"2\n"
    old_shell = int(lines(witness)[0].split()[1])
    assert psutil.pid_exists(old_shell)
    first.send(signal.SIGCONT)
    await eventually(lambda: not psutil.pid_exists(old_shell), "the old attempt is killed")
    await eventually(lambda: os.listdir(first.workdir / "attempts") == [], "and cleaned")
    assert len(lines(witness)) == 2
    reasons = bare_server.query("SELECT reason FROM history WHERE to_state = 'Queued'")
    assert reasons[1] == ("agent first was away for more than 3 s",)


async def test_a_time_limit_holds_while_no_agent_is_there(
    tmp_path: Path,
) -> None:
    async with running_server(
        tmp_path / "server",
        environment={"SERVICE_EXAMPLE_TIMEOUT": "1", "KILL_GRACE": "0.2"},
    ) as server:
        witness = tmp_path / "witness"
        job_id = await server.upload(f"echo $$ > {witness}; sleep 1000")
        await eventually(lambda: bool(lines(witness)), "it runs")
        shell = int(lines(witness)[0])
        await server.kill()  # and its agent with it
        await eventually(lambda: not psutil.pid_exists(shell), "the limit is kept all the same")
        await server.start()
        status = await server.wait(job_id)
        assert (status["status"], status["message"]) == ("Failed", "timed out after 1 s")


async def test_an_agent_that_comes_back_within_its_lease_loses_nothing(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    agent = new_agent("short")
    await agent.start()
    job_id = await bare_server.upload(
        f"echo x >> {witness}; until [ -e {go} ]; do sleep 0.05; done; echo done > out"
    )
    await eventually(lambda: len(lines(witness)) == 1, "it runs")
    await agent.kill()
    await agent.start()
    go.touch()
    assert (await bare_server.result(job_id)).read("out") == b"done\n"
    assert lines(witness) == ["x"]


async def test_a_draining_agent_finishes_its_job_and_takes_no_other(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    agent = new_agent("drains")
    await agent.start("--slots", "2")
    job_id = await bare_server.upload(f"read line < {go}; echo $line > out")
    await bare_server.wait(job_id, "Running")
    agent.send(signal.SIGTERM)
    await eventually(lambda: "event=agent_drains" in bare_server.log(), "the server knows")
    other = await bare_server.upload("true")
    await asyncio.to_thread(go.write_text, "finished\n")
    assert (await bare_server.result(job_id)).read("out") == b"finished\n"
    assert agent.process is not None
    assert await asyncio.wait_for(agent.process.wait(), 60) == 0
    assert bare_server.transitions(other) == ["Queued"]


async def test_a_second_signal_and_the_drain_limit_leave_the_job_to_the_next_start(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    os.mkfifo(go)
    agent = new_agent("twice")
    await agent.start()
    job_id = await bare_server.upload(f"echo x >> {witness}; read line < {go}; echo $line > out")
    await bare_server.wait(job_id, "Running")
    agent.send(signal.SIGTERM)
    await eventually(lambda: "event=draining" in agent.log(), "it drains")
    agent.send(signal.SIGTERM)
    assert agent.process is not None
    assert await asyncio.wait_for(agent.process.wait(), 60) == 0
    await agent.start("--drain-timeout", "0.1")
    await eventually(lambda: agent.log().count("event=connected") == 2, "it is back")
    agent.send(signal.SIGTERM)
    assert await asyncio.wait_for(agent.process.wait(), 60) == 0
    await agent.start()
    await asyncio.to_thread(go.write_text, "adopted\n")
    assert (await bare_server.result(job_id)).read("out") == b"adopted\n"
    assert lines(witness) == ["x"]


async def test_a_job_whose_supervisor_is_killed_is_started_again_up_to_the_limit(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    agent = new_agent("loser")
    await agent.start()
    script = f"echo $ORCHESTRATOR_ATTEMPT >> {witness}; sleep 1000 & kill -9 $PPID; wait"
    status = await bare_server.wait(await bare_server.upload(script))
    assert status["status"] == "Failed"
    assert "given up after 3 attempts" in status["message"]
    assert lines(witness) == ["1", "2", "3"]
    assert not [p for p in bare_server.processes() if p.name() == "sleep"]


async def _set_aside(server: Server) -> str | None:
    """Return why the one agent is set aside, None if it is not."""
    (shown,) = (await curl(f"{server.url}/agents")).json()["agents"]
    reason: str | None = shown["set_aside"]
    return reason


async def test_a_job_that_no_agent_can_hold_waits_with_the_reason_until_one_can(
    bare_server: Server, new_agent: NewAgent
) -> None:
    agent = new_agent("broken")
    await agent.start()
    await agent.wait_connected()
    attempts = agent.workdir / "attempts"
    attempts.rmdir()
    attempts.write_text("in the way")
    job_id = await bare_server.upload("true")
    async with asyncio.timeout(60):
        while (reason := await _set_aside(bare_server)) is None:
            await asyncio.sleep(POLL_SECONDS)
    assert "attempts" in reason
    job = (await curl(f"{bare_server.url}/jobs/{job_id}")).json()
    assert job["status"] in ("Queued", "Processing")
    attempts.unlink()
    await bare_server.result(job_id, seconds=60)
    assert await _set_aside(bare_server) is None


async def test_large_transfers_go_on_where_they_were_after_kills(
    bare_server: Server, new_agent: NewAgent
) -> None:
    agent = new_agent("mover")
    content = os.urandom(16_000_000)
    script = "sha256sum data > sum; cat data data > twice; rm data"
    job_id = await bare_server.upload(script, {"data": content})
    for _ in range(3):
        await agent.start()
        await eventually(lambda: bare_server.transitions(job_id)[1:] != [], "it was assigned")
        await agent.kill()
        await bare_server.kill()
        await bare_server.start("--no-agent")
    await agent.start()
    archive = await bare_server.result(job_id)
    assert archive.read("twice") == content * 2


async def test_an_agent_gets_only_services_that_it_offers_and_up_to_its_slots(
    tmp_path: Path,
) -> None:
    environment = {"SERVICE_DOCK_MAX_RUNS": "10", "SERVICE_FOLD_MAX_RUNS": "10"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        docker = AgentProcess(server, "docker")
        await docker.start("--services", "dock", "--slots", "2")
        try:
            go = tmp_path / "go"
            script = f"while [ ! -e {go} ]; do sleep 0.05; done"
            fold = await server.upload(script, service="fold")
            docks = [await server.upload(script, service="dock") for _ in range(3)]
            running = "SELECT count(*) FROM job WHERE state = 'Running'"
            await eventually(lambda: server.query(running) == [(2,)], "both slots are busy")
            assert (await server.status(docks[2]))["status"] == "Queued"
            go.touch()
            for job_id in docks:
                await server.wait(job_id, "Completed")
            assert (await server.status(fold))["status"] == "Queued"
        finally:
            await docker.kill()


async def test_a_server_needs_the_agent_token(tmp_path: Path) -> None:
    environment = {"TOKENS": "optional"}
    async with running_server(
        tmp_path / "server", "--host", "0.0.0.0", "--no-agent", environment=environment
    ) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        stranger = AgentProcess(server, "stranger")
        await stranger.start(environment={AGENT_TOKEN_VARIABLE: "x" * 32})
        assert stranger.process is not None
        assert await asyncio.wait_for(stranger.process.wait(), 60) == 2
        assert "refused the agent token" in stranger.log()
        code, token = await run(
            sys.executable,
            str(PROJECT / "orchestrator.py"),
            *("agent-token", "--db", str(server.database)),
        )
        assert code == 0
        (tmp_path / "token").write_bytes(token)
        friend = AgentProcess(server, "friend")
        await friend.start("--token-file", str(tmp_path / "token"))
        try:
            await server.result(await server.upload("true"))
        finally:
            await friend.kill()


async def test_a_wrong_token_is_refused_on_loopback_too(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("a-token-of-another-server")
    agent = new_agent("wrong")
    await agent.start("--token-file", str(tmp_path / "token"))
    assert agent.process is not None
    assert await asyncio.wait_for(agent.process.wait(), 60) == 2


async def test_the_embedded_agent_is_started_again_when_it_dies(server: Server) -> None:
    first = await server.agent_pid()
    os.kill(first, signal.SIGKILL)
    await server.result(await server.upload("true"))
    assert await server.agent_pid() != first


async def test_the_embedded_agent_ends_with_a_killed_server(server: Server) -> None:
    agent = await server.agent_pid()
    await server.kill()
    await eventually(lambda: not psutil.pid_exists(agent), "the agent has ended")


def _hello(**changes: object) -> str:
    hello = messages.Hello(messages.PROTOCOL_VERSION, "fake", "i", "fake", "0", 1, None, ())
    return codec.encode(dataclasses.replace(hello, **changes))  # type: ignore[arg-type]


BROKEN_PEERS: list[tuple[list[str | bytes], str]] = [
    (["not json"], "not JSON"),
    ([b"binary"], "hello"),
    ([codec.encode(messages.Heartbeat())], "hello"),
    ([_hello(protocol=99)], "protocol 99"),
    ([_hello(protocol=1)], "protocol 1, server 2: install the same version"),
    ([_hello(name="a b\n")], "agent name"),
    ([_hello(slots=-1)], "slots"),
    ([_hello(), "{}"], "type"),
    ([_hello(), b"x" * 10], "binary frame"),
    ([_hello(), encode_frame(7, 0, b"x")], "unknown stream"),
    ([_hello(), encode_frame(8, 0, b"x")], "does not send INPUT"),
    ([_hello(), _hello()], "does not send Hello"),
]


async def test_a_peer_that_breaks_the_protocol_is_turned_away_with_a_reason(
    bare_server: Server,
) -> None:
    async with aiohttp.ClientSession(headers=bare_server.agent_headers()) as session:
        for frames, reason in BROKEN_PEERS:
            async with session.ws_connect(f"{bare_server.url}/agent") as peer:
                for frame in frames:
                    await (
                        peer.send_str(frame) if isinstance(frame, str) else peer.send_bytes(frame)
                    )
                said = ""
                while not peer.closed:
                    message = await peer.receive(timeout=5)
                    said += str(message.data) + str(message.extra)
                assert reason in said, frames
    assert (await curl(f"{bare_server.url}/health")).status == 200


async def test_an_agent_that_replaces_its_own_half_dead_connection_gets_jobs(
    bare_server: Server,
) -> None:
    async with (
        aiohttp.ClientSession(headers=bare_server.agent_headers()) as session,
        session.ws_connect(f"{bare_server.url}/agent") as old,
    ):
        await old.send_str(_hello())
        assert isinstance(codec.decode(await old.receive_str(timeout=5)), messages.Welcome)
        async with session.ws_connect(f"{bare_server.url}/agent") as new:
            await new.send_str(_hello())
            assert isinstance(codec.decode(await new.receive_str(timeout=5)), messages.Welcome)
            await bare_server.upload("true")
            assert isinstance(codec.decode(await new.receive_str(timeout=5)), messages.Assign)


async def test_a_second_agent_of_one_identity_is_refused_while_the_first_lives(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    first, second = new_agent("twin"), new_agent("copy")
    await first.start()
    await first.wait_connected()
    second.workdir.mkdir()
    for name in ("agent-id", "agent-secret"):
        (second.workdir / name).write_bytes((first.workdir / name).read_bytes())
    await second.start()
    await eventually(lambda: "already connected" in second.log(), "the copy is told why")
    await first.kill()
    await second.wait_connected()


@pytest.mark.lease(3)
async def test_a_server_that_was_stopped_for_longer_than_the_lease_restarts_nothing(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    holder, idle = new_agent("holder"), new_agent("idle")
    await holder.start()
    await holder.wait_connected()
    script = f"echo x >> {witness}; while [ ! -e {go} ]; do sleep 0.05; done; echo done > out"
    job_id = await bare_server.upload(script)
    await eventually(lambda: lines(witness) == ["x"], "it runs")
    await idle.start()
    await idle.wait_connected()
    for _ in range(2):
        os.kill(bare_server.pid, signal.SIGSTOP)
        await asyncio.sleep(4)  # the fault: longer than the lease of three seconds
        os.kill(bare_server.pid, signal.SIGCONT)
        assert (await curl(f"{bare_server.url}/health")).status == 200
    go.touch()
    assert (await bare_server.result(job_id)).read("out") == b"done\n"
    assert lines(witness) == ["x"]
    assert bare_server.transitions(job_id).count("Processing") == 1
