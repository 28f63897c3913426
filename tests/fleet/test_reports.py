"""What an agent says of an attempt: what has come together is stored together."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from events import Transition
from jobs import JobState
from storage.database import Database
from tests.fleet.peers import Fleet, Peer, archive, finished, running_fleet
from wire import messages
from wire.frames import CHUNK_BYTES, Stream

pytestmark = pytest.mark.quick


async def attempt_of(fleet: Fleet, peer: Peer) -> tuple[int, int]:
    """Have a job given to the agent; returns the job and the attempt."""
    job_id = await fleet.submit()
    return job_id, (await peer.wait_for(messages.Assign)).attempt_id


async def answered(peer: Peer) -> None:
    """Wait until all that was said has been taken in."""
    peer.say(messages.Heartbeat())
    await peer.wait_for(messages.Heartbeat)


async def history(fleet: Fleet, job_id: int) -> list[Transition]:
    return list(await fleet.store.history.of_job(job_id))


ALL_STATES = [
    JobState.QUEUED,
    JobState.PROCESSING,
    JobState.SUBMITTED,
    JobState.RUNNING,
    JobState.COMPLETED,
]


async def test_a_whole_life_that_comes_at_once_is_one_transaction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def not_alone(*_: object) -> None:
        raise AssertionError("it is stored with the end")

    async with running_fleet(tmp_path) as fleet:
        monkeypatch.setattr(fleet.store.attempts, "advance", not_alone)
        monkeypatch.setattr(fleet.store.output, "append", not_alone)
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        content = archive()
        with fleet.store.feed.transitions_of(job_id, 10) as told:
            peer.run_through(attempt_id)
            peer.send(attempt_id, b"done\n", Stream.STDOUT)
            peer.say(finished(attempt_id, content))
            peer.send(attempt_id, content)
            await peer.wait_for(messages.Stored)
            seen = [await told.next() for _ in range(3)]
        lines = await history(fleet, job_id)
        assert [line.after for line in lines] == ALL_STATES
        assert [line.before for line in lines] == [None, *ALL_STATES[:-1]]
        assert seen == lines[2:]
        details = await fleet.store.jobs.details(job_id)
        assert details is not None
        assert details.summary.started_at == lines[3].at
        assert details.summary.finished_at == lines[4].at
        output = await fleet.store.output.read(job_id, Stream.STDOUT, 0)
        assert [piece.data for piece in output] == [b"done\n"]


async def test_steps_that_come_alone_are_stored_at_once(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        for report, state in (
            (messages.Accepted(attempt_id), JobState.SUBMITTED),
            (messages.Started(attempt_id), JobState.RUNNING),
        ):
            peer.say(report)
            await fleet.wait(job_id, state)


async def test_what_is_said_again_does_nothing(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        content = archive()
        peer.run_through(attempt_id)
        peer.run_through(attempt_id)
        peer.deliver(attempt_id, content)
        await fleet.wait(job_id, JobState.COMPLETED)
        assert [line.after for line in await history(fleet, job_id)] == ALL_STATES
        job_id, attempt_id = await attempt_of(fleet, peer)
        peer.run_through(attempt_id)
        peer.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
        assert [line.after for line in await history(fleet, job_id)] == ALL_STATES[:-1]
        assert not peer.closed.is_set()


async def test_a_large_result_does_not_keep_the_steps_before_it(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        content = bytes(3 * CHUNK_BYTES)
        peer.run_through(attempt_id)
        peer.say(finished(attempt_id, content))
        peer.send(attempt_id, content[:CHUNK_BYTES])
        await fleet.wait(job_id, JobState.RUNNING)


async def test_a_step_has_the_time_at_which_it_was_said(tmp_path: Path) -> None:
    may_go_on = threading.Event()

    def hold(_: Database) -> None:
        may_go_on.wait()

    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        held = asyncio.create_task(fleet.store._file.write(hold))
        try:
            peer.say(messages.Accepted(attempt_id))
            await answered(peer)
            peer.say(messages.Started(attempt_id))
            await answered(peer)
            peer.say(finished(attempt_id, archive()))
            later = time.time()
            peer.send(attempt_id, archive())
        finally:
            may_go_on.set()
        await held
        await fleet.wait(job_id, JobState.COMPLETED)
        by_state = {line.after: line.at for line in await history(fleet, job_id)}
        assert by_state[JobState.SUBMITTED] < by_state[JobState.RUNNING] < later
        assert later < by_state[JobState.COMPLETED]


async def test_a_job_that_was_never_said_to_run_can_not_end(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("one")
        job_id, attempt_id = await attempt_of(fleet, peer)
        content = archive()
        peer.say(messages.Accepted(attempt_id), finished(attempt_id, content))
        peer.send(attempt_id, content)
        await asyncio.wait_for(peer.closed.wait(), 20)
        assert (await fleet.state(job_id))[0] in (JobState.PROCESSING, JobState.SUBMITTED)
