"""What is asked about many jobs and done to them, and the clock by which they age."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from jobs import Demand, JobState, Resources
from records import JobFilter, JobRequest, KnownAgent, Loss, NotEnded
from storage import clock
from storage.check import check
from store import Store
from tests.storage.steps import (
    NO_LIMIT,
    begin,
    eventually_no_chunks,
    make_job,
    opened,
    report,
    run_job,
    submit,
    zipped,
)


@pytest.fixture
async def store(store: Store, path: Path) -> AsyncIterator[Store]:
    yield store
    assert check(str(path), lambda done, total: None) == []


async def fail(store: Store) -> int:
    job = await make_job(store, bytes(300_000))
    attempt_id = await run_job(store, job)
    result = zipped(b"result")
    finished = report(attempt_id, result, JobState.FAILED)
    await store.attempts.finish("agent-1", finished, 0, [result])
    return job.id


async def test_a_deleted_job_gives_its_bytes_back_and_still_says_how_it_ended(
    store: Store, path: Path
) -> None:
    job_id = await fail(store)
    status = await store.jobs.delete(job_id)
    assert status is not None
    assert (status.state, status.message) == (JobState.CLEANED, "files deleted")
    details = await store.jobs.details(job_id)
    assert details is not None
    assert details.summary.outcome is JobState.FAILED
    await eventually_no_chunks(path)
    again = await store.jobs.delete(job_id)
    assert again == status, "a second time it does nothing"
    assert len(await store.history.of_job(job_id)) == 6


async def test_only_a_job_that_has_ended_can_be_deleted(store: Store) -> None:
    queued, running = await make_job(store), await make_job(store, user_id=2)
    await begin(store, running)
    for job in (queued, running):
        with pytest.raises(NotEnded):
            await store.jobs.delete(job.id)
    assert await store.jobs.delete(99) is None
    assert await store.jobs.delete_many([queued.id, running.id, 99]) == 0


async def test_many_jobs_are_found_counted_ended_deleted_and_run_again(store: Store) -> None:
    failed = [await fail(store) for _ in range(3)]
    queued = [(await make_job(store)).id for _ in range(4)]
    everything = JobFilter()
    assert await store.jobs.counts(everything) == {JobState.FAILED: 3, JobState.QUEUED: 4}
    assert await store.jobs.counts(JobFilter(ids=frozenset(failed[:2]))) == {JobState.FAILED: 2}
    assert await store.jobs.counts(JobFilter(since=time.time() + 60)) == {}
    assert await store.jobs.counts(JobFilter(user_id=2)) == {}
    assert await store.jobs.counts(JobFilter(states=frozenset({JobState.QUEUED}))) == {
        JobState.QUEUED: 4
    }
    first = await store.jobs.find_ids(everything, None, 5)
    assert first.ids == (7, 6, 5, 4, 3)
    assert (await store.jobs.find_ids(everything, first.next_before, 5)).ids == (2, 1)
    page = await store.jobs.find(JobFilter(ids=frozenset({1, 5, 99})), None, 10)
    assert [job.id for job in page.jobs] == [5, 1]

    assert await store.jobs.withdraw_many([*failed, *queued[:2], 99], "ended") == queued[:2]
    made = await store.uploads.rerun_many([*failed, 99], NO_LIMIT, {"example"})
    assert [job.id for job in made] == [8, 9, 10]
    assert await store.uploads.rerun_many(failed, NO_LIMIT, {"another"}) == []
    last = await store.uploads.rerun_many(failed, 6, {"example"})
    assert [job.id for job in last] == [11], "then the queue is full"
    assert await store.jobs.delete_many([*failed, *queued]) == 5
    assert await store.uploads.rerun_many(failed, NO_LIMIT, {"example"}) == [], "input is gone"
    counts = await store.jobs.counts(everything)
    assert (counts[JobState.CLEANED], counts[JobState.QUEUED]) == (5, 6)


async def test_what_was_asked_for_is_kept_for_the_agent_and_for_another_run(store: Store) -> None:
    needed = Resources(4, 2**33, 2)
    asked = JobRequest(1, "example", cpus=4, memory=2**33, resources=needed)
    job = await submit(store, asked)
    assert await store.jobs.request(job.id) == asked
    demand = Demand(needed)
    assert await store.jobs.queue_lengths() == {(job.queue, demand): 1}
    assert await store.attempts.begin_next(job.queue, {Demand(): KnownAgent("agent-1", "")}) is None
    offers = {Demand(): KnownAgent("agent-2", ""), demand: KnownAgent("agent-1", "one")}
    assignment = await store.attempts.begin_next(job.queue, offers)
    assert assignment is not None
    assert (assignment.demand, assignment.agent_id) == (demand, "agent-1")


@pytest.mark.parametrize("jump", [366 * 86400.0, -366 * 86400.0], ids=["ahead", "back"])
async def test_nothing_ages_by_a_wall_clock_that_jumps(
    path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    request = JobRequest(1, "example", idempotency_key="key")
    true_time = time.time
    async with opened(path) as store:
        await store.agents.record_connection("agent-1", "one")
        job_id = (await submit(store, request)).id
        await store.jobs.kill(job_id, "terminated")
        monkeypatch.setattr(time, "time", lambda: true_time() + jump)
        await _expect_nothing_has_aged(store)
        assert (await submit(store, request)).id == job_id, "the key still stands for its job"
    async with opened(path) as store:  # also not over a restart
        await _expect_nothing_has_aged(store)
        assert (await submit(store, request)).id == job_id
    monkeypatch.setattr(clock, "_BOOT_ID", path.with_name("boot"))
    path.with_name("boot").write_text("another start of the machine")
    async with opened(path) as store:  # nor over one of the machine
        assert await store.retention.clean_some(3700) == 0
        assert (await submit(store, request)).id == job_id


async def _expect_nothing_has_aged(store: Store) -> None:
    assert await store.retention.clean_some(60) == 0
    age = await store.retention.oldest_age()
    assert age is not None
    assert 0 <= age < 60
    assert await store.retention.forget_old_keys() == 0


async def test_time_goes_on_while_no_server_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path) as store:
        await store.jobs.kill((await make_job(store)).id, "terminated")
    uptime = clock._uptime
    monkeypatch.setattr(clock, "_uptime", lambda: uptime() + 1000)
    async with opened(path) as store:
        age = await store.retention.oldest_age()
        assert age is not None
        assert age >= 1000
        assert await store.retention.clean_some(1000) == 1


async def test_an_attempt_that_was_lost_leaves_no_outcome(store: Store) -> None:
    job = await make_job(store)
    attempt_id = await run_job(store, job)
    await store.attempts.requeue(attempt_id, Loss.AGENT_AWAY, "lost", 3)
    details = await store.jobs.details(job.id)
    assert details is not None
    assert details.summary.outcome is None


async def test_a_replay_finds_what_is_asked_for_and_tells_how_far_it_looked(store: Store) -> None:
    for user_id in (1, 2, 1, 2, 2):
        await make_job(store, user_id=user_id)
    found, examined = await store.history.transitions_after(0, 2, user_id=2)
    assert ([event.job_id for event in found], examined) == ([2, 4], 4)
    found, examined = await store.history.transitions_after(4, 2, user_id=2)
    assert ([event.job_id for event in found], examined) == ([5], 5)
    assert await store.history.transitions_after(0, 9, service="another") == ([], 5)
    assert await store.history.transitions_after(5, 9) == ([], 5)


async def test_searches_and_downloads_leave_a_reader_to_the_others(store: Store) -> None:
    job = await make_job(store)
    may_end = threading.Event()
    heavy = [
        asyncio.ensure_future(read(lambda _: may_end.wait(30)))
        for _ in range(4)
        for read in (store._file.read_long, store._file.read_bulk)
    ]
    try:
        async with asyncio.timeout(20):
            assert await store.jobs.owner_of(job.id) == 1
        assert not any(task.done() for task in heavy)
    finally:
        may_end.set()
        assert all(await asyncio.gather(*heavy))
