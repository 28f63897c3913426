"""What is asked about jobs, of a real server: waiting, lists, details, histories."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import re
import sqlite3
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient

import config
from api import application as api
from dispatch import Dispatcher
from jobs import JobState
from records import JobFilter, JobSummary
from storage import queries as store_search
from tests.api.in_process import ApiServer
from tests.api.test_api import assert_error
from tests.harness import (
    POLL_SECONDS,
    AgentProcess,
    Server,
    curl,
    eventually,
    run,
    running_server,
)
from tests.storage.steps import make_job, opened


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
    assert (await asyncio.wait_for(client, 60))[0] == 0  # long before its 300 s are over
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
    # a client that loses patience is nobody's error
    assert (await run("curl", "-m", "0.3", f"{idle.url}/download/{job_id}?wait=9"))[0] == 28
    await eventually(lambda: "status=499" in idle.log(), "the server has seen it go")
    assert "level=ERROR" not in idle.log()
    waiting = asyncio.create_task(curl(f"{idle.url}/download/{job_id}?wait=300"))
    await asyncio.wait([waiting], timeout=10 * POLL_SECONDS)
    assert await idle.stop() == 0
    assert (await asyncio.wait_for(waiting, 60)).json()["status"] == "Queued"


async def test_a_client_that_goes_away_leaves_nothing_waiting(tmp_path: Path) -> None:
    async with opened(tmp_path / "orchestrator.db") as store:
        job = await make_job(store)
        settings = config.SettingsInForce(config.Settings())
        dispatcher = Dispatcher(store, settings)
        application = api.make_application(store, dispatcher, settings, frozenset())
        async with TestClient(ApiServer(application)) as client:
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


# --- lists ------------------------------------------------------------------------

STATES = [*JobState]
TAGS = ((), (("a", "1"),), (("a", "1"), ("b", "x:y")), (("b", "2"),))


async def _fill(path: Path, seed: int, count: int) -> list[JobSummary]:
    """Make a database of jobs of all kinds; returns them, newest first."""
    chance = random.Random(seed)
    now = time.time()
    async with opened(path) as store:
        await store.agents.record_connection("agent-1", "one")
        await store.agents.record_connection("agent-2", "two")
    jobs = []
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for job_id in range(1, count + 1):
            agent = chance.choice([None, "one", "two"])
            job = JobSummary(
                id=job_id,
                state=chance.choice(STATES),
                message=chance.choice(["", "Exit code 3", "100% of it_"]),
                user_id=chance.choice([-1, 1, 2]),
                service=chance.choice(["example", "fold"]),
                name="",
                priority=0,
                timeout=None,
                created_at=1e9 + job_id + chance.choice([0, 0, 0, 5]),
                changed_at=now,
                started_at=None,
                finished_at=None,
                outcome=None,
                cpus=None,
                memory=None,
                gpus=None,
                attempt_id=None if agent is None else job_id,
                agent=agent,
                tags=chance.choice(TAGS),
            )
            jobs.append(job)
            db.execute(
                "INSERT INTO job (id, state, message, user_id, service, created_at, changed_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job_id, job.state, job.message, job.user_id, job.service, job.created_at, now),
            )
            if agent is not None:
                agent_id = {"one": "agent-1", "two": "agent-2"}[agent]
                db.execute(
                    "INSERT INTO attempt (id, job_id, number, agent_id) VALUES (?1, ?1, 1, ?2)",
                    (job_id, agent_id),
                )
                db.execute("UPDATE job SET attempt_id = id WHERE id = ?", (job_id,))
            db.executemany("INSERT INTO tag VALUES (?, ?, ?)", [(job_id, *tag) for tag in job.tags])
    return jobs[::-1]


def _random_filter(chance: random.Random) -> JobFilter:
    return JobFilter(
        user_id=chance.choice([None, None, -1, 1, 9]),
        service=chance.choice([None, None, "fold", "none"]),
        states=frozenset(chance.sample(STATES, chance.choice([0, 0, 1, 2, 3]))),
        agent=chance.choice([None, None, None, "two"]),
        since=chance.choice([None, None, 1e9 + 50, 1e9 + 90.5]),
        text=chance.choice([None, None, "CODE", "%", "_"]),
        tags=chance.choice([(), (), *TAGS]),
    )


def _matches(job: JobSummary, wanted: JobFilter) -> bool:
    return (
        wanted.user_id in (None, job.user_id)
        and wanted.service in (None, job.service)
        and (not wanted.states or job.state in wanted.states)
        and wanted.agent in (None, job.agent)
        and (wanted.since is None or job.created_at >= wanted.since)
        and (wanted.text is None or wanted.text.lower() in job.message.lower())
        and set(wanted.tags) <= set(job.tags)
    )


async def test_pages_of_a_list_hold_every_job_that_is_asked_for_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so that a hundred jobs are more than one page may look at
    monkeypatch.setattr(store_search, "_EXAMINE_JOBS", 30)
    monkeypatch.setattr(store_search, "_EXAMINE_AT_ONCE", 7)
    jobs = await _fill(tmp_path / "orchestrator.db", seed=1, count=100)
    chance = random.Random(2)
    async with opened(tmp_path / "orchestrator.db") as store:
        for wanted in [
            *(JobFilter(states=frozenset({state})) for state in STATES),
            *(_random_filter(chance) for _ in range(150)),
        ]:
            found: list[JobSummary] = []
            before: int | None = None
            while before is None or before > 0:
                page = await store.jobs.find(wanted, before, limit=chance.choice([1, 5, 100]))
                found += page.jobs
                before = 0 if page.next_before is None else page.next_before
            assert found == [job for job in jobs if _matches(job, wanted)], wanted


async def test_no_list_reads_the_whole_table(tmp_path: Path) -> None:
    async with opened(tmp_path / "orchestrator.db"):
        pass
    place = {"before": 9, "floor": 0, "step": 9, "ids": "[1]", "limit": 1}
    with contextlib.closing(sqlite3.connect(tmp_path / "orchestrator.db")) as db:
        for wanted in [
            *(JobFilter(), JobFilter(user_id=1), JobFilter(service="x"), JobFilter(tags=TAGS[1])),
            *(JobFilter(states=frozenset({state})) for state in STATES),
        ]:
            parameters = {**store_search._parameters_of(wanted), **place}
            for sql in (store_search._candidates_for(wanted), store_search._MATCHING_JOBS):
                plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
                assert not [step for step in plan if re.match("SCAN (job|tag|attempt)", step)], plan
        sql = store_search._candidates_for(JobFilter(user_id=1))
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]
        assert plan == ["SEARCH job USING COVERING INDEX job_user (user_id=? AND id>? AND id<?)"]


async def test_lists_by_curl(tmp_path: Path) -> None:
    jobs = await _fill(tmp_path / "orchestrator.db", seed=3, count=40)
    async with running_server(tmp_path, "--no-agent") as server:
        url = f"{server.url}/jobs"

        async def ids(query: str) -> list[int]:
            answer = await curl(f"{url}?{query}")
            assert answer.status == 200, answer
            return [job["id"] for job in answer.json()["jobs"]]

        def expected(wanted: JobFilter) -> list[int]:
            return [job.id for job in jobs if _matches(job, wanted)]

        assert await ids("") == expected(JobFilter())
        assert await ids("user_id=-1&service=fold") == expected(JobFilter(-1, "fold"))
        some = JobFilter(states=frozenset({JobState.FAILED, JobState.KILLED, JobState.CLEANED}))
        assert await ids("status=Failed,Killed&status=Cleaned") == expected(some)
        tagged = JobFilter(tags=TAGS[2])
        assert await ids("tag=a:1&tag=b:x:y") == expected(tagged)
        recent = expected(JobFilter(since=1e9 + 20))
        times = ("1000000020", "2001-09-09T01:47:00Z", "2001-09-09T03:47:00+02:00")
        for text in times:
            assert await ids(f"since={text}") == recent
        first = (await curl(f"{url}?limit=15")).json()
        assert [job["id"] for job in first["jobs"]] == list(range(40, 25, -1))
        assert await ids(f"limit=1000&cursor={first['next_cursor']}") == list(range(25, 0, -1))
        assert (await curl(url)).json()["next_cursor"] is None
        bad = ["user_id=x", "status=Done", "since=soon", "since=2001-09-09T01:47:00", "tag=a"]
        bad += ["limit=0", "limit=1001", "limit=x", "cursor=x", "cursor=YmVmb3JlOg", "since=nan"]
        for query in bad:
            word = query.partition("=")[0]
            assert_error(await curl(f"{url}?{query}"), 400, f"^{word}")


# --- one job ----------------------------------------------------------------------


async def test_a_queued_job_says_why_it_waits(tmp_path: Path) -> None:
    limits = {
        "SERVICE_EXAMPLE_RUNS_PER_USER": "1",
        "SERVICE_EXAMPLE_MAX_RUNS": "2",
        "SERVICE_FOLD_MAX_RUNS": "9",
    }
    async with running_server(tmp_path / "server", "--no-agent", environment=limits) as server:

        async def queue_of(job_id: int) -> dict[str, Any]:
            queue = (await curl(f"{server.url}/jobs/{job_id}")).json()["queue"]
            assert isinstance(queue, dict)
            return queue

        first = await server.upload("exec sleep 60", user=1)
        second = await server.upload("true", user=1)
        assert await queue_of(first) == {"position": 1, "reason": "no agent is connected"}
        assert (await queue_of(second))["position"] == 2
        agent = AgentProcess(server, "one")
        await agent.start("--slots", "2", "--services", "example")
        await server.wait(first, "Running")
        assert await queue_of(second) == {"position": 1, "reason": "user limit 1 of 1"}
        third = await server.upload("true", user=3, service="fold")
        assert (await queue_of(third))["reason"] == "no agent offers this service"
        other = await server.upload("exec sleep 60", user=2)
        await server.wait(other, "Running")
        fourth = await server.upload("true", user=4)
        assert (await queue_of(fourth))["reason"] == "service limit 2 of 2"
        folder = AgentProcess(server, "two")
        await folder.start("--slots", "1", "--services", "fold")
        await server.wait(third, "Completed")
        await server.wait(await server.upload("exec sleep 60", user=3, service="fold"), "Running")
        fifth = await server.upload("true", user=3, service="fold")
        assert (await queue_of(fifth))["reason"] == "all slots busy"
        await curl("-X", "POST", f"{server.url}/agents/two/drain")
        reason = (await queue_of(fifth))["reason"]
        assert reason == "all agents that offer this service are drained"


async def test_all_about_a_job_and_its_history(server: Server) -> None:
    for path in ("", "/history"):
        for text in ("1", "abc", "-1", "9" * 30):
            assert_error(await curl(f"{server.url}/jobs/{text}{path}"), 404, f"no job {text}")
    job_id = await server.upload("exit 3", {"input.pdb": b"ATOM\n"}, user=7)
    await server.wait(job_id, "Failed")
    job = (await curl(f"{server.url}/jobs/{job_id}")).json()
    times = [job[f"{word}_at"] for word in ("created", "started", "finished")]
    assert times == sorted(times)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time) for time in times)
    assert job["changed_at"] == job["finished_at"]
    attempt = job["attempts"][0]
    assert job["dest_id"] == attempt["id"]
    assert (job["user_id"], job["service"], job["agent"]) == (7, "example", "local")
    assert (job["status"], "3" in job["message"], job["queue"]) == ("Failed", True, None)
    assert (attempt["number"], attempt["exit_code"], attempt["outcome"]) == (1, 3, "Failed")
    assert (attempt["agent"], attempt["message"]) == ("local", job["message"])
    assert [attempt["started_at"], attempt["ended_at"]] == times[1:]
    assert [(file["name"], file["size"]) for file in job["files"]] == [
        ("run.sh", 6),
        ("input.pdb", 5),
    ]
    assert job["files"][0]["sha256"] == hashlib.sha256(b"exit 3").hexdigest()
    # what a failed job left is there, too
    assert job["result"]["size"] > 0
    answer = (await curl(f"{server.url}/jobs/{job_id}/history")).json()
    states = [line["status"] for line in answer["history"]]
    assert states == ["Queued", "Processing", "Submitted", "Running", "Failed"]
    assert [line["previous"] for line in answer["history"]] == [None, *states[:-1]]
    assert [line["attempt"] for line in answer["history"]] == [0, 1, 1, 1, 1]
    assert (answer["id"], answer["history"][4]["at"]) == (job_id, job["finished_at"])
