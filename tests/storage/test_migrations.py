"""Files of every version of the schema that ever landed are opened, whole.

``schemas/`` has the dump of a database of each: made by the server of that version, which was
killed while its third job ran and its fourth was queued; ``sqlite3 FILE .dump`` and both pragmas
before it. The newest needs none: other tests make it.
"""

from __future__ import annotations

import contextlib
import io
import sqlite3
import zipfile
from pathlib import Path

import pytest

from jobs import JobState
from records import KnownAgent
from storage import schema
from storage.check import check
from tests.storage.steps import make_job, opened

SCHEMAS = {path.stem: path for path in (Path(__file__).parent / "schemas").glob("*.sql")}


def version_of(path: Path) -> int:
    return int(path.read_text().split("user_version = ", 1)[1].split(";", 1)[0])


def test_there_is_a_file_of_every_version() -> None:
    versions = {version_of(path) for path in SCHEMAS.values()}
    assert versions >= set(range(1, len(schema.MIGRATIONS)))


@pytest.mark.parametrize("name", sorted(SCHEMAS))
async def test_a_file_of_every_version_is_opened_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / "orchestrator.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMAS[name].read_text())
    assert check(str(path), lambda done, total: None) == [], "the check knows older versions"
    async with opened(path) as store:
        states = [await store.jobs.status(job_id) for job_id in range(1, 6)]
        assert [status.state if status else None for status in states] == [
            *(JobState.COMPLETED, JobState.FAILED, JobState.RUNNING, JobState.QUEUED),
            None,
        ]
        details = await store.jobs.details(2)
        assert details is not None
        assert (details.summary.outcome, details.attempts[0].exit_code) == (JobState.FAILED, 3)
        result = await store.blobs.result_of_job(1)
        assert result is not None
        content = b"".join(await store.blobs.read(result.blob_id, 0, result.size))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.read("copy") == b"some data\n"
        (((queue, demand), waiting),) = (await store.jobs.queue_lengths()).items()
        assert (queue.service, queue.user_id, waiting) == ("example", 7, 1)
        (active,) = await store.attempts.active()
        assert (active.job.id, active.state) == (3, JobState.RUNNING)
        agent = KnownAgent(active.agent_id, active.agent_name)
        assignment = await store.attempts.begin_next(queue, {demand: agent})
        assert assignment is not None
        assert assignment.content in {b"some data\ntrue", b"truesome data\n"}
        assert await store.retention.clean_some(-1) == 2
    assert check(str(path), lambda done, total: None) == []


async def test_what_a_trigger_of_version_5_counted_is_not_counted_twice(tmp_path: Path) -> None:
    path = tmp_path / "orchestrator.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(SCHEMAS["version_5"].read_text())
        submitted = "SELECT sum(submitted) FROM statistic"
        ((before,),) = db.execute(submitted).fetchall()
    async with opened(path) as store:
        await make_job(store)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute(submitted).fetchall() == [(before + 1,)]
