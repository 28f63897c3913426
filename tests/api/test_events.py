"""The feed: what is committed is told, in order, and never what was rolled back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from events import Feed, Lagged, SmallResult, Transition
from jobs import JobState
from records import IllegalTransition
from storage.blobs import SMALL_BYTES
from tests.storage.steps import begin, make_job, opened, report, run_job, step, zipped

pytestmark = pytest.mark.quick


def transition(number: int, job_id: int) -> Transition:
    return Transition(number, job_id, 1, "example", 0, 0.0, None, JobState.QUEUED, "test")


async def test_a_commit_is_told_and_a_refused_change_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path / "orchestrator.db") as store:
        await store.agents.record_connection("agent-1", "one")
        with store.feed.all_events(limit=10) as subscription:
            job = await make_job(store)
            attempt = await begin(store, job)
            outcomes = await asyncio.gather(
                store.attempts.finish(
                    "agent-1", report(attempt.attempt_id, zipped(b"r")), 0, [zipped(b"r")]
                ),
                store.attempts.advance(attempt.attempt_id, [step(JobState.SUBMITTED)]),
                return_exceptions=True,
            )
            assert isinstance(outcomes[0], IllegalTransition)
            told = [await subscription.next() for _ in range(3)]
        assert told == await store.history.of_job(job.id)
        after = [event.after for event in told if isinstance(event, Transition)]
        assert after == [JobState.QUEUED, JobState.PROCESSING, JobState.SUBMITTED]


async def test_a_subscriber_of_one_job_hears_of_no_other() -> None:
    feed = Feed()
    with feed.transitions_of(2, limit=5) as subscription:
        feed.publish([transition(1, 1), transition(2, 2), transition(3, 1), transition(4, 2)])
        assert [await subscription.next(), await subscription.next()] == [
            transition(2, 2),
            transition(4, 2),
        ]


async def test_who_waits_for_the_end_of_a_job_is_given_its_small_result(tmp_path: Path) -> None:
    small, large = zipped(b"r"), zipped(bytes(SMALL_BYTES))
    async with opened(tmp_path / "orchestrator.db") as store:
        await store.agents.record_connection("agent-1", "one")
        for result in (small, large):
            job = await make_job(store)
            attempt_id = await run_job(store, job)
            with (
                store.feed.end_of(job.id, limit=10) as end,
                store.feed.transitions_of(job.id, limit=10) as transitions,
                store.feed.all_events(limit=10) as everything,
            ):
                await store.attempts.finish("agent-1", report(attempt_id, result), 0, [result])
                told = await end.next_all()
                (ended,) = await transitions.next_all()
                assert await everything.next_all() == [ended]
            assert told[-1] == ended
            stored = await store.blobs.result_of_job(job.id)
            assert stored is not None
            if result is small:
                assert told[:-1] == [SmallResult(job.id, stored.blob_id, stored.sha256, small)]
            else:
                assert told[:-1] == []


async def test_a_subscriber_that_is_too_slow_is_told_so_after_what_it_can_still_have() -> None:
    feed = Feed()
    with feed.all_events(limit=2) as subscription:
        feed.publish([transition(number, 1) for number in range(1, 4)])
        assert await subscription.next() == transition(1, 1)
        assert await subscription.next() == transition(2, 1)
        with pytest.raises(Lagged):
            await subscription.next()
