"""What Slurm's commands say, and what is made of it: on a real Slurm, and on odd answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.executors.slurm_commands import (
    Refusal,
    SlurmCommands,
    SlurmJob,
    SlurmRecord,
    SlurmSilent,
    Standing,
    SubmissionRefused,
    command_environment,
)
from tests.slurm_cluster import SlurmCluster, StandIn

_OPTIONS = ("--output=/dev/null", "--nodes=1", "--ntasks=1", "--no-requeue")


@pytest.fixture
def commands(slurm: SlurmCluster) -> SlurmCommands:
    return SlurmCommands(slurm.environment)


@pytest.fixture
def stand_in(slurm: SlurmCluster, tmp_path: Path) -> StandIn:
    return StandIn(tmp_path / "stand-in", slurm.environment)


async def _seen(
    commands: SlurmCommands, job_id: int, condition: Callable[[SlurmJob], bool]
) -> SlurmJob:
    deadline = time.monotonic() + 30
    while True:
        for job in await commands.jobs():
            if job.id == job_id and condition(job):
                return job
        assert time.monotonic() < deadline, await commands.jobs()
        await asyncio.sleep(0.1)


async def test_a_job_is_seen_by_name_from_submission_to_end(
    commands: SlurmCommands, tmp_path: Path
) -> None:
    script = f"#!/bin/sh\nuntil [ -e {tmp_path}/go ]; do sleep 0.05; done\nexit 3\n"
    number = await commands.submit(script, [*_OPTIONS, "--job-name=watched-1"])
    running = await _seen(commands, number, lambda job: job.standing is Standing.RUNS)
    assert (running.name, running.node, running.state) == ("watched-1", "localhost", "RUNNING")
    (tmp_path / "go").touch()
    ended = await _seen(commands, number, lambda job: job.standing is Standing.ENDED)
    assert (ended.state, ended.reason) == ("FAILED", "NonZeroExitCode")
    record = await commands.record(number, "watched-1")
    assert record == SlurmRecord("FAILED", "NonZeroExitCode")
    assert record.has_ended


async def test_the_reason_of_a_job_that_waits_is_slurms(commands: SlurmCommands) -> None:
    number = await commands.submit("#!/bin/sh\ntrue\n", [*_OPTIONS, "--hold", "--job-name=held-1"])
    waiting = await _seen(commands, number, lambda job: job.reason == "JobHeldUser")
    assert waiting.standing is Standing.WAITS
    await commands.cancel_named("held-1")
    ended = await _seen(commands, number, lambda job: job.standing is Standing.ENDED)
    assert ended.state == "CANCELLED"
    await commands.cancel_named("held-1")  # once more: no error
    # another job has the number, as after a loss of slurmctld's state
    assert await commands.record(number, "held-2") == SlurmRecord(None)
    await commands.cancel_named("no-job-has-this-name")


async def test_a_refusal_is_told_in_slurms_own_words(commands: SlurmCommands) -> None:
    for option, words, refusal in (
        ("--partition=gpu", "invalid partition", Refusal.HOW_WE_ASK),
        ("--mem=999G", "Memory specification can not", Refusal.WHAT_THE_JOB_ASKS),
        ("--gres=fpga:1", "Invalid generic resource", Refusal.WHAT_THE_JOB_ASKS),
        ("--no-such-option", "unrecognized option", Refusal.HOW_WE_ASK),
    ):
        with pytest.raises(SubmissionRefused, match=words) as refused:
            await commands.submit("#!/bin/sh\ntrue\n", [*_OPTIONS, option])
        assert refused.value.refusal is refusal


async def test_a_job_that_slurm_does_not_know_has_ended_and_one_it_can_not_tell_of_has_not(
    commands: SlurmCommands, stand_in: StandIn
) -> None:
    assert await commands.record(4_000_000, "name") == SlurmRecord(None)
    stand_in.put(
        "scontrol", "echo 'slurm_load_jobs error: Zero Bytes were transmitted' >&2; exit 1"
    )
    with pytest.raises(SlurmSilent, match="Zero Bytes"):
        await SlurmCommands(stand_in.environment).record(4_000_000, "name")


async def test_accounts_tell_the_end_of_a_job_that_slurmctld_forgot(stand_in: StandIn) -> None:
    stand_in.put("sacct", "printf 'RUNNING\\nCANCELLED by 1000\\n'")
    commands = SlurmCommands(stand_in.environment)
    assert await commands.record(4_000_000, "name") == SlurmRecord("CANCELLED by 1000")
    # a job whose end slurmdbd was not told of is RUNNING there for ever
    stand_in.put("sacct", "echo RUNNING")
    assert await commands.record(4_000_000, "name") == SlurmRecord(None)


async def test_words_of_another_slurm_are_unknown(stand_in: StandIn) -> None:
    stand_in.put(
        "squeue",
        "echo '7|POWER_UP_NODE|a|n1|None'; echo 'slurm_load_jobs: hello'\n"
        "echo '8_[1-3]|PENDING|b||x'; echo '9|PENDING|c||ReqNodeNotAvail, UnavailableNodes:n[1|2]'",
    )
    jobs = await SlurmCommands(stand_in.environment).jobs()
    assert [(job.id, job.standing) for job in jobs] == [
        (7, Standing.UNKNOWN),
        (9, Standing.WAITS),
    ]
    assert jobs[1].reason == "ReqNodeNotAvail, UnavailableNodes:n[1|2]"


async def test_an_answer_that_got_lost_is_no_refusal(
    stand_in: StandIn, slurm: SlurmCluster
) -> None:
    stand_in.put(
        "sbatch",
        '"$REAL/sbatch" "$@" > /dev/null\n'
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation'"
        " >&2\nexit 1",
    )
    commands = SlurmCommands(stand_in.environment)
    with pytest.raises(SlurmSilent, match="Socket timed out"):
        await commands.submit("#!/bin/sh\ntrue\n", [*_OPTIONS, "--job-name=lost-answer"])
    assert [job.name for job in await commands.jobs() if job.name == "lost-answer"]
    stand_in.put("sbatch", "echo 'no number at all'")
    with pytest.raises(SlurmSilent, match="no number"):
        await commands.submit("#!/bin/sh\ntrue\n", _OPTIONS)


async def test_a_full_slurm_refuses_for_now(stand_in: StandIn) -> None:
    stand_in.put(
        "sbatch",
        "echo 'sbatch: error: AssocMaxSubmitJobLimit' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
        " (job submit limit, user'\"'\"'s size and/or time limits)' >&2\nexit 1",
    )
    with pytest.raises(SubmissionRefused) as refused:
        await SlurmCommands(stand_in.environment).submit("#!/bin/sh\ntrue\n", _OPTIONS)
    assert refused.value.refusal is Refusal.MORE_FOR_NOW


async def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    commands = SlurmCommands({"PATH": str(tmp_path)})
    assert commands.missing_command() == "sbatch"
    with pytest.raises(SlurmSilent, match="squeue: No such file"):
        await commands.jobs()


def test_the_commands_see_no_secret_and_no_job_of_slurm_around_them() -> None:
    own = {
        "PATH": "/bin",
        "ORCHESTRATOR_AGENT_TOKEN": "secret",
        "SLURM_JOB_ID": "1",
        "SLURM_CONF": "/x",
        "SBATCH_ACCOUNT": "lab",
        "SBATCH_CLUSTERS": "other",
    }
    expected = {"PATH": "/bin", "SLURM_CONF": "/x", "SBATCH_ACCOUNT": "lab", "LC_ALL": "C"}
    assert command_environment(own) == expected
