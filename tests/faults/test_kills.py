"""Servers and agents killed at random while jobs run: nothing lost, nothing twice.

The seed is printed with a failure; FAULT_SEED=N repeats the same schedule of kills.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import time
import zipfile
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.harness import POLL_SECONDS, AgentProcess, Server, eventually, lines, running_server

_FINAL_SQL = "SELECT count(*) FROM job WHERE state = 'Completed'"


class Storm:
    """Uploads jobs and kills processes; then checks that all came out right."""

    def __init__(self, server: Server, agents: list[AgentProcess], seed: int) -> None:
        self.server = server
        self.agents = agents
        self.random = random.Random(seed)
        self.witness = server.directory / "witness"
        self.accepted: dict[int, int] = {}
        self.kills: Counter[str] = Counter()

    async def upload_all(self, count: int) -> None:
        """Submit jobs one after the other, each until a server has acknowledged it."""
        for number in range(count):
            while not await self._upload(number):
                await asyncio.sleep(POLL_SECONDS)

    async def _upload(self, number: int) -> bool:
        script = (
            f"echo $ORCHESTRATOR_JOB_ID $ORCHESTRATOR_ATTEMPT >> {self.witness}\n"
            f"sleep 0.{self.random.randrange(10)}\n"
            f"echo result-{number} > result.txt; head -c 700000 /dev/urandom > noise\n"
        )
        form = aiohttp.FormData()
        form.add_field("file", script, filename="run.sh")
        form.add_field("file", os.urandom(400_000), filename="input.bin")
        form.add_field("user_id", str(number % 5))
        form.add_field("service", "example")
        with contextlib.suppress(aiohttp.ClientError):
            async with (
                aiohttp.ClientSession(self.server.url) as session,
                session.post("/upload", data=form) as response,
            ):
                assert response.status == 201, await response.text()
                self.accepted[(await response.json())["id"]] = number
                return True
        return False

    async def kill_until(self, server_kills: int, agent_kills: int) -> None:
        """Kill in random order, at random moments, and start again at once."""
        victims = ["server"] * server_kills + ["agent"] * agent_kills
        self.random.shuffle(victims)
        for victim in victims:
            await asyncio.sleep(self.random.uniform(0.0, 1.0))  # the schedule of the faults
            if victim == "server":
                await self.server.kill()
                await self.server.start("--no-agent")
            else:
                agent = self.random.choice(self.agents)
                await agent.kill()
                await agent.start("--slots", "4")
            self.kills[victim] += 1

    async def check(self) -> None:
        """All acknowledged jobs complete, once, with the right bytes; nothing is left over."""
        total = self.server.query("SELECT count(*) FROM job")[0][0]
        assert total >= len(self.accepted)
        await eventually(
            lambda: self.server.query(_FINAL_SQL) == [(total,)], "all jobs complete", seconds=120
        )
        async with aiohttp.ClientSession(self.server.url) as session:
            for job_id, number in self.accepted.items():
                async with session.get(f"/download/{job_id}") as response:
                    archive = zipfile.ZipFile(io.BytesIO(await response.read()))
                assert archive.testzip() is None
                assert archive.read("result.txt") == f"result-{number}\n".encode()
        starts = Counter(line.split()[0] for line in lines(self.witness))
        assert set(starts.values()) == {1}, "no lease ended, so each job was started once"
        for agent in self.agents:
            path = agent.workdir / "attempts"
            await eventually(lambda path=path: os.listdir(path) == [], "directories are gone")  # type: ignore[misc]
        assert self.server.query("PRAGMA integrity_check") == [("ok",)]
        sql = "SELECT count(*) FROM blob WHERE state != 'sealed'"
        await eventually(lambda: self.server.query(sql) == [(0,)], "no unfinished bytes are left")


async def _storm(directory: Path, jobs: int, kills: int) -> None:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    began = time.monotonic()
    environment = {"SERVICE_EXAMPLE_RUNS_PER_USER": "8", "SERVICE_EXAMPLE_MAX_RUNS": "8"}
    async with running_server(directory, "--no-agent", environment=environment) as server:
        agents = [AgentProcess(server, name) for name in ("one", "two")]
        storm = Storm(server, agents, seed)
        try:
            for agent in agents:
                await agent.start("--slots", "4")
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(storm.upload_all(jobs))
                tasks.create_task(storm.kill_until(kills, kills))
            await storm.check()
        except BaseException as error:
            error.add_note(f"FAULT_SEED={seed} after {time.monotonic() - began:.0f} s")
            raise
        finally:
            for agent in agents:
                await agent.kill()


async def test_two_hundred_jobs_survive_fifty_kills(tmp_path: Path) -> None:
    await _storm(tmp_path / "server", jobs=200, kills=25)


@pytest.mark.soak
async def test_five_thousand_jobs_survive_a_thousand_kills(tmp_path: Path) -> None:
    await _storm(tmp_path / "server", jobs=5000, kills=500)
