"""Submitting well: fields, idempotency keys, running again, and the limits on all of it."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from storage.check import check
from tests.harness import AgentProcess, Answer, Server, curl, eventually, running_server


@asynccontextmanager
async def idle_server(path: Path, **settings: str) -> AsyncIterator[Server]:
    """A server without an agent: what is uploaded stays queued."""
    async with running_server(path / "server", "--no-agent", environment=settings) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.sh").write_text("cat input.txt > output.txt\n")
    (tmp_path / "input.txt").write_text("data\n")
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    return tmp_path


async def submit(server: Server, folder: Path, *arguments: str, user: int = 1) -> Answer:
    """Upload run.sh and input.txt with what else is given."""
    return await curl(
        *("-F", "file=@run.sh", "-F", "file=@input.txt"),
        *("-F", f"user_id={user}", "-F", "service=example", *arguments, f"{server.url}/upload"),
        cwd=folder,
    )


def assert_error(answer: Answer, status: int, words: str) -> None:
    assert answer.status == status, answer
    body = answer.json()
    assert set(body) == {"id", "status", "message"}
    assert body["status"] == "Unknown"
    assert re.search(words, body["message"]), body


def jobs(server: Server) -> int:
    return int(server.query("SELECT count(*) FROM job")[0][0])


# --- fields -----------------------------------------------------------------------

REFUSED = {
    "name=" + "x" * 201: "^name: is longer",
    "name=two\nlines": "^name: .*control",
    "priority=101": "^priority: must be from -100 to 100",
    "priority=-101": "^priority",
    "priority=high": "^priority: must be an integer",
    "timeout=0": "^timeout: must be from 1 to 60",
    "timeout=61": "^timeout: must be from 1 to 60",
    "timeout=1.5": "^timeout: must be an integer",
    "cpus=0": "^cpus: must be a whole number from 1",
    "cpus=3": "^cpus: 3 is more than 2",
    "memory=lots": "^memory: must be a number of bytes",
    "memory=2G": "^memory: 2 GB is more than 1 GB",
    "gpus=-1": "^gpus: must be a whole number",
    "gpus=1": "^gpus: 1 is more than 0",
    "tag=no colon": "^tag: must be key:value",
    "tag=sp ace:value": "^tag: must be key:value",
    "tag=" + "k" * 65 + ":v": "^tag: must be key:value",
    "tag=key:" + "v" * 257: "^tag: is longer",
}


async def test_fields_are_kept_and_those_out_of_range_refused(tmp_path: Path, folder: Path) -> None:
    limits = {
        "SERVICE_EXAMPLE_TIMEOUT": "60",
        "SERVICE_EXAMPLE_MEMORY": "512M",
        "SERVICE_EXAMPLE_MAX_CPUS": "2",
        "SERVICE_EXAMPLE_MAX_MEMORY": "1G",
    }
    async with idle_server(tmp_path, **limits) as server:
        for field, words in REFUSED.items():
            assert_error(await submit(server, folder, "-F", field), 400, words)
        twice = ("-F", "tag=a:1", "-F", "tag=a:2")
        assert_error(await submit(server, folder, *twice), 400, "^tag: a is given more than once")
        many = [word for number in range(33) for word in ("-F", f"tag=t{number}:")]
        assert_error(await submit(server, folder, *many), 400, "^tag: there are more than 32")
        assert_error(
            await submit(server, folder, "-F", "proirity=1"), 400, "^'proirity': .*no such"
        )
        assert jobs(server) == 0
        fields = ["name=" + "é" * 200, "priority=-100", "timeout=60", "tag=url:http://x:1"]
        fields += [f"tag=t{number}:{'→' * 256}" for number in range(31)]
        arguments = [word for field in fields for word in ("-F", field)]
        assert (await submit(server, folder, *arguments)).status == 201
        assert server.query("SELECT name, priority, timeout FROM job") == [("é" * 200, -100, 60)]
        assert server.query("SELECT count(*) FROM tag") == [(32,)]
        assert server.query("SELECT value FROM tag WHERE key = 'url'") == [("http://x:1",)]
        resources = (await curl(f"{server.url}/jobs/1")).json()["resources"]
        assert resources == {"cpus": 1, "memory": 2**29, "gpus": 0}
        asked = ("-F", "cpus=2", "-F", "memory=1G", "-F", "gpus=0")
        job_id = (await submit(server, folder, *asked)).json()["id"]
        again = (await curl("-X", "POST", f"{server.url}/jobs/{job_id}/rerun")).json()["id"]
        for job in (job_id, again):
            resources = (await curl(f"{server.url}/jobs/{job}")).json()["resources"]
            assert resources == {"cpus": 2, "memory": 2**30, "gpus": 0}
        (service,) = (await curl(f"{server.url}/services")).json()["services"]
        assert service["max_resources"] == {"cpus": 2, "memory": 2**30, "gpus": 0}


async def test_a_user_s_own_jobs_run_by_priority_and_end_at_their_own_time_limit(
    bare_server: Server, folder: Path, new_agent: Callable[[str], AgentProcess]
) -> None:
    server = bare_server
    for priority in ("-5", "0", "7"):
        assert (await submit(server, folder, "-F", f"priority={priority}")).status == 201
    (folder / "run.sh").write_text("sleep 600\n")
    slow = (await submit(server, folder, "-F", "timeout=1")).json()["id"]
    await new_agent("one").start("--slots", "1")
    status = await server.wait(slow, "Failed")
    assert status["message"] == "timed out after 1 s"
    for job_id in (1, 2, 3):
        await server.wait(job_id, "Completed")
    rows = server.query("SELECT job_id FROM history WHERE to_state = 'Running' ORDER BY id")
    assert rows == [(3,), (2,), (slow,), (1,)]


# --- idempotency keys -------------------------------------------------------------


async def test_a_repeated_request_gets_the_same_answer_and_makes_no_second_job(
    tmp_path: Path, folder: Path
) -> None:
    key = ("-H", "Idempotency-Key: run 7")
    large = ("-F", "file=@large", "-F", "tag=b:2", "-F", "tag=a:1")
    other_order = ("-F", "tag=a:1", "-F", "tag=b:2", "-F", "file=@large")
    async with idle_server(tmp_path) as server:
        first = await submit(server, folder, *key, *large)
        assert first.json() == {
            "id": 1,
            "status": "Queued",
            "message": "Job successfully uploaded",
        }
        chunks = server.query("SELECT count(*) FROM chunk")
        assert await submit(server, folder, *key, *other_order) == first
        await eventually(
            lambda: server.query("SELECT count(*) FROM chunk") == chunks, "its bytes are erased"
        )
        for other in (("-F", "tag=b:3"), ("-F", "name=other"), ("-F", "file=@large;filename=x")):
            assert_error(await submit(server, folder, *key, *other), 409, "^Idempotency-Key")
        assert (await submit(server, folder, *key, *large, user=2)).json()["id"] == 2
        for bad in ("", "x" * 256, "\N{SOFT HYPHEN}"):
            header = f"Idempotency-Key: {bad}" if bad else "Idempotency-Key;"
            answer = await submit(server, folder, "-H", header)
            assert_error(answer, 400, "^Idempotency-Key: must be 1 to 255")
        assert jobs(server) == 2
        with closing(sqlite3.connect(server.database)) as db, db:
            db.execute("UPDATE idempotency SET created_at = created_at - 86401")
        assert (await submit(server, folder, *key, *large)).json()["id"] == 3
        await server.stop()
        await server.start("--no-agent")
        # the one of user 2 is too old, that of job 3 is new
        await eventually(
            lambda: server.query("SELECT job_id FROM idempotency") == [(3,)], "it is forgotten"
        )
        assert (await submit(server, folder, *key, *large)).json()["id"] == 3


async def test_uploads_of_one_key_at_the_same_moment_make_one_job(
    tmp_path: Path, folder: Path
) -> None:
    key = ("-H", "Idempotency-Key: \N{GREEK SMALL LETTER PI}/1")
    async with idle_server(tmp_path) as server:
        same = (submit(server, folder, *key) for _ in range(8))
        other = (submit(server, folder, *key, "-F", f"name={number}") for number in range(4))
        answers = await asyncio.gather(*same, *other)
        made = [answer.json() for answer in answers if answer.status == 201]
        refused = [answer for answer in answers if answer.status == 409]
        assert len(made) + len(refused) == 12
        assert made
        assert {answer["id"] for answer in made} == {1}
        assert jobs(server) == 1


async def test_a_request_repeated_after_a_crash_makes_one_job(tmp_path: Path, folder: Path) -> None:
    async with idle_server(tmp_path) as server:
        for attempt, delay in enumerate((0.02, 0.05, 0.1), start=1):
            key = ("-H", f"Idempotency-Key: {attempt}", "-F", "file=@large")
            before = jobs(server)
            upload = asyncio.create_task(submit(server, folder, *key))
            # killed at some moment of the upload, before or after its commit
            await asyncio.sleep(delay)
            await server.kill()
            await asyncio.gather(upload, return_exceptions=True)
            await server.start("--no-agent")
            answer = await submit(server, folder, *key)
            assert answer.status == 201
            assert await submit(server, folder, *key) == answer
            assert jobs(server) == before + 1


# --- running again ----------------------------------------------------------------


async def rerun(server: Server, job_id: int | str, *arguments: str) -> Answer:
    return await curl("-X", "POST", *arguments, f"{server.url}/jobs/{job_id}/rerun")


async def test_a_job_runs_again_from_its_stored_input_until_that_is_removed(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "first.toml").write_text("[services.other]\nmax_runs = 1\n")
    (tmp_path / "second.toml").write_text("MAX_AGE = 1\n")
    async with running_server(
        tmp_path / "server", "--config", str(tmp_path / "first.toml")
    ) as server:
        fields = ("-F", "name=n", "-F", "priority=3", "-F", "timeout=50", "-F", "tag=a:1")
        assert (await submit(server, folder, *fields)).json()["id"] == 1
        assert (await server.result(1)).read("output.txt") == b"data\n"
        answer = await rerun(server, 1, "-H", "Idempotency-Key: again")
        assert answer.status == 201
        assert answer.json() == {
            "id": 2,
            "status": "Queued",
            "message": "Job 1 successfully submitted again",
        }
        assert await rerun(server, 1, "-H", "Idempotency-Key: again") == answer
        assert (await server.result(2)).read("output.txt") == b"data\n"
        first, second = server.query(
            "SELECT user_id, service, name, priority, timeout FROM job ORDER BY id"
        )
        assert first == second == (1, "example", "n", 3, 50)
        assert server.query("SELECT job_id, key, value FROM tag") == [
            (1, "a", "1"),
            (2, "a", "1"),
        ]
        # no copy: both refer to the same two blobs
        assert server.query("SELECT count(DISTINCT blob_id), count(*) FROM input_file") == [(2, 4)]
        assert check(str(server.database), lambda done, total: None) == []
        assert_error(await rerun(server, 3), 404, "no job 3")
        assert_error(await rerun(server, "x"), 404, "no job x")
        other = ("-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=other")
        await curl(*other, f"{server.url}/upload", cwd=folder)
        await server.wait(3)
        await server.stop()
        await server.start("--no-agent", "--config", str(tmp_path / "second.toml"))
        assert_error(await rerun(server, 3), 400, "^service: unknown service 'other'")
        await eventually(
            lambda: server.query("SELECT state FROM job WHERE id = 2") == [("Cleaned",)],
            "retention reaches it",
        )
        assert_error(await rerun(server, 2), 409, "input of job 2 is no longer stored")
        assert jobs(server) == 3


# --- limits -----------------------------------------------------------------------


async def test_a_user_with_a_full_line_is_told_when_to_come_back(
    tmp_path: Path, folder: Path
) -> None:
    key = ("-H", "Idempotency-Key: k")
    async with idle_server(tmp_path, MAX_QUEUED_JOBS="2", MAX_FILES="2") as server:
        first = await submit(server, folder, *key)
        answers = await asyncio.gather(*(submit(server, folder) for _ in range(4)))
        assert sorted(answer.status for answer in answers) == [201, 429, 429, 429]
        refused = await submit(server, folder, "-i")
        assert b"\r\nretry-after: 30\r\n" in refused.body.lower()
        assert_error(await rerun(server, 1), 429, "user 1 has 2 jobs queued")
        assert await submit(server, folder, *key) == first
        assert (await submit(server, folder, user=2)).status == 201
        assert (await curl("-X", "POST", f"{server.url}/terminate/1")).status == 200
        assert (await submit(server, folder)).status == 201
        assert (await submit(server, folder)).status == 429
        assert_error(await submit(server, folder, "-F", "file=@large"), 400, "more than 2 files")
        assert check(str(server.database), lambda done, total: None) == []


async def stalled_upload(server: Server, user: int) -> asyncio.StreamWriter:
    """Begin an upload that says whose it is, and never ends."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    lines = (
        *("POST /upload HTTP/1.1", f"Host: {host}:{port}", "Content-Length: 100000"),
        *("Content-Type: multipart/form-data; boundary=b", "", "--b"),
        *('Content-Disposition: form-data; name="user_id"', "", str(user), "--b"),
        *('Content-Disposition: form-data; name="file"; filename="run.sh"', "", "#" * 10_000),
    )
    writer.write("\r\n".join(lines).encode())
    await writer.drain()
    return writer


async def test_uploads_that_arrive_at_a_time_are_bounded_for_each_user_and_for_all(
    tmp_path: Path, folder: Path
) -> None:
    limits = {"MAX_OPEN_UPLOADS": "2", "MAX_OPEN_UPLOADS_TOTAL": "3"}
    async with idle_server(tmp_path, **limits) as server:
        stalled = [await stalled_upload(server, 1) for _ in range(2)]

        async def refused(user: int) -> Answer:
            deadline = asyncio.get_running_loop().time() + 10
            while (answer := await submit(server, folder, user=user)).status == 201:
                assert asyncio.get_running_loop().time() < deadline
            return answer

        assert_error(await refused(1), 429, "2 uploads of user 1 are arriving")
        assert (await submit(server, folder, user=2)).status == 201
        stalled.append(await stalled_upload(server, 2))
        assert_error(await refused(2), 503, "3 uploads are arriving")
        for writer in stalled:
            writer.transport.abort()
        deadline = asyncio.get_running_loop().time() + 10
        while (await submit(server, folder)).status != 201:
            assert asyncio.get_running_loop().time() < deadline
