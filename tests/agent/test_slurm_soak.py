"""Long runs on a real Slurm: everything dies now and then, and each job runs once."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import pytest

from tests.harness import AgentProcess, curl, lines, running_server
from tests.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.soak

_JOBS = 200
_AGENT_DEATHS = 10
_CONTROLLER_RESTARTS = 2


async def test_200_jobs_through_10_deaths_of_the_agent_and_2_of_slurmctld_run_once_each(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    chance = random.Random(7)
    async with running_server(tmp_path / "server", "--no-agent") as server:
        agent = AgentProcess(server, "login")

        async def start() -> None:
            await agent.start("--executor", "slurm", "--slots", "60", environment=slurm.environment)

        begun = time.monotonic()
        await start()
        runs = tmp_path / "runs"
        jobs = [
            await server.upload(
                f"echo $ORCHESTRATOR_JOB_ID >> {runs}; cat input; sleep 0.3; exit {number % 3}",
                {"input": f"this is {number}".encode()},
            )
            for number in range(_JOBS)
        ]
        events = ["agent"] * _AGENT_DEATHS + ["controller"] * _CONTROLLER_RESTARTS
        chance.shuffle(events)
        for what in events:
            await asyncio.sleep(chance.uniform(2, 6))
            if what == "agent":
                await agent.kill()
                await start()
            else:
                slurm.stop_controller()
                await asyncio.sleep(chance.uniform(0, 5))
                slurm.start_controller()
        for number, job in enumerate(jobs):
            state = "Failed" if number % 3 else "Completed"
            details = await server.wait(job, state, seconds=600)
            if number % 3:
                assert f"exit code {number % 3}" in details["message"]
            result = server.stored_result(job)
            assert result.read("stdout.log") == f"this is {number}".encode()
        assert sorted(int(line) for line in lines(runs)) == sorted(jobs)
        # an attempt that was on its way to an agent that died is given again, and not submitted
        names = [name.split()[0] for name in slurm.jobs() if name.startswith("orchestrator-")]
        assert len(names) == _JOBS
        print(  # noqa: T201 the figure of a soak
            f"{_JOBS} jobs in {time.monotonic() - begun:.0f} s"
        )
        await agent.kill()
        slurm.cancel_all()


async def test_slurms_own_time_limit_ends_a_job_in_words(
    slurm: SlurmCluster, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        agent = AgentProcess(server, "login")
        await agent.start(
            *("--executor", "slurm", "--slurm-options", "--time=1"),
            *("--slurm-file-system", "2"),
            environment=slurm.environment,
        )
        job = await server.upload("sleep 1000")
        ended = await server.wait(job, "Failed", seconds=300)
        assert "ended by Slurm at its time limit" in ended["message"]
        details = (await curl(f"{server.url}/jobs/{job}")).json()
        assert len(details["attempts"]) == 1
        await agent.kill()
        slurm.cancel_all()
