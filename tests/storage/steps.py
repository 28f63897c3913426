"""The steps of a job's life, taken in a store on a real file."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

from jobs import Demand, JobState, Step
from records import Assignment, JobIdentity, JobRequest, KnownAgent
from storage.uploads import Upload
from store import Store
from wire.messages import Finished

NO_LIMIT = 1_000_000
TO_AGENT = {Demand(): KnownAgent("agent-1", "one")}
_PIECE_BYTES = 2**18


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Store]:
    """A store that runs, as in the server."""
    store = await Store.open(str(path))
    running = asyncio.create_task(store.run())
    try:
        yield store
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await store.close()


async def filled(store: Store, content: bytes) -> Upload:
    """Return an upload whose only file is a ``run.sh`` with that content."""
    upload = store.uploads.new()
    upload.start_file("run.sh")
    for start in range(0, len(content), _PIECE_BYTES):
        await upload.write(content[start : start + _PIECE_BYTES])
    await upload.finish_file()
    return upload


async def submit(store: Store, request: JobRequest, content: bytes = b"echo") -> JobIdentity:
    upload = await filled(store, content)
    return (await upload.commit(request, "uploaded", NO_LIMIT)).job


async def make_job(store: Store, content: bytes = b"echo", user_id: int = 1) -> JobIdentity:
    return await submit(store, JobRequest(user_id, "example"), content)


async def begin(store: Store, job: JobIdentity) -> Assignment:
    """Give a job, which must be the first of its queue, to an agent."""
    assignment = await store.attempts.begin_next(job.queue, TO_AGENT)
    assert assignment is not None
    assert assignment.job == job
    return assignment


async def run_job(store: Store, job: JobIdentity) -> int:
    """Bring a job to Running; returns the attempt's id."""
    assignment = await begin(store, job)
    await store.attempts.advance(assignment.attempt_id, [step(JobState.SUBMITTED)])
    await store.attempts.advance(assignment.attempt_id, [step(JobState.RUNNING)])
    return assignment.attempt_id


def step(state: JobState) -> Step:
    """Return what an agent says of an attempt that comes to a state now."""
    return Step(state, "test", time.time())


def zipped(content: bytes) -> bytes:
    """Return the smallest archive that begins with ``content`` and has no members."""
    return content + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0, 0, 0, len(content), 0)


def report(attempt_id: int, result: bytes, state: JobState = JobState.COMPLETED) -> Finished:
    digest = hashlib.sha256(result).hexdigest()
    return Finished(attempt_id, state, 0, "", len(result), digest)


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(sql).fetchall()


async def eventually_no_chunks(path: Path) -> None:
    deadline = time.monotonic() + 10
    while rows(path, "SELECT count(*) FROM chunk") != [(0,)]:
        assert time.monotonic() < deadline, rows(path, "SELECT id, state FROM blob")
        await asyncio.sleep(0.01)
