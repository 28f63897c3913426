"""A database that was restored or copied means no attempt of another life by the ids it gives."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from jobs import JobState
from tests.fleet.peers import Fleet, Peer, archive, running_fleet
from wire import messages

SECRET = "s" * 40


async def _assigned(fleet: Fleet, peer: Peer) -> tuple[int, messages.HeldAttempt]:
    """Submit a job that the agent gets and starts; returns it as the agent will tell it."""
    job_id = await fleet.submit()
    assign = await peer.wait_for(messages.Assign)
    assert assign.job_id == job_id
    peer.run_through(assign.attempt_id)
    await fleet.wait(job_id, JobState.RUNNING)
    incarnation = fleet.store.incarnations.current
    return job_id, messages.HeldAttempt(
        job_id, assign.attempt_id, messages.AttemptPhase.RUNNING, 6, incarnation
    )


async def _connect(fleet: Fleet, *held: messages.HeldAttempt) -> tuple[Peer, messages.Welcome]:
    peer = fleet.connect("survivor")
    peer.hello(attempts=tuple(held))
    return peer, await peer.wait_for(messages.Welcome)


@pytest.fixture
async def history(
    tmp_path: Path,
) -> tuple[messages.HeldAttempt, messages.HeldAttempt]:
    """Restore a database that knows the first attempt which an agent holds, not the second."""
    database = tmp_path / "orchestrator.db"
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("survivor")
        _, before = await _assigned(fleet, peer)
    shutil.copy(database, tmp_path / "backup.db")
    async with running_fleet(tmp_path) as fleet:
        peer, welcome = await _connect(fleet, before)
        assert [kept.attempt_id for kept in welcome.keep] == [before.attempt_id]
        _, after = await _assigned(fleet, peer)
        assert after.incarnation != before.incarnation
    for path in tmp_path.glob("orchestrator.db*"):
        path.unlink()
    (tmp_path / "backup.db").rename(database)
    return before, after


async def test_an_agent_goes_on_with_what_the_backup_knows_and_drops_the_rest(
    tmp_path: Path, history: tuple[messages.HeldAttempt, messages.HeldAttempt]
) -> None:
    before, after = history
    async with running_fleet(tmp_path) as fleet:
        peer, welcome = await _connect(fleet, before, after)
        assert welcome.keep == (
            messages.KeptAttempt(before.attempt_id, 0, 0, 0, before.incarnation),
        )
        assert welcome.incarnation not in (before.incarnation, after.incarnation)
        _, new = await _assigned(fleet, peer)
        assert new.attempt_id > after.attempt_id, "ids go on above those that the agent holds"
        assert new.job_id > after.job_id
        content = archive("of the restored job")
        peer.deliver(before.attempt_id, content)
        await peer.wait_for(messages.Stored)
        assert (await fleet.state(before.job_id))[0] is JobState.COMPLETED


async def test_an_id_that_was_given_out_again_is_never_taken_for_the_old_one(
    tmp_path: Path, history: tuple[messages.HeldAttempt, messages.HeldAttempt]
) -> None:
    _, after = history
    async with running_fleet(tmp_path) as fleet:
        other = await fleet.agent("other")
        job_id, new = await _assigned(fleet, other)
        assert (job_id, new.attempt_id) == (after.job_id, after.attempt_id), "it is given out again"
        _, welcome = await _connect(fleet, after)
        assert welcome.keep == ()
        assert (await fleet.state(job_id))[0] is JobState.RUNNING
        # nor if it is the very agent that got the id again
        again = fleet.connect("other")
        again.hello(instance="another", attempts=(after,))
        other.disconnect()
        assert (await again.wait_for(messages.Welcome)).keep == ()
        async with asyncio.timeout(20):
            while JobState.QUEUED not in [
                line.after for line in (await fleet.store.history.of_job(job_id))[-2:]
            ]:
                await asyncio.sleep(0.01)


async def test_a_directory_from_before_there_were_incarnations_is_known_by_its_id(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("old")
        _, held = await _assigned(fleet, peer)
        peer.disconnect()
        old = messages.HeldAttempt(held.job_id, held.attempt_id, held.phase, held.input_offset)
        again = fleet.connect("old")
        again.hello(attempts=(old,))
        assert (await again.wait_for(messages.Welcome)).keep[0].attempt_id == held.attempt_id


async def test_ids_are_not_used_up_by_a_claim(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        liar = fleet.connect("liar")
        claim = messages.HeldAttempt(2**59, 2**59, messages.AttemptPhase.RUNNING, 0, "elsewhere")
        liar.hello(attempts=(claim,))
        await liar.wait_for(messages.Welcome)
        assert await fleet.submit() == 1
        assert (await liar.wait_for(messages.Assign)).attempt_id == 1
