"""The server killed at chosen points: within a transaction, and between commit and answer."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sqlite3
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from storage import database, schema
from store import Store
from tests.faults.sabotage import through
from tests.harness import POLL_SECONDS, AgentProcess, Server, eventually, lines, running_server

NewAgent = Callable[[str], AgentProcess]

AFTER, COMMITTED = "after", "committed"

POINTS = {
    "an upload, before its commit": (r"INSERT INTO job\b", AFTER, 2),
    "an upload, between commit and answer": (r"INSERT INTO job\b", COMMITTED, 2),
    "bytes of an upload": (r"INSERT INTO chunk\b", COMMITTED, 2),
    "dispatching, before the agent is told": (r"INSERT INTO attempt\b", COMMITTED, 2),
    "bytes of a result, before they are acknowledged": (r"UPDATE blob SET size\b", COMMITTED, 2),
    "the end of a job": (r"UPDATE blob SET state = 'sealed'", AFTER, 1),
    "the end of a job, before the agent is told": (
        *(r"UPDATE blob SET state = 'sealed'", COMMITTED, 1),
    ),
}

RETENTION_POINTS = {
    "cleaning": (r"UPDATE attempt SET result_blob = NULL", COMMITTED, 1),
    "erasing": (r"DELETE FROM chunk\b", COMMITTED, 2),
    "giving pages back": (r"incremental_vacuum", AFTER, 1),
    "carrying the WAL into the file": (r"wal_checkpoint", AFTER, 2),
}
"""Points that are killed within a transaction as well are SQLite's own promise; one is enough."""


@contextlib.contextmanager
def noted(what: str) -> Iterator[None]:
    """Say in a failure where it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"at: {what}")
        raise


def killed_at(point: tuple[str, str, int]) -> tuple[str, ...]:
    statement, moment, count = point
    return through({"kill": {"statement": statement, "moment": moment, "count": count}})


@dataclass
class Client:
    """Submits jobs with input and output of some chunks, and remembers what was acknowledged."""

    server: Server
    witness: Path
    accepted: dict[int, bytes] = field(default_factory=dict)

    async def upload(self, count: int) -> None:
        """Submit jobs until so many were acknowledged, or the server has ended."""
        wanted = len(self.accepted) + count
        while len(self.accepted) < wanted and not self.server.has_ended():
            # the attempt of a little one is made in the transaction of the upload
            await asyncio.gather(self._upload(400_000), self._upload(1000))
            await asyncio.sleep(POLL_SECONDS)

    async def _upload(self, size: int) -> None:
        content = os.urandom(size)
        form = aiohttp.FormData()
        script = f"echo $ORCHESTRATOR_JOB_ID >> {self.witness}\ncat data data data > thrice\n"
        form.add_field("file", script, filename="run.sh")
        form.add_field("file", content, filename="data")
        form.add_field("user_id", "1")
        form.add_field("service", "example")
        with contextlib.suppress(aiohttp.ClientError):  # killed before it has answered
            async with (
                aiohttp.ClientSession(self.server.url) as session,
                session.post("/upload", data=form) as response,
            ):
                assert response.status == 201
                self.accepted[(await response.json())["id"]] = content

    async def check(self) -> None:
        """Every job that was acknowledged is complete, started once, with the right bytes."""
        await eventually(lambda: self.server.query(_UNFINISHED) == [(0,)], "all complete")
        async with aiohttp.ClientSession(self.server.url) as session:
            for job_id, content in self.accepted.items():
                async with session.get(f"/download/{job_id}") as response:
                    archive = zipfile.ZipFile(io.BytesIO(await response.read()))
                assert archive.read("thrice") == content * 3
        starts = Counter(lines(self.witness))
        assert set(starts.values()) == {1}, starts
        assert starts.keys() >= {str(job_id) for job_id in self.accepted}


_UNFINISHED = "SELECT count(*) FROM job WHERE state NOT IN ('Completed', 'Cleaned')"
_UNSEALED = "SELECT count(*) FROM blob WHERE state != 'sealed'"


async def test_a_server_killed_at_any_point_of_a_jobs_way_and_of_retention_loses_nothing(
    tmp_path: Path,
) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        client = Client(server, tmp_path / "witness")
        agent = AgentProcess(server, "steady")
        await agent.start("--slots", "2")
        await server.stop()
        for name, point in POINTS.items():
            server.through = killed_at(point)
            await server.launch("--no-agent")
            await client.upload(3)
            with noted(name):
                assert await server.wait_ended(60) == -signal.SIGKILL
        server.through = ()
        await server.start("--no-agent")
        await client.check()
        await eventually(lambda: server.query(_UNSEALED) == [(0,)], "no other bytes are left")
        await server.check()
        await server.stop()
        await agent.kill()
        server.environment["MAX_AGE"] = "1"
        for name, point in RETENTION_POINTS.items():
            server.through = killed_at(point)
            await server.launch("--no-agent")
            with noted(name):
                assert await server.wait_ended(60) == -signal.SIGKILL
        server.through = ()
        await server.start("--no-agent")
        cleaned = "SELECT count(*) FROM job WHERE state != 'Cleaned'"
        await eventually(lambda: server.query(cleaned) == [(0,)], "all are cleaned")
        await eventually(
            lambda: server.query("SELECT count(*) FROM blob") == [(0,)], "all bytes are erased"
        )
        await server.check()


# --- migrations -------------------------------------------------------------------


def _make_database(path: Path, version: int) -> None:
    """Make a file as the Orchestrator of that version did, with a job in it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        if version == 0:
            return
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        for statements in schema.MIGRATIONS[:version]:
            for statement in statements:
                db.execute(statement)
        db.execute(f"PRAGMA user_version = {version}")
        db.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
        db.execute(
            "INSERT INTO job (user_id, service, state, message, created_at, changed_at)"
            " VALUES (7, 'example', 'Queued', 'kept', 1, 1)"
        )


def _open_in_a_child(path: Path, kill_after: int) -> int:
    """Open the store in a process that is killed after so many statements of the migration.

    Returns the process's exit code, negative for a signal.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _count_and_kill(kill_after)
            asyncio.run(_open_and_close(path))
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _count_and_kill(kill_after: int) -> None:
    steps = {statement for statements in schema.MIGRATIONS for statement in statements}
    left = kill_after

    def traced(statement: str) -> None:
        nonlocal left
        left -= statement in steps or statement == "COMMIT"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    class Traced(database.Database):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.set_trace_callback(traced)

    database.Database = Traced  # type: ignore[misc]


async def _open_and_close(path: Path) -> None:
    await (await Store.open(str(path))).close()


@pytest.mark.parametrize("version", range(len(schema.MIGRATIONS)))
def test_a_server_killed_at_any_statement_of_a_migration_opens_the_file_whole(
    tmp_path: Path, version: int
) -> None:
    statements = sum(map(len, schema.MIGRATIONS[version:]))
    for kill_after in range(1, statements + 2):
        path = tmp_path / f"killed-after-{kill_after}.db"
        _make_database(path, version)
        # the statement that is counted last, the commit, is killed before it is carried out
        assert _open_in_a_child(path, kill_after) == -signal.SIGKILL
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (version,)
        assert _open_in_a_child(path, -1) == 0
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            jobs = db.execute("SELECT user_id, message FROM job").fetchall()
            assert jobs == ([(7, "kept")] if version else [])
