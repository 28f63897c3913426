"""Bad networks between agent and server: cut, half-open, slow, breaking again and again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from tests.faults.proxy import FaultyProxy
from tests.harness import AgentProcess, Server, curl, eventually, lines

NewAgent = Callable[[str], AgentProcess]


@pytest.fixture
async def proxy(bare_server: Server) -> AsyncIterator[FaultyProxy]:
    async with FaultyProxy(int(bare_server.url.rpartition(":")[2])).running() as proxy:
        yield proxy


async def start_behind(proxy: FaultyProxy, agent: AgentProcess) -> None:
    direct, agent.server.url = agent.server.url, proxy.url
    await agent.start()
    agent.server.url = direct
    await agent.wait_connected()


async def test_a_cut_shorter_than_the_lease_restarts_nothing(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy, tmp_path: Path
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    await start_behind(proxy, new_agent("cut"))
    job_id = await bare_server.upload(
        f"echo x >> {witness}; until [ -e {go} ]; do sleep 0.05; done; echo done > out"
    )
    await eventually(lambda: lines(witness) == ["x"], "it runs")
    for _ in range(5):
        connections = proxy.connections
        proxy.cut()
        await eventually(lambda seen=connections: proxy.connections > seen, "it comes back")  # type: ignore[misc]
    go.touch()
    assert (await bare_server.result(job_id)).read("out") == b"done\n"
    assert lines(witness) == ["x"]
    assert bare_server.transitions(job_id).count("Processing") == 1


@pytest.mark.lease(3)
async def test_a_half_open_connection_is_noticed_and_given_up(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    script = f"echo $ORCHESTRATOR_ATTEMPT >> {witness}; echo $ORCHESTRATOR_ATTEMPT > out; "
    script += "[ $ORCHESTRATOR_ATTEMPT = 2 ] || sleep 1000"
    behind, other = new_agent("behind"), new_agent("other")
    await start_behind(proxy, behind)
    job_id = await bare_server.upload(script)
    await eventually(lambda: lines(witness) == ["1"], "it runs")
    proxy.freeze()
    await eventually(lambda: "event=agent_silent agent=behind" in bare_server.log(), "noticed")
    await other.start()
    assert (await bare_server.result(job_id)).read("out") == b"2\n"
    proxy.thaw()
    attempts = behind.workdir / "attempts"
    await eventually(lambda: os.listdir(attempts) == [], "the old attempt is dropped")
    assert not [p for p in bare_server.processes() if p.name() == "sleep"]
    assert lines(witness) == ["1", "2"]


async def test_a_connection_that_breaks_every_few_hundred_kilobytes_loses_no_byte(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy
) -> None:
    content = os.urandom(3_000_000)
    await start_behind(proxy, new_agent("torn"))
    proxy.cut_after = 700_000
    proxy.cut()
    job_id = await bare_server.upload("cat data data > twice; rm data", {"data": content})
    archive = await bare_server.result(job_id, seconds=60)
    assert archive.read("twice") == content * 2
    assert proxy.connections > 10
    # its Assign may be lost on the way, and then it is sent again; what was whole is not
    assert bare_server.transitions(job_id).count("Submitted") == 1
    assert bare_server.transitions(job_id).count("Running") == 1


async def test_a_slow_link_grows_no_memory_and_delays_no_one_else(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy
) -> None:
    slow, quick = new_agent("slow"), new_agent("quick")
    await start_behind(proxy, slow)
    first = await bare_server.upload("head -c 12000000 /dev/urandom > out")
    await bare_server.wait(first, "Running")
    proxy.rate = 5_000_000
    await quick.start()
    assert slow.process is not None
    processes = [psutil.Process(bare_server.pid), psutil.Process(slow.process.pid)]
    before = [process.memory_info().rss for process in processes]
    grown = [0, 0]
    deadline = time.monotonic() + 60
    while (await bare_server.status(first))["status"] == "Running":
        assert time.monotonic() < deadline
        for index, process in enumerate(processes):
            grown[index] = max(grown[index], process.memory_info().rss - before[index])
        await bare_server.result(await bare_server.upload("true", user=2))
        assert (await curl(f"{bare_server.url}/health")).status == 200
    assert max(grown) < 48 * 1024 * 1024
    assert len((await bare_server.result(first)).read("out")) == 12_000_000
    assert bare_server.transitions(first).count("Processing") == 1


async def test_an_agent_finds_a_server_that_was_away_for_a_while(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy
) -> None:
    await start_behind(proxy, new_agent("patient"))
    proxy.is_down = True
    proxy.cut()
    job_id = await bare_server.upload("true")
    await asyncio.sleep(0.5)  # the time that the network is down
    proxy.is_down = False
    await bare_server.result(job_id)


async def test_a_long_way_makes_a_job_later_and_restarts_nothing(
    bare_server: Server, new_agent: NewAgent, proxy: FaultyProxy
) -> None:
    content = os.urandom(6_000_000)
    proxy.delay = 0.2
    await start_behind(proxy, new_agent("far"))
    job_id = await bare_server.upload("cat data", {"data": content})
    endless = await bare_server.upload("sleep 1000")
    assert (await bare_server.result(job_id)).read("stdout.log") == content
    await bare_server.wait(endless, "Running")
    assert (await curl("-X", "POST", f"{bare_server.url}/terminate/{endless}")).status == 200
    assert "event=killed" not in bare_server.log(), "the server gave it up"
    assert "run.sh" in bare_server.stored_result(endless).namelist()
    for ended in (job_id, endless):
        assert bare_server.transitions(ended).count("Processing") == 1
    assert proxy.connections == 1
