"""Servers and agents killed at random while jobs run: nothing lost, nothing twice.

The seed is printed; FAULT_SEED=N repeats the same jobs and the same schedule of kills.
An outside witness, a file that every job appends to, tells what really ran and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import signal
import time
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.harness import (
    FINAL,
    POLL_SECONDS,
    AgentProcess,
    Server,
    eventually,
    lines,
    running_server,
)

_MIB = 1024 * 1024
_UNFINISHED_SQL = f"SELECT count(*) FROM job WHERE state NOT IN {tuple(FINAL)}"
_ENDS_SQL = f"SELECT job_id, count(*) FROM history WHERE to_state IN {tuple(FINAL)} GROUP BY job_id"
_TERMINATED_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """How hard it blows; ``absences`` is the share of agents that stay away past their lease."""

    jobs: int
    server_kills: int
    agent_kills: int
    lease: float = 60
    absences: float = 0.0


@dataclass(frozen=True)
class Sighting:
    """What the witness saw: an attempt of a job, at a Unix time."""

    job_id: int
    attempt: int
    at: float


@dataclass(frozen=True)
class Footprint:
    """What an idle server holds."""

    descriptors: int
    memory: int


class Storm:
    """Uploads jobs and kills processes; then checks that all came out right."""

    def __init__(self, server: Server, plan: Plan, seed: int) -> None:
        self.server = server
        self.plan = plan
        self.seed = seed
        self.agents = [AgentProcess(server, name) for name in ("one", "two")]
        self.witness = server.directory / "witness"
        self.accepted: dict[int, int] = {}
        self.terminated: set[int] = set()
        self.kills: Counter[str] = Counter()

    def randomness(self, of: str) -> random.Random:
        """Return the numbers for one purpose, which no other purpose can shift."""
        return random.Random(f"{self.seed} {of}")

    # --- jobs

    async def upload_all(self) -> None:
        """Submit jobs for as long as the kills go on, each until a server has acknowledged it."""
        all_kills = self.plan.server_kills + self.plan.agent_kills
        async with asyncio.TaskGroup() as terminations:
            for number in range(self.plan.jobs):
                while self.kills.total() < number * all_kills // self.plan.jobs:
                    await asyncio.sleep(POLL_SECONDS)
                while (job_id := await self.upload(number)) is None:
                    await asyncio.sleep(POLL_SECONDS)
                chance = self.randomness(f"termination of {number}")
                if chance.random() < _TERMINATED_SHARE:
                    self.terminated.add(job_id)
                    terminations.create_task(self._terminate(job_id, chance.uniform(0, 1)))

    async def upload(self, number: int) -> int | None:
        """Submit one job; returns its id, or None if there was no answer."""
        chance = self.randomness(f"job {number}")
        see = f"$ORCHESTRATOR_JOB_ID $ORCHESTRATOR_ATTEMPT $EPOCHREALTIME >> {self.witness}"
        script = (
            f"echo start {see}\n"
            f"sleep {chance.uniform(0, 1):.3f}\n"
            f"echo {number} $ORCHESTRATOR_ATTEMPT > result.txt\n"
            f"head -c {int(10 ** chance.uniform(3, 6))} /dev/urandom > noise\n"
            f"echo end {see}\n"
        )
        form = aiohttp.FormData()
        form.add_field("file", script, filename="run.sh")
        form.add_field("file", os.urandom(int(10 ** chance.uniform(3, 6))), filename="input.bin")
        form.add_field("user_id", str(number % 5))
        form.add_field("service", "example")
        with contextlib.suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession(self.server.url) as session,
                session.post("/upload", data=form) as response,
            ):
                assert response.status == 201, await response.text()
                job_id = int((await response.json())["id"])
                self.accepted[job_id] = number
                return job_id
        return None

    async def _terminate(self, job_id: int, delay: float) -> None:
        await asyncio.sleep(delay)  # so that it meets the job in different states
        with contextlib.suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession(self.server.url) as session,
                session.post(f"/terminate/{job_id}") as response,
            ):
                assert response.status in (200, 409), await response.text()

    # --- kills

    async def kill_all(self) -> None:
        """Kill in random order, at random moments, and start again, mostly at once."""
        chance = self.randomness("kills")
        victims = ["server"] * self.plan.server_kills + ["agent"] * self.plan.agent_kills
        chance.shuffle(victims)
        for victim in victims:
            await asyncio.sleep(chance.uniform(0.0, 0.5))  # the schedule of the faults
            if victim == "server":
                await self.server.kill()
                await self.server.start("--no-agent")
            else:
                agent, is_away = chance.choice(self.agents), chance.random() < self.plan.absences
                await agent.kill()
                await asyncio.sleep(self.plan.lease * 1.2 if is_away else 0)
                await agent.start("--slots", "4")
            self.kills[victim] += 1

    # --- the verdict

    async def check(self) -> None:
        """All acknowledged jobs are final, once, with the right bytes; nothing is left over."""
        await self._wait_for_the_last_job()
        self._check_states()
        self._check_what_ran()
        await self._check_results()
        await self._check_nothing_is_left()
        await self.server.check()

    async def _wait_for_the_last_job(self) -> None:
        """Wait for as long as jobs still end: a backlog takes its time, a stuck job does not."""
        while left := self.server.query(_UNFINISHED_SQL)[0][0]:
            await eventually(
                lambda left=left: self.server.query(_UNFINISHED_SQL)[0][0] < left,  # type: ignore[misc]
                f"another of {left} jobs ends",
                seconds=60,
            )

    def _check_states(self) -> None:
        states = dict(self.server.query("SELECT id, state FROM job"))
        assert states.keys() >= self.accepted.keys(), "no acknowledged job is lost"
        for job_id, state in states.items():
            allowed = ("Completed", "Killed") if job_id in self.terminated else ("Completed",)
            assert state in allowed, (job_id, state, self.server.transitions(job_id))
        assert set(dict(self.server.query(_ENDS_SQL)).values()) == {1}, "none has ended twice"
        delivered = self.server.query(
            "SELECT job_id, count(*) FROM attempt WHERE result_blob IS NOT NULL GROUP BY job_id"
        )
        assert {count for _, count in delivered} == {1}, "none was delivered twice"

    def _check_what_ran(self) -> None:
        """A job was started again only after the attempt before had been given up."""
        starts, ends = self.sightings("start"), self.sightings("end")
        given_up = {
            (job_id, attempt): at
            for job_id, attempt, at in self.server.query(
                "SELECT job_id, attempt, at FROM history WHERE to_state = 'Queued' AND attempt > 0"
            )
        }
        for seen in (starts, ends):
            assert max(Counter((s.job_id, s.attempt) for s in seen).values()) == 1
        by_job: dict[int, list[Sighting]] = defaultdict(list)
        for start in starts:
            by_job[start.job_id].append(start)
        for job_id, attempts in by_job.items():
            attempts.sort(key=lambda start: start.attempt)
            for before, after in pairwise(attempts):
                assert given_up[job_id, before.attempt] <= after.at, (job_id, before, after)
        if not self.plan.absences:
            assert len(starts) == len(by_job), "no lease ended, so each job was started once"

    def sightings(self, kind: str) -> list[Sighting]:
        """Return what the witness wrote down, in its order."""
        words = (line.split() for line in lines(self.witness))
        return [Sighting(int(w[1]), int(w[2]), float(w[3])) for w in words if w[0] == kind]

    async def _check_results(self) -> None:
        final_attempt = dict(self.server.query("SELECT id, attempts FROM job"))
        completed = self.server.query("SELECT id FROM job WHERE state = 'Completed'")
        async with aiohttp.ClientSession(self.server.url) as session:
            for (job_id,) in completed:
                async with session.get(f"/download/{job_id}") as response:
                    archive = zipfile.ZipFile(io.BytesIO(await response.read()))
                assert archive.testzip() is None
                number, attempt = archive.read("result.txt").split()
                assert int(attempt) == final_attempt[job_id]
                if job_id in self.accepted:
                    assert int(number) == self.accepted[job_id]

    async def _check_nothing_is_left(self) -> None:
        sql = "SELECT count(*) FROM blob WHERE state != 'sealed'"
        await eventually(lambda: self.server.query(sql) == [(0,)], "no unfinished bytes are left")
        for agent in self.agents:
            path = agent.workdir / "attempts"
            await eventually(lambda path=path: os.listdir(path) == [], "directories are gone")  # type: ignore[misc]

    async def stop_agents(self) -> None:
        """Stop the agents as an operator does; no process of theirs or of a job is left."""
        for agent in self.agents:
            agent.send(signal.SIGTERM)
        for agent in self.agents:
            assert agent.process is not None
            assert await asyncio.wait_for(agent.process.wait(), 20) == 0
        others = [p for p in self.server.processes() if p.pid != self.server.pid]
        assert [p.cmdline() for p in others] == []

    async def footprint(self) -> Footprint:
        """Return what the server holds once it is idle."""
        await eventually(lambda: self.server.query(_UNFINISHED_SQL) == [(0,)], "it is idle")
        process = psutil.Process(self.server.pid)
        connections = len(self.agents)

        def has_no_clients() -> bool:
            found = process.net_connections("tcp")
            return sum(c.status == psutil.CONN_ESTABLISHED for c in found) == connections

        await eventually(has_no_clients, "only agents are connected")
        return Footprint(process.num_fds(), process.memory_info().rss)

    async def check_a_steady_server(self) -> None:
        """A server that lives on while jobs run and agents die ends up with what it had."""
        numbers = range(10**6, 10**6 + 40)
        await asyncio.gather(*(self.upload(number) for number in numbers[:15]))
        before = await self.footprint()
        chance = self.randomness("agents of a steady server")
        async with asyncio.TaskGroup() as tasks:
            for number in numbers[15:]:
                tasks.create_task(self.upload(number))
            for _ in range(4):
                agent = chance.choice(self.agents)
                await agent.kill()
                await agent.start("--slots", "4")
                await asyncio.sleep(chance.uniform(0.0, 0.5))  # the schedule of the faults
        after = await self.footprint()
        assert after.descriptors <= before.descriptors + 2, (before, after)
        assert after.memory <= before.memory + 16 * _MIB, (before, after)


async def _blow(directory: Path, plan: Plan) -> str:
    """Go through a storm; returns its figures."""
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    began = time.monotonic()
    environment = {"SERVICE_EXAMPLE_RUNS_PER_USER": "8", "SERVICE_EXAMPLE_MAX_RUNS": "8"}
    environment |= {"LEASE": str(plan.lease), "MAX_ATTEMPTS": "10"}
    async with running_server(directory, "--no-agent", environment=environment) as server:
        storm = Storm(server, plan, seed)
        try:
            for agent in storm.agents:
                await agent.start("--slots", "4")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(storm.upload_all())
                tasks.create_task(storm.kill_all())
            kills = dict(storm.kills)
            await storm.check()
            await storm.check_a_steady_server()
            await storm.check()
            await storm.stop_agents()
        except BaseException as error:
            error.add_note(f"FAULT_SEED={seed} after {time.monotonic() - began:.0f} s")
            raise
        jobs = server.query("SELECT count(*), sum(state = 'Killed'), sum(attempts > 1) FROM job")
        starts = storm.sightings("start")
        restarted = len(starts) - len({start.job_id for start in starts})
        return (
            f"storm: kills {kills}, {jobs[0][0]} jobs, {jobs[0][1]} of them terminated,"
            f" {restarted} attempts started again, {jobs[0][2]} jobs sent more than once,"
            f" {time.monotonic() - began:.0f} s, FAULT_SEED={seed}"
        )


async def test_two_hundred_jobs_survive_fifty_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = await _blow(tmp_path / "server", Plan(jobs=200, server_kills=25, agent_kills=25))
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201 - the seed, also of a run that went well


@pytest.mark.soak
async def test_five_thousand_jobs_survive_a_thousand_kills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(jobs=5000, server_kills=500, agent_kills=500, lease=8, absences=0.02)
    figures = await _blow(tmp_path / "server", plan)
    with capsys.disabled():
        print(f"\n{figures}")  # noqa: T201
