"""What an agent says counts for what it holds, and for nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jobs import JobState
from records import ResultMismatch, Superseded
from tests.fleet.peers import archive, finished, running_fleet
from wire import messages

EMPTY_ZIP = b"PK\5\6" + bytes(18)


@pytest.mark.parametrize("state", [JobState.COMPLETED, JobState.QUEUED, JobState.KILLED])
async def test_a_foreign_agent_neither_ends_nor_repeats_an_attempt(
    tmp_path: Path, state: JobState
) -> None:
    async with running_fleet(tmp_path) as fleet:
        holder = await fleet.agent("holder")
        job_id = await fleet.submit()
        attempt_id = (await holder.wait_for(messages.Assign)).attempt_id
        holder.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
        stranger = await fleet.agent("stranger", slots=0)
        for size, content in ((0, b""), (22, EMPTY_ZIP)):
            stranger.say(finished(attempt_id, content, state=state, result_size=size))
            assert (await stranger.wait_for(messages.Drop)).attempt_id == attempt_id
        for report in (
            messages.Lost(attempt_id, "forged"),
            messages.Rejected(attempt_id, "forged"),
            messages.Accepted(attempt_id),
        ):
            stranger.say(report)
            assert (await stranger.wait_for(messages.Drop)).attempt_id == attempt_id
        stranger.send(attempt_id, EMPTY_ZIP)
        await stranger.wait_for(messages.Drop)
        assert (await fleet.state(job_id))[0] is JobState.RUNNING
        content = archive()
        holder.say(finished(attempt_id, content))
        holder.send(attempt_id, content)
        await holder.wait_for(messages.Stored)
        assert (await fleet.state(job_id))[0] is JobState.COMPLETED


async def test_only_the_agent_that_holds_an_attempt_can_finish_it_in_the_store(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path) as fleet:
        holder = await fleet.agent("holder")
        job_id = await fleet.submit()
        attempt_id = (await holder.wait_for(messages.Assign)).attempt_id
        holder.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
        content = archive()
        report = finished(attempt_id, content)
        finish = fleet.store.attempts.finish
        with pytest.raises(Superseded):
            await finish("id-stranger", report, 0, [content])
        for state in (JobState.QUEUED, JobState.RUNNING, JobState.CLEANED):
            with pytest.raises(ResultMismatch):
                await finish("id-holder", dataclasses.replace(report, state=state), 0, [content])
        for damaged in (b"", b"PK", content[:-1], content[1:], content + b"x", b"\0" * 100):
            with pytest.raises(ResultMismatch):
                await finish("id-holder", finished(attempt_id, damaged), 0, [damaged])
        assert (await fleet.state(job_id))[0] is JobState.RUNNING
        await finish("id-holder", report, 0, [content])
        assert (await fleet.state(job_id))[0] is JobState.COMPLETED


async def test_a_result_that_is_no_whole_archive_is_a_loss_of_its_agent(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("odd")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        peer.deliver(attempt_id, b"no archive at all, but with the digest that it should have")
        assert (await peer.wait_for(messages.Drop)).attempt_id == attempt_id
        history = await fleet.store.history.of_job(job_id)
        assert any("no whole archive" in transition.reason for transition in history)


async def test_a_repeated_report_of_a_stored_result_is_answered_as_before(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("deaf")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        content = archive()
        peer.deliver(attempt_id, content)
        await peer.wait_for(messages.Stored)
        peer.say(finished(attempt_id, content))
        assert (await peer.wait_for(messages.Stored)).attempt_id == attempt_id
        assert (await fleet.state(job_id))[0] is JobState.COMPLETED
