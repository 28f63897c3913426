"""The promises of the store, on a real file."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import Demand, JobState
from records import (
    IllegalTransition,
    InputGone,
    JobFilter,
    JobIdentity,
    JobRequest,
    KnownAgent,
    Loss,
    NewOutput,
    OutputPiece,
    QueueFull,
    ResultMismatch,
    StoreFull,
    StoreRefused,
    Superseded,
    UserQueue,
)
from storage import schema
from storage.attempts import EARLY_LOSSES_OF_A_START
from storage.blobs import SMALL_BYTES
from storage.check import check
from storage.database import Database, checkpoint
from storage.tokens import read_agent_token
from store import Store
from tests.storage.steps import (
    NO_LIMIT,
    TO_AGENT,
    begin,
    eventually_no_chunks,
    filled,
    make_job,
    opened,
    report,
    rows,
    run_job,
    step,
    zipped,
)
from wire.frames import CHUNK_BYTES, Stream

pytestmark = pytest.mark.quick

QUEUED = "SELECT user_id, jobs FROM job_count WHERE state = 'Queued'"


async def test_a_sqlite_that_is_too_old_is_refused_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    monkeypatch.setattr(sqlite3, "sqlite_version", "3.34.1")
    with pytest.raises(StoreRefused, match=r"SQLite 3\.34\.1, at least 3\.35\.0 .* newer Python"):
        await Store.open(str(path))
    assert not path.exists()


async def test_files_come_back_as_they_went_in(store: Store) -> None:
    contents = [b"", b"x", bytes(range(256)) * 5000, b"y" * CHUNK_BYTES, b"z" * (CHUNK_BYTES + 1)]
    upload = store.uploads.new()
    for number, content in enumerate(contents):
        upload.start_file(f"file {number}")
        for start in range(0, len(content), 100_000):
            await upload.write(content[start : start + 100_000])
        await upload.finish_file()
    job = (await upload.commit(JobRequest(1, "example"), "uploaded", NO_LIMIT)).job
    assignment = await begin(store, job)
    stream, whole = b"", b"".join(contents)
    while len(stream) < len(whole):
        stream += await store.blobs.read_files(assignment.files, len(stream))
    assert stream == whole
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    assert [file.spec.sha256 for file in assignment.files] == digests


async def test_an_upload_cancelled_while_its_bytes_are_written_leaves_nothing(
    store: Store, path: Path
) -> None:
    for _ in range(20):
        await store.probe()  # meanwhile the eraser has looked round, as it does at the start
    disk_answers = threading.Event()
    hanging = asyncio.ensure_future(store._file._writer.write(lambda _: disk_answers.wait(20)))
    upload = store.uploads.new()
    upload.start_file("data")

    async def fill() -> None:
        while True:
            await upload.write(bytes(1024 * 1024))

    filling = asyncio.create_task(fill())
    assert await asyncio.wait([filling], timeout=0.2) == (set(), {filling}), "it waits for the disk"
    filling.cancel()
    await asyncio.wait([filling])
    abandoning = asyncio.create_task(upload.abandon())
    disk_answers.set()
    await asyncio.gather(hanging, abandoning)
    await store.probe()  # whatever was in the queue before is written
    await eventually_no_chunks(path)
    assert rows(path, "SELECT count(*) FROM blob") == [(0,)]


async def test_a_commit_is_visible_to_others_before_it_is_acknowledged(
    store: Store, path: Path
) -> None:
    job = await make_job(store)
    assert rows(path, "SELECT id, state FROM job") == [(job.id, "Queued")]
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


async def test_writes_that_wait_together_share_a_transaction(store: Store) -> None:
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    await store._file._connections[0].set_trace_callback(count)
    await asyncio.gather(*(make_job(store) for _ in range(200)))
    assert commits < 20


async def test_one_failing_operation_does_not_fail_its_neighbours(store: Store) -> None:
    job = await make_job(store)
    outcomes = await asyncio.gather(
        store.probe(),
        store.attempts.begin_next(job.queue, {Demand(): KnownAgent("no such agent", "")}),
        make_job(store),
        return_exceptions=True,
    )
    assert outcomes[0] is None
    assert isinstance(outcomes[1], sqlite3.IntegrityError)
    assert isinstance(outcomes[2], JobIdentity)
    status = await store.jobs.status(job.id)
    assert status is not None
    assert status.state is JobState.QUEUED


async def test_an_abandoned_upload_leaves_no_row_and_no_bytes(store: Store, path: Path) -> None:
    upload = store.uploads.new()
    upload.start_file("run.sh")
    await upload.write(bytes(5 * 1024 * 1024))
    await upload.abandon()
    await eventually_no_chunks(path)
    assert rows(path, "SELECT count(*) FROM job") == [(0,)]
    assert rows(path, "SELECT count(*) FROM blob") == [(0,)]


async def test_an_upload_cut_short_by_a_crash_is_cleaned_at_start(path: Path) -> None:
    async with opened(path) as store:
        await make_job(store, b"stays")
        upload = store.uploads.new()
        upload.start_file("run.sh")
        await upload.write(bytes(5 * 1024 * 1024))
        await store.probe()  # what was flushed before is committed now
        assert rows(path, "SELECT count(*) FROM blob WHERE state = 'open'") == [(1,)]
    async with opened(path):
        deadline = time.monotonic() + 10
        while rows(path, "SELECT count(*) FROM chunk") != [(1,)]:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    assert rows(path, "SELECT count(*) FROM job") == [(1,)]


async def test_a_second_server_on_the_file_is_refused(store: Store, path: Path) -> None:
    with pytest.raises(StoreRefused, match="another server"):
        await Store.open(str(path))
    await store.probe()


async def test_a_newer_file_a_foreign_file_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    newer, foreign, damaged = tmp_path / "newer", tmp_path / "foreign", tmp_path / "damaged"
    async with opened(newer):
        pass
    with contextlib.closing(sqlite3.connect(newer)) as db:
        db.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    with contextlib.closing(sqlite3.connect(foreign)) as db:
        db.execute("CREATE TABLE theirs (x)")
    damaged.write_bytes(b"not a database" * 1000)
    for path, reason in ((newer, "newer"), (foreign, "another program"), (damaged, "not a data")):
        before = path.read_bytes()
        with pytest.raises(StoreRefused, match=reason):
            await Store.open(str(path))
        assert path.read_bytes() == before


async def test_every_transition_is_written_to_the_history(store: Store) -> None:
    job = await make_job(store)
    attempt_id = await run_job(store, job)
    await store.attempts.finish(
        "agent-1", report(attempt_id, zipped(b"result")), 0, [zipped(b"result")]
    )
    history = await store.history.of_job(job.id)
    assert [transition.after for transition in history] == [
        JobState.QUEUED,
        JobState.PROCESSING,
        JobState.SUBMITTED,
        JobState.RUNNING,
        JobState.COMPLETED,
    ]
    assert [transition.before for transition in history[1:]] == [
        transition.after for transition in history[:-1]
    ]


async def test_the_history_is_append_only(store: Store, path: Path) -> None:
    await make_job(store)
    with contextlib.closing(sqlite3.connect(path)) as db:
        for sql in ("UPDATE history SET reason = 'x'", "DELETE FROM history"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(sql)


async def test_a_transition_that_the_table_does_not_allow_changes_nothing(store: Store) -> None:
    job = await make_job(store)
    assignment = await begin(store, job)
    with pytest.raises(IllegalTransition):
        await store.attempts.finish(
            "agent-1", report(assignment.attempt_id, zipped(b"r")), 0, [zipped(b"r")]
        )
    status = await store.jobs.status(job.id)
    assert status is not None
    assert status.state is JobState.PROCESSING
    assert await store.attempts.result_size(assignment.attempt_id) == 0


async def test_an_older_attempt_can_do_nothing(store: Store) -> None:
    job = await make_job(store)
    old = await run_job(store, job)
    await store.attempts.append_result(old, 0, [bytes(CHUNK_BYTES)])
    assert await store.attempts.requeue(old, Loss.AGENT_AWAY, "lost", 3) is JobState.QUEUED
    new = await run_job(store, job)
    for late in (
        store.attempts.advance(old, [step(JobState.RUNNING)]),
        store.attempts.append_result(old, CHUNK_BYTES, [b"x"]),
        store.attempts.finish("agent-1", report(old, zipped(b"late")), 0, [zipped(b"late")]),
        store.attempts.requeue(old, Loss.AGENT_AWAY, "late", 3),
        store.attempts.reject(old, "late"),
    ):
        with pytest.raises(Superseded):
            await late
    await store.attempts.finish("agent-1", report(new, zipped(b"new")), 0, [zipped(b"new")])
    result = await store.blobs.result_of_job(job.id)
    assert result is not None
    assert await store.blobs.read(result.blob_id, 0, 3) == [b"new"]


async def test_a_repeated_finish_does_no_harm(store: Store) -> None:
    job = await make_job(store)
    attempt_id = await run_job(store, job)
    for _ in range(2):
        await store.attempts.finish(
            "agent-1", report(attempt_id, zipped(b"result")), 0, [zipped(b"result")]
        )
    assert len(await store.history.of_job(job.id)) == 5


async def test_a_line_gives_its_jobs_by_priority_then_in_the_order_of_their_arrival(
    store: Store, path: Path
) -> None:
    jobs = [await make_job(store) for _ in range(5)]
    other = await make_job(store, user_id=2)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE job SET priority = 7 WHERE id IN (?, ?)", (jobs[2].id, jobs[4].id))
        db.commit()
    expected = [jobs[index] for index in (2, 4, 0, 1, 3)]
    assert [await store.jobs.queue_position(job.id) for job in expected] == [1, 2, 3, 4, 5]
    assert await store.jobs.queue_lengths() == {
        (jobs[0].queue, Demand()): 5,
        (other.queue, Demand()): 1,
    }
    first = await begin(store, expected[0])
    assert await store.jobs.queue_position(expected[0].id) is None
    assert await store.jobs.withdraw(expected[1].id, "not wanted")
    assert not await store.jobs.withdraw(expected[0].id, "an agent has it")
    await begin(store, expected[2])
    # queued again, it keeps its place
    await store.attempts.requeue(first.attempt_id, Loss.AGENT_AWAY, "lost", 2)
    assert await store.jobs.queue_position(expected[0].id) == 1
    for job in (expected[0], *expected[3:]):
        await begin(store, job)
    assert await store.attempts.begin_next(other.queue, TO_AGENT) is not None
    for line in (other.queue, jobs[0].queue, UserQueue("example", 3)):
        assert await store.attempts.begin_next(line, TO_AGENT) is None
    assert await store.jobs.queue_lengths() == {}


async def test_a_result_of_another_length_is_refused(store: Store) -> None:
    job = await make_job(store)
    attempt_id = await run_job(store, job)
    with pytest.raises(ResultMismatch):
        await store.attempts.finish("agent-1", report(attempt_id, b"whole"), 0, [b"who"])
    with pytest.raises(ResultMismatch):
        await store.attempts.append_result(attempt_id, CHUNK_BYTES, [b"gap"])
    assert await store.blobs.result_of_job(job.id) is None
    assert await store.attempts.result_size(attempt_id) == 0


async def test_a_small_result_comes_with_its_content(store: Store) -> None:
    small, large = await make_job(store), await make_job(store)
    contents = {small.id: zipped(b"small"), large.id: zipped(bytes(SMALL_BYTES))}
    for job in (small, large):
        content = contents[job.id]
        await store.attempts.finish(
            "agent-1", report(await run_job(store, job), content), 0, [content]
        )
    results = [await store.blobs.result_of_job(job.id) for job in (small, large)]
    assert [result.content for result in results if result] == [zipped(b"small"), None]
    assert await store.retention.clean_some(-1) == 2
    assert await store.blobs.result_of_job(small.id) is None


async def test_a_job_is_given_up_after_the_allowed_number_of_lost_starts(store: Store) -> None:
    job = await make_job(store)
    for _ in range(EARLY_LOSSES_OF_A_START):  # as one start
        early = (await begin(store, job)).attempt_id
        assert await store.attempts.requeue(early, Loss.AGENT_AWAY, "lost", 2) is JobState.QUEUED
    started = await run_job(store, job)
    assert (
        await store.attempts.requeue(started, Loss.AGENT_AWAY, "agent gone", 2) is JobState.FAILED
    )
    status = await store.jobs.status(job.id)
    assert status is not None
    assert status.message == "agent gone; given up after 2 attempts"


async def test_what_a_crash_left_in_the_log_is_in_the_file_before_anything_is_built_on_it(
    store: Store, path: Path, tmp_path: Path
) -> None:
    await make_job(store)
    left = tmp_path / "left" / "orchestrator.db"
    left.parent.mkdir()
    for end in ("", "-wal"):
        left.with_name(left.name + end).write_bytes(path.with_name(path.name + end).read_bytes())
    assert rows(left, "SELECT id FROM job") == [(1,)]
    async with opened(left):
        alone = left.with_name("alone.db")
        alone.write_bytes(left.read_bytes())
    assert rows(alone, "SELECT id FROM job") == [(1,)]


async def test_retention_frees_the_bytes_and_shrinks_the_file(store: Store, path: Path) -> None:
    job = await make_job(store, bytes(8 * 1024 * 1024))
    attempt_id = await run_job(store, job)
    await store.attempts.finish(
        "agent-1", report(attempt_id, zipped(b"result")), 0, [zipped(b"result")]
    )
    kept = await make_job(store)
    await store._file._writer.outside_transaction(checkpoint)
    large = path.stat().st_size
    assert large > 8 * 1024 * 1024
    assert await store.retention.clean_some(-1) == 1
    deadline = time.monotonic() + 10
    while path.stat().st_size > large / 10:
        assert time.monotonic() < deadline, path.stat().st_size
        await asyncio.sleep(0.01)
    states = [await store.jobs.status(job_id) for job_id in (job.id, kept.id)]
    assert [status.state for status in states if status] == [JobState.CLEANED, JobState.QUEUED]


async def test_many_small_files_are_erased_in_few_steps(store: Store, path: Path) -> None:
    """One a step would fall behind what comes in, and pile up."""
    await asyncio.gather(*(make_job(store) for _ in range(600)))
    await store.uploads.rerun(1, JobRequest(1, "example"), "again", NO_LIMIT)
    assert len(await store.jobs.withdraw_many(range(1, 601), "terminated")) == 600
    with sqlite3.connect(path) as db:
        db.execute("UPDATE blob SET state = 'doomed' WHERE id > 1")
        db.execute("UPDATE input_file SET blob_id = NULL WHERE blob_id > 1")
    steps = 0
    while await store._file.write(store.blobs.erase_some, 1):
        steps += 1
    assert steps <= 3
    assert rows(path, "SELECT count(*) FROM chunk") == [(1,)]


async def test_a_download_that_runs_keeps_its_bytes_from_retention(
    store: Store, path: Path
) -> None:
    job = await make_job(store)
    attempt_id = await run_job(store, job)
    whole = zipped(bytes(CHUNK_BYTES) + b"end")
    chunks = [whole[:CHUNK_BYTES], whole[CHUNK_BYTES:]]
    await store.attempts.finish("agent-1", report(attempt_id, b"".join(chunks)), 0, chunks)
    result = await store.blobs.result_of_job(job.id)
    assert result is not None
    with store.blobs.pinned(result.blob_id):
        assert await store.retention.clean_some(-1) == 1
        await store._eraser._erase_all()
        assert await store.blobs.read(result.blob_id, CHUNK_BYTES, 3) == [b"end"]
    await eventually_no_chunks(path)


async def test_a_nearly_full_disk_takes_no_bytes_but_finishes_and_erases(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await make_job(store, bytes(1024 * 1024))
    attempt_id = await run_job(store, job)
    real = os.statvfs(path)
    blocks = list(real[:10])
    blocks[4] = 100  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(blocks))
    upload = await filled(store, b"true")
    for refused in (
        upload.commit(JobRequest(1, "example"), "uploaded", NO_LIMIT),
        store.attempts.append_result(attempt_id, 0, [bytes(CHUNK_BYTES)]),
        store.probe(),
    ):
        with pytest.raises(StoreFull):
            await refused
    await store.jobs.kill(job.id, "terminated")
    assert await store.retention.clean_some(-1) == 1
    await eventually_no_chunks(path)
    monkeypatch.undo()
    await make_job(store)


async def test_the_agent_token_stays_and_can_be_read_beside_the_server(
    store: Store, path: Path
) -> None:
    assert read_agent_token(str(path)) == await store.tokens.agent_token()
    assert len(await store.tokens.agent_token()) >= 32


async def test_shared_input_is_erased_with_the_last_job_that_refers_to_it(
    store: Store, path: Path
) -> None:
    first = await make_job(store, b"shared")
    request = await store.jobs.request(first.id)
    assert request == JobRequest(1, "example")
    second = (await store.uploads.rerun(first.id, request, "again", NO_LIMIT)).job
    await store.jobs.kill(first.id, "terminated")
    assert await store.retention.clean_some(-1) == 1
    await store._eraser._erase_all()
    assignment = await begin(store, second)
    assert await store.blobs.read_files(assignment.files, 0) == b"shared"
    assert check(str(path), lambda done, total: None) == []
    with pytest.raises(InputGone, match=f"job {first.id} is no longer stored"):
        await store.uploads.rerun(first.id, request, "again", NO_LIMIT)
    await store.jobs.kill(second.id, "terminated")
    assert await store.retention.clean_some(-1) == 1
    await eventually_no_chunks(path)


async def test_the_length_of_the_line_follows_every_change_of_state(
    store: Store, path: Path
) -> None:
    job = await make_job(store)
    with pytest.raises(QueueFull):
        await store.uploads.rerun(job.id, JobRequest(1, "example"), "again", 1)
    attempt_id = await run_job(store, job)
    assert rows(path, QUEUED) == [(1, 0)]
    await store.attempts.requeue(attempt_id, Loss.REPORTED, "test", 3)
    assert rows(path, QUEUED) == [(1, 1)]
    await store.jobs.kill(job.id, "terminated")
    assert rows(path, QUEUED) == [(1, 0)]
    assert check(str(path), lambda done, total: None) == []


async def test_no_statement_gets_slower_with_the_number_of_jobs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: dict[str, Any] = {}

    def execute(self: Database, sql: str, parameters: Any = ()) -> sqlite3.Cursor:
        statements[sql] = parameters
        return sqlite3.Connection.execute(self, sql, parameters)

    async with opened(path):
        pass  # the migrations may scan, they run once
    monkeypatch.setattr(Database, "execute", execute)
    async with opened(path) as store:
        await _change_jobs(store)
        await _ask_about_jobs(store)
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.create_function("steady_now", 0, time.time)
        scans = {
            detail: statement
            for statement, parameters in statements.items()
            if statement.split()[0] in ("SELECT", "INSERT", "UPDATE", "DELETE")
            for *_, detail in db.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            if re.match(r"SCAN [a-z]+( |$)(?!VIRTUAL)", detail) and not detail.endswith(_FEW_ROWS)
        }
    assert len(statements) > 60
    assert set(scans) == {
        "SCAN job USING INDEX job_demand",  # the start counts the queue
        "SCAN incarnation",  # the start reads one row for each start before
        "SCAN job USING INDEX job_final",  # the start reads the last of them, up to a limit
    }, scans


# agents, and partial indices of rows that are soon dealt with
_FEW_ROWS = (
    "SCAN agent",
    "SCAN job_count",
    "SCAN line",
    "_active",
    "_open",
    "_doomed",
    "sqlite_master",
)


async def _change_jobs(store: Store) -> None:
    """Have every statement run that changes something; job 6 is queued after, job 1 completed."""
    await store.agents.record_connection("agent-1", "one")
    jobs = [await make_job(store, bytes(1024 * 1024 + 1)) for _ in range(6)]
    abandoned = store.uploads.new()
    abandoned.start_file("run.sh")
    await abandoned.write(bytes(2 * 1024 * 1024))
    await abandoned.abandon()
    attempt_id = await run_job(store, jobs[0])
    await store.attempts.append_result(attempt_id, 0, [bytes(CHUNK_BYTES)])
    await store.attempts.discard_result(attempt_id)
    output = OutputPiece(Stream.STDOUT, 0, b"printed")
    await store.output.append(attempt_id, NewOutput((output,), 1000))
    await store.attempts.finish("agent-1", report(attempt_id, zipped(b"r")), 0, [zipped(b"r")])
    await store.attempts.requeue(await run_job(store, jobs[1]), Loss.AGENT_AWAY, "lost", 2)
    await store.attempts.requeue(await run_job(store, jobs[1]), Loss.REPORTED, "lost", 1)
    await store.attempts.reject((await begin(store, jobs[2])).attempt_id, "bad")
    held = await begin(store, jobs[3])
    await store.jobs.kill(jobs[3].id, "unwanted")
    await store.attempts.killed_without_result(held.attempt_id, "agent-1")
    await store.jobs.withdraw(jobs[4].id, "unwanted")
    request = JobRequest(1, "example", tags=(("a", "b"),), idempotency_key="key")
    await store.uploads.rerun(jobs[5].id, request, "again", NO_LIMIT)
    await store.agents.set_drained("one", True)
    await store.retention.clean_some(60)
    await store.retention.forget_old_keys()
    await store.probe()


async def _ask_about_jobs(store: Store) -> None:
    """Have every statement run that only reads."""
    active = await begin(store, JobIdentity(6, 1, "example"))
    await store.attempts.input_files(active.attempt_id)
    await store.blobs.read_files(active.files, 0)
    await store.attempts.result_size(active.attempt_id)
    await store.jobs.queue_lengths()
    await store.attempts.active()
    await store.agents.drained()
    await store.retention.oldest_age()
    await store.jobs.times_of_last(10)
    await store.history.last_ids()
    await store.history.transitions_after(3, 10)
    await store.history.agent_changes_after(0, 10)
    for job_id in (1, 7):
        assert await store.jobs.details(job_id) is not None
        await store.jobs.status(job_id)
        await store.jobs.request(job_id)
        await store.history.of_job(job_id)
        await store.jobs.owner_of(job_id)
        await store.jobs.queue_position(job_id)
        await store.blobs.input_of_job(job_id)
        await store.output.source(job_id)
        await store.blobs.result_of_job(job_id)
    await store.output.read(1, Stream.STDOUT, 0)
    await store.output.latest_end(1, Stream.STDOUT)
    for wanted in (
        JobFilter(),
        JobFilter(user_id=1),
        JobFilter(service="example"),
        JobFilter(states=frozenset([JobState.QUEUED])),
        JobFilter(states=frozenset([JobState.RUNNING])),
        JobFilter(states=frozenset([JobState.FAILED])),
        JobFilter(tags=(("a", "b"),)),
        JobFilter(since=time.time(), text="x", agent="one"),
    ):
        await store.jobs.find(wanted, None, 10)


async def test_a_killed_job_takes_what_its_last_attempt_left_once_and_nothing_else(
    store: Store, path: Path
) -> None:
    job = await make_job(store)
    lost = await run_job(store, job)
    await store.attempts.requeue(lost, Loss.AGENT_AWAY, "away", 3)
    current = await run_job(store, job)
    await store.jobs.kill(job.id, "Job terminated")
    assert await store.attempts.killed_without_result(lost, "agent-1") is None
    expected = await store.attempts.killed_without_result(current, "agent-1")
    assert expected is not None
    assert (expected.attempt_id, expected.state) == (current, JobState.KILLED)
    with pytest.raises(Superseded):
        await store.attempts.finish("agent-1", report(lost, zipped(b"late")), 0, [zipped(b"late")])
    chunk = bytes(CHUNK_BYTES)
    await store.attempts.append_result(current, 0, [chunk])
    for _ in ("first", "repeated"):
        whole = zipped(chunk + b"left")
        tail = [whole[CHUNK_BYTES:]]
        await store.attempts.finish("agent-1", report(current, whole), CHUNK_BYTES, tail)
    assert await store.attempts.killed_without_result(current, "agent-1") is None
    with pytest.raises(Superseded):
        await store.attempts.append_result(current, 0, [chunk])
    await store.attempts.finish(
        "agent-1", report(current, zipped(b"another")), 0, [zipped(b"another")]
    )
    sizes = rows(path, "SELECT size FROM blob JOIN attempt ON blob.id = result_blob")
    assert sizes == [(CHUNK_BYTES + 4 + 22,)]
    assert rows(path, "SELECT state, message FROM job") == [("Killed", "Job terminated")]
    history = await store.history.of_job(job.id)
    assert [transition.after for transition in history][-2:] == [JobState.RUNNING, JobState.KILLED]


async def test_what_a_killed_job_left_goes_with_retention_even_if_it_never_came_whole(
    path: Path,
) -> None:
    async with opened(path) as store:
        await store.agents.record_connection("agent-1", "one")
        job = await make_job(store)
        attempt_id = await run_job(store, job)
        await store.jobs.kill(job.id, "Job terminated")
        await store.attempts.append_result(attempt_id, 0, [bytes(CHUNK_BYTES)])
    async with opened(path) as store:
        assert await store.attempts.result_size(attempt_id) == CHUNK_BYTES, "a crash keeps it"
        assert await store.retention.clean_some(-1) == 1
        await eventually_no_chunks(path)
        assert await store.attempts.killed_without_result(attempt_id, "agent-1") is None
        with pytest.raises(Superseded):
            await store.attempts.append_result(attempt_id, CHUNK_BYTES, [b"more"])


async def test_a_file_of_the_first_version_is_brought_up_to_date(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for statement in schema.MIGRATIONS[0]:
            db.execute(statement)
        db.execute("PRAGMA user_version = 1")
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        for job_id, user_id, state in ((1, 7, "Queued"), (2, 7, "Queued"), (3, 8, "Killed")):
            db.execute(
                "INSERT INTO job (id, user_id, service, state, message, created_at, changed_at)"
                " VALUES (?, ?, 'example', ?, '', 0, 0)",
                (job_id, user_id, state),
            )
    assert [
        problem for problem in check(str(path), lambda done, total: None) if "line" in problem
    ] == []
    async with opened(path) as store:
        assert rows(path, QUEUED) == [(7, 2)]
        await store.jobs.kill(1, "terminated")
        assert rows(path, QUEUED) == [(7, 1)]
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE job_count SET jobs = 5 WHERE user_id = 7 AND state = 'Queued'")
    assert "user 7 has 1 jobs Queued for example, counted were 5" in check(
        str(path), lambda done, total: None
    )
