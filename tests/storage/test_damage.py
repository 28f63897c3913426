"""Damage inside the file: a bit that flips is noticed by the check, or changes nothing."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from pathlib import Path

import pytest

from events import AgentChangeKind
from jobs import JobState
from records import JobRequest, NewOutput, OutputPiece, Role, StoreError, Token
from storage.check import check
from storage.tokens import create_token
from store import Store
from tests.storage.steps import make_job, opened, report, run_job, submit, zipped
from wire.frames import CHUNK_BYTES, Stream

SEED = int(os.environ.get("FAULT_SEED", "1"))
FLIPS = int(os.environ.get("FLIPS", "100"))

# what the check says that it does not see
UNSEEN = {
    "job": {"message", "needed_cpus", "needed_memory", "needed_gpus", "avoided", "early_losses"},
    "attempt": {"exit_code", "cpu_seconds", "peak_memory", "wall_seconds", "is_output_doomed"},
    "agent": {"name", "seen_at", "is_drained", "secret_sha256", "away_seconds"},
    "agent_history": {"name", "at", "kind", "agent_id"},
    "token": {"name", "user_id", "role", "created_at", "sha256"},
    "idempotency": {"key", "user_id", "content_sha256", "job_id", "created_at"},
    "setting": {"value"},
    "incarnation": {"name", "first_attempt"},
}
UNSEEN_TABLES = {"statistic", "sqlite_sequence"}


async def _fill(store: Store) -> None:
    await store.agents.record_connection("agent-1", "one")
    await store.agents.record_change("agent-1", "one", AgentChangeKind.DISCONNECTED)
    for number in range(6):
        key = f"key {number}"
        request = JobRequest(1, "example", f"job {number}", 1, 60, (("a", "b"),), key, cpus=2)
        job = await submit(store, request, os.urandom(3000))
        attempt_id = await run_job(store, job)
        piece = OutputPiece(Stream.STDOUT, 0, os.urandom(2000))
        await store.attempts.append_result(attempt_id, 0, [])
        archive = zipped(os.urandom(4000))
        state = JobState.FAILED if number % 2 else JobState.COMPLETED
        finished = report(attempt_id, archive, state)
        await store.attempts.finish("agent-1", finished, 0, [archive], NewOutput((piece,), 100_000))
    await make_job(store, user_id=2)
    await store.jobs.delete(2)
    await store._eraser._erase_all()


@pytest.fixture
async def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.db"
    async with opened(path) as store:
        await _fill(store)
        token = Token("web", Role.READ, None, time.time())
        create_token(str(path), token, "0" * 64)
    assert not path.with_name("whole.db-wal").exists()
    assert check(str(path), lambda done, total: None) == []
    return path


def _rows(path: Path) -> dict[tuple[str, str], list[object]]:
    """Return each column of each table that counts, in the order of the table."""
    values: dict[tuple[str, str], list[object]] = {}
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.text_factory = bytes
        tables = db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        for (table_name,) in tables:
            table = table_name.decode()
            if table in UNSEEN_TABLES:
                continue
            cursor = db.execute(f"SELECT * FROM {table}")
            columns = [column[0] for column in cursor.description]
            for row in cursor:
                for column, value in zip(columns, row, strict=True):
                    if column not in UNSEEN.get(table, ()):
                        values.setdefault((table, column), []).append(value)
    return values


async def test_each_flipped_bit_is_noticed_or_changes_nothing(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    expected = _rows(whole)
    chance = random.Random(SEED)
    noticed = 0
    for turn in range(FLIPS):
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        damaged = tmp_path / "damaged.db"
        changed = bytearray(content)
        changed[place] ^= bit
        damaged.write_bytes(changed)
        try:
            problems = check(str(damaged), lambda done, total: None)
        except StoreError as error:
            problems = [str(error)]
        noticed += bool(problems)
        if not problems:
            assert _rows(damaged) == expected, f"turn {turn}, byte {place}, bit {bit}"
        if turn % 5 == 0:
            await _use(damaged)
        for left in tmp_path.glob("damaged.db*"):
            left.unlink()
    assert noticed > FLIPS / 10


async def _use(path: Path) -> None:
    """Have a server's store use the file: what it can't do it says with an error of its own."""
    with contextlib.suppress(StoreError):
        async with opened(path) as store:
            for job_id in range(1, 8):
                for ask in (store.jobs.details, store.jobs.status, store.blobs.result_of_job):
                    with contextlib.suppress(StoreError):
                        await ask(job_id)
            with contextlib.suppress(StoreError):
                await store.retention.clean_some(-1)


async def test_bytes_that_are_not_what_was_stored_are_never_given_out(tmp_path: Path) -> None:
    path = tmp_path / "orchestrator.db"
    async with opened(path) as store:
        await store.agents.record_connection("agent-1", "one")
        job = await make_job(store, os.urandom(3 * CHUNK_BYTES))
        attempt_id = await run_job(store, job)
        piece = OutputPiece(Stream.STDOUT, 0, b"printed")
        archive = zipped(b"result")
        await store.attempts.finish(
            "agent-1", report(attempt_id, archive), 0, [archive], NewOutput((piece,), 1000)
        )
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("UPDATE chunk SET data = zeroblob(length(data))")
            db.execute("UPDATE output SET data = zeroblob(length(data))")
        (file,) = await store.blobs.input_of_job(job.id)
        result = store.blobs.result_of_job(job.id)
        for read in (
            store.blobs.read(file.blob_id, CHUNK_BYTES, 10),
            store.blobs.read_files((file,), 0),
            result,
            store.output.read(attempt_id, Stream.STDOUT, 0),
        ):
            with pytest.raises(StoreError, match="damaged"):
                await read
