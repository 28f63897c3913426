"""What is asked about jobs, of a real server: waiting, lists, details, histories."""

from __future__ import annotations

import asyncio
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

import api
import config
from dispatch import Dispatcher
from tests.harness import POLL_SECONDS, Server, curl, eventually, run, running_server
from tests.test_api import assert_error
from tests.test_store import make_job, opened


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent: what is uploaded stays queued."""
    async with running_server(tmp_path / "server", "--no-agent") as server:
        yield server


# --- waiting ----------------------------------------------------------------------


async def test_one_curl_is_a_whole_client(server: Server, tmp_path: Path) -> None:
    job_id = await server.upload("until [ -e ../../../go ]; do sleep 0.05; done; echo done > out")
    command = ("curl", "-sS", "-o", "results.zip", f"{server.url}/download/{job_id}?wait=300")
    client = asyncio.create_task(run(*command, cwd=tmp_path))
    await server.wait(job_id, "Running")
    assert not client.done()
    (server.directory / "orchestrator.db.agent" / "go").touch()
    await server.wait(job_id, "Completed")
    ended = time.monotonic()
    assert (await client)[0] == 0
    assert time.monotonic() - ended < 1
    assert zipfile.ZipFile(tmp_path / "results.zip").read("out") == b"done\n"
    # what has ended is not waited for
    assert (await curl(f"{server.url}/download/{job_id}?wait=300")).body.startswith(b"PK")


async def test_a_wait_ends_in_time_and_with_the_server(idle: Server) -> None:
    for text in ("300.01", "-1", "abc", "", "nan", "1e2", "301"):
        assert_error(await curl(f"{idle.url}/download/1?wait={text}"), 400, "^wait")
    assert_error(await curl(f"{idle.url}/download/1?wait=300"), 404, "no job 1")
    job_id = await idle.upload("true")
    started = time.monotonic()
    answer = await curl(f"{idle.url}/download/{job_id}?wait=0.4")
    assert time.monotonic() - started >= 0.4
    assert answer.json()["status"] == "Queued"
    waiting = asyncio.create_task(curl(f"{idle.url}/download/{job_id}?wait=300"))
    killed = asyncio.create_task(curl(f"{idle.url}/download/{job_id}?wait=300"))
    await curl("-X", "POST", f"{idle.url}/terminate/{job_id}")
    assert (await killed).json()["status"] == "Killed"
    assert (await waiting).json()["status"] == "Killed"
    job_id = await idle.upload("true")
    waiting = asyncio.create_task(curl(f"{idle.url}/download/{job_id}?wait=300"))
    await asyncio.wait([waiting], timeout=10 * POLL_SECONDS)
    started = time.monotonic()
    assert await idle.stop() == 0
    assert (await waiting).json()["status"] == "Queued"
    assert time.monotonic() - started < 2


async def test_a_client_that_goes_away_leaves_nothing_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path / "orchestrator.db") as store:
        job = await make_job(store)
        settings = config.SettingsInForce(config.Settings())
        dispatcher = Dispatcher(store, settings)
        application = api.make_application(store, dispatcher, settings, "t" * 20)
        async with TestClient(TestServer(application)) as client:
            url = client.make_url(f"/download/{job.id}?wait=300")
            async with aiohttp.ClientSession() as session:
                request = asyncio.create_task(session.get(url))
                await eventually(lambda: bool(store.feed._of_jobs), "the request waits")
                request.cancel()
                await eventually(lambda: not store.feed._of_jobs, "the wait has ended")
            # the connection of another request is as good as before
            for _ in range(2):
                answer = await client.get(f"/download/{job.id}?wait=0.05")
                assert (answer.status, (await answer.json())["status"]) == (200, "Queued")
