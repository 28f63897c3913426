"""Statuses kept in memory: polls need no read, and none is ever told what is out of date."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from events import Transition
from jobs import JobState
from records import JobStatus, Loss, UserQueue
from storage import statuses as store_status
from storage import writer
from storage.database import Database
from storage.statuses import LatestStatuses
from store import Store
from tests.storage.steps import TO_AGENT, begin, make_job, opened, run_job, zipped
from wire.messages import Finished

pytestmark = pytest.mark.quick

RESULT = zipped(b"zip")


def stored(path: Path, job_id: int) -> JobStatus:
    """What the file says."""
    with sqlite3.connect(path) as db:
        row = db.execute("SELECT id, state, message FROM job WHERE id = ?", (job_id,)).fetchone()
    return JobStatus(row[0], JobState(row[1]), row[2])


async def test_a_poll_is_answered_while_no_connection_is_free_to_read(store: Store) -> None:
    job = await make_job(store)
    readers = [
        store._file._idle_readers.get_nowait() for _ in range(store._file._idle_readers.qsize())
    ]
    assert await store.jobs.status(job.id) == JobStatus(job.id, JobState.QUEUED, "uploaded")
    await begin(store, job)
    assert await store.jobs.status(job.id) == JobStatus(job.id, JobState.PROCESSING, "")
    for reader in readers:
        store._file._idle_readers.put_nowait(reader)


async def test_after_a_restart_the_first_poll_reads_and_the_next_does_not(path: Path) -> None:
    async with opened(path) as store:
        job = await make_job(store)
    async with opened(path) as store:
        first = await store.jobs.status(job.id)
        store._file._idle_readers.get_nowait()
        store._file._idle_readers.get_nowait()
        store._file._idle_readers.get_nowait()
        assert first == await store.jobs.status(job.id) == stored(path, job.id)


async def test_the_status_is_that_of_the_file_after_every_kind_of_change(
    store: Store, path: Path
) -> None:
    async def agree(job_id: int, state: JobState) -> None:
        status = await store.jobs.status(job_id)
        assert status == stored(path, job_id)
        assert status is not None
        assert status.state is state

    job = await make_job(store)
    await agree(job.id, JobState.QUEUED)
    attempt_id = await run_job(store, job)
    await agree(job.id, JobState.RUNNING)
    await store.attempts.requeue(attempt_id, Loss.AGENT_AWAY, "lost", max_attempts=2)
    await agree(job.id, JobState.QUEUED)
    attempt_id = await run_job(store, job)
    await store.attempts.requeue(attempt_id, Loss.AGENT_AWAY, "lost", max_attempts=2)
    await agree(job.id, JobState.FAILED)

    completed = await make_job(store)
    attempt_id = await run_job(store, completed)
    report = Finished(attempt_id, JobState.COMPLETED, 0, "done well", len(RESULT), "0" * 64)
    await store.attempts.finish("agent-1", report, 0, [RESULT])
    await agree(completed.id, JobState.COMPLETED)

    withdrawn = await make_job(store)
    assert await store.jobs.withdraw(withdrawn.id, "not wanted")
    await agree(withdrawn.id, JobState.KILLED)
    killed = await make_job(store)
    await run_job(store, killed)
    await store.jobs.kill(killed.id, "stopped")
    await agree(killed.id, JobState.KILLED)
    rejected = await make_job(store)
    await store.attempts.reject((await begin(store, rejected)).attempt_id, "no such thing")
    await agree(rejected.id, JobState.INVALID)

    while await store.retention.clean_some(0):
        pass
    for job_id in (job.id, completed.id, withdrawn.id, killed.id, rejected.id):
        await agree(job_id, JobState.CLEANED)


async def test_what_others_can_read_already_is_told_before_the_commit_is_acknowledged(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a client could see a job's end in one answer, and not in the next."""
    job = await make_job(store)
    assert await store.jobs.status(job.id) is not None
    is_committed, may_go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    run_batch = writer._run_batch

    def run_slowly(
        db: Database, functions: Sequence[Callable[[Database], Any]], before_commit: Any
    ) -> Any:
        outcome = run_batch(db, functions, before_commit)
        # the eraser, too, commits now and then
        if stored(path, job.id).state is JobState.PROCESSING:
            loop.call_soon_threadsafe(is_committed.set)
            may_go_on.wait()
        return outcome

    monkeypatch.setattr(writer, "_run_batch", run_slowly)
    beginning = asyncio.create_task(store.attempts.begin_next(UserQueue("example", 1), TO_AGENT))
    try:
        await is_committed.wait()
        assert await store.jobs.status(job.id) == stored(path, job.id)
        assert not beginning.done()
    finally:
        may_go_on.set()
    await beginning
    assert await store.jobs.status(job.id) == stored(path, job.id)


def moved(job_id: int, after: JobState, message: str = "") -> Transition:
    return Transition(1, job_id, 1, "example", 1, 0.0, None, after, "test", message=message)


async def unknown(job_id: int) -> JobStatus | None:
    """A read that must not come, or finds nothing."""
    return None


async def test_a_read_that_a_commit_overtakes_is_not_kept() -> None:
    statuses = LatestStatuses()
    may_end = asyncio.Event()

    async def read(job_id: int) -> JobStatus | None:
        await may_end.wait()
        return JobStatus(job_id, JobState.QUEUED, "from before")

    reading = asyncio.create_task(statuses.get(1, read))
    await asyncio.sleep(0)
    statuses.doubt([moved(1, JobState.PROCESSING)])
    statuses.take_in([moved(1, JobState.PROCESSING)])
    may_end.set()
    await reading
    assert await statuses.get(1, unknown) == JobStatus(1, JobState.PROCESSING, "")


async def test_an_overtaken_read_is_not_kept_even_if_the_newer_status_is_not_known_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_status, "_MAX_JOBS", 1)
    statuses = LatestStatuses()
    may_end = asyncio.Event()

    async def read(job_id: int) -> JobStatus | None:
        await may_end.wait()
        return JobStatus(job_id, JobState.QUEUED, "from before")

    reading = asyncio.create_task(statuses.get(1, read))
    await asyncio.sleep(0)
    statuses.take_in([moved(1, JobState.PROCESSING), moved(2, JobState.PROCESSING)])
    may_end.set()
    await reading
    assert await statuses.get(1, unknown) is None
    assert await statuses.get(2, unknown) == JobStatus(2, JobState.PROCESSING, "")


async def test_only_so_many_statuses_and_no_long_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store_status, "_MAX_JOBS", 3)
    statuses = LatestStatuses()
    statuses.take_in([moved(job_id, JobState.QUEUED) for job_id in range(1, 6)])
    assert [await statuses.get(job_id, unknown) is None for job_id in range(1, 6)] == [
        *(True, True, False, False, False)
    ]
    statuses.take_in([moved(4, JobState.FAILED, "long" * 1000)])
    assert await statuses.get(4, unknown) is None
