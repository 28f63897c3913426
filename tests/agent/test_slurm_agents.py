"""Elastic agents: as many in allocations of a real Slurm as the queue wants."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.executors.slurm_commands import SlurmJob, Standing
from commands.slurm_allocations import AgentSeen, Limits, plan, seconds_of
from config import ConfigError
from tests.harness import PROJECT, Server, curl, eventually, run, running_server
from tests.slurm_cluster import SlurmCluster

_BURST = 40
_IDLE_SECONDS = 2


def _allocation(number: int, state: str) -> SlurmJob:
    return SlurmJob(number, state, "name", "", "None")


def test_it_submits_one_at_a_time_beside_one_that_is_pending() -> None:
    limits = Limits(agents=5, slots=2)
    pending, running = _allocation(1, "PENDING"), _allocation(2, "RUNNING")
    ended = _allocation(3, "FAILED")
    busy = AgentSeen("slurm-2", 0)
    assert plan(0, [], [], limits).submit == 0
    assert plan(100, [], [], limits).submit == 2
    assert plan(2, [], [], limits).submit == 1
    assert plan(100, [], [pending], limits).submit == 1
    assert plan(100, [], [pending, _allocation(4, "PENDING")], limits).submit == 0
    # one that runs and has not connected is on its way
    assert plan(2, [], [running], limits).submit == 0
    assert plan(2, [busy], [running, ended], limits).submit == 1
    # jobs that wait although there are free slots wait for something else
    assert plan(100, [AgentSeen("slurm-2", 1)], [running], limits).submit == 0
    assert plan(0, [busy], [running, pending], limits).withdraw == (1,)


@given(
    queued=st.integers(0, 1000),
    states=st.lists(st.sampled_from(["PENDING", "RUNNING", "FAILED", "ODD"]), max_size=12),
    maximum=st.integers(1, 10),
    slots=st.integers(1, 8),
    free=st.integers(0, 3),
)
def test_there_are_never_more_than_allowed_nor_more_than_two_pending(
    queued: int, states: list[str], maximum: int, slots: int, free: int
) -> None:
    jobs = [_allocation(number, state) for number, state in enumerate(states)]
    agents = [AgentSeen(f"slurm-{job.id}", free) for job in jobs if job.state == "RUNNING"]
    todo = plan(queued, agents, jobs, Limits(maximum, slots))
    living = sum(job.standing is not Standing.ENDED for job in jobs)
    pending = states.count("PENDING")
    assert todo.submit == 0 or living + todo.submit <= maximum
    assert todo.submit == 0 or pending + todo.submit <= 2
    assert todo.submit * slots < queued + slots
    assert not (todo.submit and todo.withdraw)


def test_times_are_read_as_slurm_reads_them() -> None:
    cases = {"30": 1800, "5:30": 330, "4:00:00": 14400, "1-12": 129600, "1-0:0:5": 86405}
    assert {text: seconds_of(text) for text in cases} == cases
    for text in ("", "4h", "-1", "1:2:3:4"):
        with pytest.raises(ConfigError):
            seconds_of(text)


class _Command:
    """``orchestrator slurm-agents``, as a process."""

    def __init__(self, server: Server, directory: Path, environment: Mapping[str, str]) -> None:
        self._server = server
        self._directory = directory
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    def words(self, *arguments: str) -> list[str]:
        return [
            *(sys.executable, str(PROJECT / "orchestrator.py"), "slurm-agents"),
            *("--server", self._server.url, "--token-file", str(self._directory / "token")),
            *("--state", str(self._directory / "state"), "--idle", str(_IDLE_SECONDS), *arguments),
        ]

    async def start(self, *arguments: str) -> None:
        with open(self._directory / "elastic.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.words(*arguments), env=self._environment, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def log(self) -> str:
        return (self._directory / "elastic.log").read_text()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        token = server.query("SELECT value FROM setting WHERE name = 'agent_token'")[0][0]
        (tmp_path / "token").write_text(token)
        (tmp_path / "token").chmod(0o600)
        yield server


@pytest.fixture
async def elastic(server: Server, slurm: SlurmCluster, tmp_path: Path) -> AsyncIterator[_Command]:
    command = _Command(server, tmp_path, slurm.environment)
    yield command
    await command.kill()
    slurm.cancel_all()


async def _busy_names(server: Server) -> list[str]:
    agents = (await curl(f"{server.url}/agents")).json()["agents"]
    return [agent["name"] for agent in agents if agent["is_connected"]]


async def _burst(server: Server, elastic: _Command, slurm: SlurmCluster, count: int) -> None:
    jobs = [await server.upload("echo $ORCHESTRATOR_JOB_ID") for _ in range(count)]
    await elastic.start("--max", "3", "--slots", "2")
    most = 0
    killed = False
    deadline = time.monotonic() + 60 + count
    while server.query("SELECT COUNT(*) FROM job WHERE state = 'Completed'")[0][0] < count:
        assert time.monotonic() < deadline, elastic.log()
        most = max(most, len(await _busy_names(server)))
        if most and not killed:
            # to kill it loses nothing; started again, it finds its allocations
            await elastic.kill()
            await elastic.start("--max", "3", "--slots", "2")
            killed = True
        await asyncio.sleep(0.2)
    assert 1 <= most <= 3
    for job in jobs:
        assert (await server.result(job)).read("stdout.log").decode() == f"{job}\n"
    # and back to zero
    await eventually(lambda: not slurm.command("squeue", "-h").strip(), "no allocation is left", 60)
    assert await _busy_names(server) == []
    rows = server.query("SELECT COUNT(*) FROM attempt")
    assert rows[0][0] == count, "an agent that ended had a job given"


async def test_agents_come_with_the_queue_and_go_when_it_is_empty(
    server: Server, elastic: _Command, slurm: SlurmCluster
) -> None:
    await _burst(server, elastic, slurm, _BURST)


@pytest.mark.soak
async def test_a_burst_of_300_jobs_from_zero_agents_and_back(
    server: Server, elastic: _Command, slurm: SlurmCluster
) -> None:
    await _burst(server, elastic, slurm, 300)


async def test_a_dry_run_submits_nothing_and_shows_no_token(
    server: Server, elastic: _Command, slurm: SlurmCluster, tmp_path: Path
) -> None:
    await server.upload("true")
    words = elastic.words("--max", "2", "--dry-run", "--slurm-options", "--partition=gpu")
    done = await asyncio.create_subprocess_exec(
        *words, env=slurm.environment, stdout=asyncio.subprocess.PIPE
    )
    output = (await done.communicate())[0].decode()
    assert done.returncode == 0
    assert "1 queued, no slot free" in output
    assert "would submit 1" in output
    assert "--partition=gpu" in output
    assert (tmp_path / "token").read_text() not in output
    assert not slurm.command("squeue", "-h").strip()


async def test_allocations_that_come_to_nothing_are_not_submitted_without_end(
    server: Server, elastic: _Command, slurm: SlurmCluster
) -> None:
    await server.upload("true")
    await elastic.start("--max", "2", "--python", "/no/such/python")
    await eventually(lambda: "never connected" in elastic.log(), "it says so", 40)
    assert "event=allocation_failed" in elastic.log()
    assert elastic.log().count("event=allocation_submitted") <= 2
    await eventually(lambda: not slurm.command("squeue", "-h").strip(), "nothing is left")


async def test_an_open_token_file_and_nonsense_are_refused(
    server: Server, elastic: _Command, slurm: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "token").chmod(0o644)
    code, output = await run(
        "env", f"SLURM_CONF={slurm.configuration}", *elastic.words("--max", "2")
    )
    assert (code, b"others may read this token" in output) == (2, True), output
    for arguments, message in (
        (["--max", "0"], b"--max must be"),
        (["--max", "1", "--time", "1"], b"--time must be at least"),
        (["--max", "1", "--slurm-options", "--wrap=true"], b"the agent itself sets '--wrap=true'"),
        (["--max", "1", "--slurm-options", "-p gpu"], b"with an equals sign"),
    ):
        code, output = await run(*elastic.words(*arguments))
        assert (code, message in output) == (2, True), output


async def test_an_agent_ends_when_it_is_idle_and_before_its_end_time(
    server: Server, tmp_path: Path
) -> None:
    async def agent(*arguments: str) -> tuple[int, bytes]:
        return await run(
            *(sys.executable, str(PROJECT / "orchestrator.py"), "agent", "--server", server.url),
            *("--workdir", str(tmp_path / "work"), "--token-file", str(tmp_path / "token")),
            *arguments,
        )

    job = await server.upload("sleep 1; echo done")
    code, output = await agent("--idle-exit", "1")
    assert code == 0, output
    assert (await server.result(job)).read("stdout.log") == b"done\n"
    # it drains so long before its end that what it has can end
    go = tmp_path / "go"
    job = await server.upload(f"until [ -e {go} ]; do sleep 0.05; done; echo done")
    ending = asyncio.create_task(
        agent("--end-time", str(time.time() + 20), "--drain-timeout", "15")
    )
    await eventually(lambda: "event=agent_drains" in server.log(), "it drains")
    go.touch()
    code, output = await ending
    assert code == 0, output
    assert (await server.result(job)).read("stdout.log") == b"done\n"
    assert os.path.exists(tmp_path / "work")
