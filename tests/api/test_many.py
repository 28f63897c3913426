"""Deleting, counting, and what is done to many jobs at once, of a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from storage.check import check
from tests.api.test_api import assert_error
from tests.api.test_tokens import new_token, until_status
from tests.harness import AgentProcess, Answer, Server, curl, eventually, running_server


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent: what is uploaded stays queued."""
    async with running_server(tmp_path / "server", "--no-agent") as server:
        yield server


async def post(server: Server, path: str, *arguments: str) -> Answer:
    return await curl("-X", "POST", *arguments, server.url + path)


async def counts(server: Server, query: str = "", *arguments: str) -> dict[str, int]:
    """Return the states that there are jobs of, with how many."""
    answer = await curl(*arguments, f"{server.url}/jobs/counts?{query}")
    assert answer.status == 200, answer
    body = answer.json()
    assert body["total"] == sum(body["states"].values())
    assert len(body["states"]) == 9
    return {state: number for state, number in body["states"].items() if number}


def stored_chunks(server: Server) -> int:
    return int(server.query("SELECT count(*) FROM chunk")[0][0])


async def test_deleting_a_job_frees_its_bytes_and_keeps_what_is_known_of_it(
    server: Server,
) -> None:
    running = await server.upload("echo begun; sleep 1000")
    done = await server.upload("echo out; head -c 1000000 /dev/urandom > noise; exit 3")
    await server.wait(done, "Failed")
    await server.wait(running, "Running")
    refused = await curl("-X", "DELETE", f"{server.url}/jobs/{running}")
    assert_error(refused, 409, "has not ended")
    assert refused.json()["id"] == running
    assert_error(await curl("-X", "DELETE", f"{server.url}/jobs/99"), 404, "no job 99")
    assert (await curl("-X", "POST", f"{server.url}/terminate/{running}")).status == 200
    for job_id in (done, running, done):
        answer = await curl("-X", "DELETE", f"{server.url}/jobs/{job_id}")
        assert (answer.status, answer.json()["status"]) == (200, "Cleaned")
    assert "exit code 3; files deleted" in (await server.status(done))["message"]
    await eventually(lambda: stored_chunks(server) == 0, "all bytes are erased")
    details = (await curl(f"{server.url}/jobs/{done}")).json()
    assert (details["status"], details["outcome"], details["result"]) == ("Cleaned", "Failed", None)
    assert_error(await curl(f"{server.url}/jobs/{done}/logs"), 409, "removed|deleted")
    assert_error(await post(server, f"/jobs/{done}/rerun"), 409, "no longer stored")
    assert server.transitions(done)[-2:] == ["Failed", "Cleaned"]
    assert check(str(server.database), lambda done, total: None) == []


async def test_many_jobs_are_ended_run_again_and_deleted_by_filters(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    server = bare_server
    await new_agent("one").start("--slots", "2")
    running = [await server.upload("sleep 1000") for _ in range(2)]
    for job_id in running:
        await server.wait(job_id, "Running")
    queued = [await server.upload("true") for _ in range(3)]
    other = await server.upload("true", user=2)
    assert await counts(server) == {"Running": 2, "Queued": 4}
    assert await counts(server, "user_id=1&status=Queued,Failed") == {"Queued": 3}
    assert await counts(server, f"id={other}&id=99&id={running[0]}") == {"Running": 1, "Queued": 1}
    for path in ("terminate", "rerun", "delete"):
        assert_error(await post(server, f"/jobs/{path}"), 400, "a filter is needed")
        assert_error(await post(server, f"/jobs/{path}?user=1"), 400, "'user': .*no such parameter")
        assert_error(await post(server, f"/jobs/{path}?id=x"), 400, "^id: ")
    answer = await post(server, "/jobs/terminate?user_id=1")
    assert answer.json() == {"matched": 5, "done": 5, "skipped": 0}
    assert await counts(server, "user_id=1") == {"Killed": 5}
    answer = await post(server, "/jobs/terminate?user_id=1")
    assert answer.json() == {"matched": 5, "done": 0, "skipped": 5}
    await server.result(other)
    answer = await post(server, f"/jobs/rerun?id={other}&id={queued[0]}")
    assert (answer.json()["matched"], answer.json()["done"]) == (2, 2)
    for job_id in answer.json()["jobs"]:
        await server.result(job_id)
    answer = await post(server, "/jobs/delete?since=0")
    assert answer.json() == {"matched": 8, "done": 8, "skipped": 0}
    assert await counts(server) == {"Cleaned": 8}
    answer = await post(server, "/jobs/rerun?since=0")
    assert answer.json() == {"matched": 8, "done": 0, "skipped": 8, "jobs": []}
    assert check(str(server.database), lambda done, total: None) == []


async def test_more_jobs_than_a_transaction_takes_are_done_while_others_are_served(
    idle: Server,
) -> None:
    await idle.upload("true")
    made = 1
    while made < 800:
        answer = await post(idle, "/jobs/rerun?user_id=1")
        assert answer.json()["done"] == made
        made *= 2
    ending = asyncio.create_task(post(idle, "/jobs/terminate?status=Queued"))
    uploaded: list[int] = []
    while not ending.done():
        uploaded.append(await idle.upload("true", user=2))
    done = ending.result().json()["done"]
    # those that came while it was done may have been met or not
    assert made <= done <= made + len(uploaded)
    assert (await counts(idle))["Killed"] == done


async def test_a_list_takes_a_thousand_ids(idle: Server) -> None:
    job_id = await idle.upload("true")
    large = "&".join(f"id={number}" for number in range(2**40, 2**40 + 999))
    answer = await curl(f"{idle.url}/jobs?id={job_id}&{large}")
    assert [job["id"] for job in answer.json()["jobs"]] == [job_id]
    assert_error(await curl(f"{idle.url}/jobs?id=1&id=2&{large}"), 400, "more than 1000")


async def test_a_token_reaches_its_own_jobs_and_a_reader_does_nothing(server: Server) -> None:
    jobs = {user: await server.upload("true", user=user) for user in (7, 8)}
    for job_id in jobs.values():
        await server.wait(job_id)
    bound = await new_token(server, "bound", "7", "submit")
    reader = await new_token(server, "reader", "any", "read")
    await until_status(401, f"{server.url}/jobs")
    assert await counts(server, "", *bound) == {"Completed": 1}
    assert await counts(server, "", *reader) == {"Completed": 2}
    refused: list[Any] = [await curl(*reader, "-X", "DELETE", f"{server.url}/jobs/{jobs[7]}")]
    for path in ("terminate", "rerun", "delete"):
        refused.append(await post(server, f"/jobs/{path}?since=0", *reader))
        # a filter is asked for also where the token is one already
        assert_error(await post(server, f"/jobs/{path}", *bound), 400, "a filter is needed")
        assert_error(await post(server, f"/jobs/{path}?user_id=8", *bound), 403, "not for user 8")
    for answer in refused:
        assert_error(answer, 403, "submit is needed")
    assert (await post(server, "/jobs/rerun?since=0", *bound)).json()["matched"] == 1
    assert_error(await curl(*bound, "-X", "DELETE", f"{server.url}/jobs/{jobs[8]}"), 404, "no job")
    ids = f"id={jobs[7]}&id={jobs[8]}"
    answer = await post(server, f"/jobs/delete?{ids}", *bound)
    assert answer.json() == {"matched": 1, "done": 1, "skipped": 0}
    assert await counts(server, f"id={jobs[8]}", *reader) == {"Completed": 1}
