"""What a job has of its machine: GPUs that nobody else has, cores, memory; and what it used."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.outcomes import JobLost
from agent.resources import Allotments, Allotted, Machine, detected_gpus, parse_gpus
from agent.results import readable_size
from jobs import Resources
from tests.harness import PROJECT, AgentProcess, Server, eventually, lines, run, running_server

NewAgent = Callable[[str], AgentProcess]


async def test_no_gpu_is_held_twice_although_the_agent_is_killed_in_the_middle(
    tmp_path: Path,
) -> None:
    held, witness = tmp_path / "held", tmp_path / "witness"
    held.mkdir()
    # mkdir(2) decides: whoever finds a directory there has a GPU that another one has
    script = (
        f'for gpu in ${{CUDA_VISIBLE_DEVICES//,/ }}; do mkdir "{held}/$gpu" || exit 9; done;'
        f' echo "$ORCHESTRATOR_JOB_ID $CUDA_VISIBLE_DEVICES" >> {witness}; sleep 0.3;'
        f' for gpu in ${{CUDA_VISIBLE_DEVICES//,/ }}; do rmdir "{held}/$gpu"; done'
    )
    environment = {"LEASE": "300"}
    for gpus in (1, 2, 3):
        environment |= {f"SERVICE_GPU{gpus}_GPUS": str(gpus), f"SERVICE_GPU{gpus}_MAX_RUNS": "100"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        agent = AgentProcess(server, "mighty")
        options = ("--gpus", "4", "--slots", "8", "--isolation", "none")
        await agent.start(*options)
        asks = [1 + number % 3 for number in range(40)]
        submitted = [
            await server.upload(script, user=number, service=f"gpu{gpus}")
            for number, gpus in enumerate(asks)
        ]
        for enough in (10, 20):
            await eventually(lambda enough=enough: len(lines(witness)) >= enough, "they run", 60)  # type: ignore[misc]
            await agent.kill()
            await agent.start(*options)
        for job_id in submitted:
            await server.result(job_id, seconds=120)
        seen = {int(line.split()[0]): line.split()[1].split(",") for line in lines(witness)}
        assert [len(seen[job_id]) for job_id in submitted] == asks
        assert {gpu for gpus in seen.values() for gpu in gpus} == {"0", "1", "2", "3"}
        assert len(lines(witness)) == 40
        assert list(held.iterdir()) == []


async def test_a_job_is_told_what_it_has_and_bound_to_as_many_cores(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    agent = new_agent("small")
    await agent.start("--gpus", "0,2", "--memory", "8G", "--isolation", "none")
    job_id = await bare_server.upload(
        "echo $CUDA_VISIBLE_DEVICES; echo $OMP_NUM_THREADS $ORCHESTRATOR_CPUS"
        ' "[$ORCHESTRATOR_MEMORY]" $ORCHESTRATOR_GPUS; env -u OMP_NUM_THREADS nproc'
    )
    archive = await bare_server.result(job_id)
    assert archive.read("stdout.log") == b"\n1 1 [] 0\n1\n"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is but one core")
async def test_jobs_share_all_cores_where_more_is_promised_than_there_is(
    bare_server: Server, new_agent: NewAgent
) -> None:
    cores = len(os.sched_getaffinity(0))
    agent = new_agent("generous")
    await agent.start("--slots", str(cores + 1), "--isolation", "none")
    job_id = await bare_server.upload("echo $ORCHESTRATOR_CPUS; env -u OMP_NUM_THREADS nproc")
    archive = await bare_server.result(job_id)
    assert archive.read("stdout.log").split() == [b"1", str(cores).encode()]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is but one core")
async def test_a_job_can_not_have_the_next_one_run_elsewhere(
    bare_server: Server, new_agent: NewAgent
) -> None:
    agent = new_agent("bound")
    await agent.start("--slots", "1", "--isolation", "none")
    free = 'python3 -c "import os; os.sched_setaffinity(os.getppid(), range(os.cpu_count()))"'
    changed = await bare_server.result(await bare_server.upload(f"echo $PPID; exec {free}"))
    following = await bare_server.result(
        await bare_server.upload("echo $PPID; env -u OMP_NUM_THREADS nproc")
    )
    same, cores = following.read("stdout.log").split()
    assert same == changed.read("stdout.log").strip()
    assert cores == b"1"


@pytest.mark.parametrize("isolation", ["none", "auto"])
async def test_a_job_that_uses_more_memory_than_its_own_fails_and_says_so(
    tmp_path: Path, isolation: str
) -> None:
    environment = {"SERVICE_TIGHT_MEMORY": "128M"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        agent = AgentProcess(server, "strict")
        await agent.start("--isolation", isolation)
        greedy = 'python3 -c "import time; x = bytearray(300 << 20); time.sleep(1000)" & wait'
        job_id = await server.upload(greedy, service="tight")
        answer = await server.wait(job_id, seconds=60)
        assert answer["status"] == "Failed"
        said = re.fullmatch(r"used ([0-9.]+) MB of memory, more than its 128 MB", answer["message"])
        assert said, answer
        assert float(said[1]) > 128
        modest = 'python3 -c "import time; x = bytearray(30 << 20); time.sleep(2.5)"'
        await server.result(await server.upload(modest, service="tight"))


async def test_usage_counts_the_whole_tree_and_survives_a_restart_of_the_agent(
    patient_server: Server, tmp_path: Path
) -> None:
    go, witness = tmp_path / "go", tmp_path / "witness"
    agent = AgentProcess(patient_server, "counting")
    await agent.start("--isolation", "none")
    # the grandchild is waited for by nobody but the supervisor
    burn = 'python3 -c "import time; x = bytearray(80 << 20)\nwhile time.process_time() < 1: pass"'
    job_id = await patient_server.upload(
        f"(setsid bash -c '{burn}; echo burnt >> {witness}' &); echo runs >> {witness};"
        f" until [ -e {go} ]; do sleep 0.05; done"
    )
    await eventually(lambda: sorted(lines(witness)) == ["burnt", "runs"], "it has burnt", 60)
    await patient_server.wait(job_id, "Running")
    await agent.kill()
    await agent.start("--isolation", "none")
    go.touch()
    await patient_server.result(job_id)
    used = "SELECT cpu_seconds, peak_memory, wall_seconds FROM attempt"
    ((cpu_seconds, peak_memory, wall_seconds),) = patient_server.query(used)
    assert 1 <= cpu_seconds < 60
    assert 80 << 20 <= peak_memory < 1 << 30
    assert wall_seconds >= 1


@pytest.mark.parametrize(
    "options",
    [("--cpus", "4"), ("--memory", "8G"), ("--gpus", "none"), ("--no-affinity",)],
    ids=lambda options: options[0],
)
async def test_what_is_said_of_a_machine_is_refused_where_slurm_knows_its_nodes(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    # without Slurm it would end as well, with another sentence
    code, output = await run(
        *("env", "PATH=/nowhere", sys.executable, str(PROJECT / "orchestrator.py"), "agent"),
        *("--executor", "slurm", "--server", "http://127.0.0.1:1", "--workdir", str(tmp_path)),
        *options,
    )
    assert code == 2, output
    assert output.decode().splitlines()[-1] == (
        f"orchestrator agent: {options[0]}: not with --executor slurm, as Slurm itself knows what"
        " its nodes have"
    )
    assert b"Traceback" not in output


async def test_an_attempt_keeps_its_gpus_across_a_restart(tmp_path: Path) -> None:
    machine = Machine(8, 0, ("0", "1"), tuple(range(8)))
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    before = Allotments(machine)
    kept = await before.take(tmp_path / "a", Resources(2, 0, 1))
    assert kept == Allotted(("0",), (0, 1))
    after = Allotments(machine)
    after.adopt(tmp_path / "a")
    assert await after.take(tmp_path / "a", Resources(2, 0, 1)) == kept
    assert await after.take(tmp_path / "b", Resources(4, 0, 1)) == Allotted(("1",), (2, 3, 4, 5))
    waiting = asyncio.create_task(after.take(tmp_path / "c", Resources(1, 0, 1)))
    await asyncio.sleep(0)
    assert not waiting.done()
    after.give_back(tmp_path / "a")
    assert (await waiting).gpus == ("0",)
    assert json.loads((tmp_path / "c" / "allotment.json").read_text())["gpus"] == ["0"]
    with pytest.raises(JobLost, match="needs 3 GPUs"):
        await after.take(tmp_path / "a", Resources(1, 0, 3))


def test_gpus_are_read_as_they_are_said() -> None:
    assert parse_gpus("none") == parse_gpus("0") == ()
    assert parse_gpus("2") == ("0", "1")
    assert parse_gpus("0, 2,3") == ("0", "2", "3")
    assert detected_gpus({"CUDA_VISIBLE_DEVICES": "GPU-7a,3"}) == ("GPU-7a", "3")
    assert detected_gpus({"CUDA_VISIBLE_DEVICES": ""}) == ()
    for wrong in ("", "-1", "all", "1,1", "1;2", "99999"):
        with pytest.raises(ValueError, match=r"must be|more than once"):
            parse_gpus(wrong)


def test_sizes_are_said_as_people_say_them() -> None:
    sizes = [100, 8 << 30, int(9.1 * 2**30), 3 << 20]
    assert [readable_size(size) for size in sizes] == ["100 B", "8 GB", "9.1 GB", "3 MB"]
