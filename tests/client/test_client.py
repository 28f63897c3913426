"""The Python clients against a real server: what they do, and which errors they raise."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator_client import (
    AsyncClient,
    Client,
    Conflict,
    Forbidden,
    JobFailed,
    JobFilter,
    JobState,
    NotFound,
    QuotaExceeded,
    TooLarge,
    Unauthorized,
    WaitTimeout,
)
from tests.client.program import Program
from tests.harness import PROJECT, Server, run, running_server


def _script(text: str) -> list[tuple[str, bytes | Path]]:
    return [("run.sh", text.encode())]


async def _in_thread(server: Server, work: object) -> None:
    def call() -> None:
        with Client(server.url, user_id=1) as client:
            work(client)  # type: ignore[operator]

    await asyncio.to_thread(call)


async def test_a_job_as_an_object(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "x.txt").write_text("content")

    def work(client: Client) -> None:
        job = client.submit(
            "example",
            [*_script("cat data/deep/x.txt; pwd > where; exit 0"), tmp_path / "data"],
            name="an object",
            tags={"project": "x"},
            priority=3,
            timeout=60,
            parameters={"cutoff": 4.5},
        )
        info = job.check()
        assert (info.name, dict(info.tags), info.priority) == ("an object", {"project": "x"}, 3)
        assert (info.timeout, info.exit_code, info.state) == (60, 0, JobState.COMPLETED)
        assert list(job.logs()) == ["content"]
        assert b"".join(job.output()) == b"content"
        assert {file.path for file in job.files() if file.kind == "file"} == {
            *("run.sh", "data/deep/x.txt", "parameters.json", "where", "stdout.log", "stderr.log")
        }
        assert job.read("parameters.json") == b'{\n  "cutoff": 4.5\n}\n'
        job.save("where", tmp_path / "where")
        assert (tmp_path / "where").stat().st_size > 0
        assert job.result(tmp_path / "out").files == 6
        assert (tmp_path / "out" / "data" / "deep" / "x.txt").read_text() == "content"
        again = job.rerun()
        assert again.check().tags == {"project": "x"}
        assert [job.id for job in client.find(JobFilter(tags={"project": "x"}))] == [
            *(again.id, job.id)
        ]
        with pytest.raises(Conflict):
            job.terminate()
        assert job.history()[-1]["status"] == "Completed"

    await _in_thread(server, work)


async def test_what_a_job_left_that_failed(server: Server, tmp_path: Path) -> None:
    def work(client: Client) -> None:
        job = client.submit("example", _script("echo half > half; exit 9"))
        with pytest.raises(JobFailed, match="exit code 9") as failure:
            job.result(tmp_path / "out")
        assert (failure.value.exit_code, failure.value.state) == (9, "Failed")
        assert not (tmp_path / "out").exists()
        job.partial_result(tmp_path / "out")
        assert (tmp_path / "out" / "half").read_text() == "half\n"
        with pytest.raises(NotFound):
            job.read("other half")
        with pytest.raises(NotFound):
            client.job(10**9).wait()

    await _in_thread(server, work)


async def test_waiting_has_an_end(server: Server) -> None:
    def work(client: Client) -> None:
        job = client.submit("example", _script("sleep 1000"))
        with pytest.raises(WaitTimeout):
            job.wait(timeout=0.2)
        with pytest.raises(TimeoutError):
            list(client.wait_all([job.id], timeout=0.5))
        job.terminate()
        assert job.wait().state is JobState.KILLED

    await _in_thread(server, work)


async def test_one_client_in_several_threads(server: Server) -> None:
    def work(client: Client) -> None:
        found: list[str] = []

        def one(number: int) -> None:
            job = client.submit("example", _script(f"echo {number}"))
            job.check()
            found.extend(job.logs())

        threads = [threading.Thread(target=one, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(int, found)) == list(range(12))

    await _in_thread(server, work)


async def test_an_upload_that_is_too_large_is_refused_before_it_is_sent(
    program: Program, server: Server
) -> None:
    with open(program.directory / "huge", "wb") as file:
        file.truncate(3_000_000_000)
    (program.directory / "run.sh").write_text("exit 0\n")
    sent: list[int] = []

    def work(client: Client) -> None:
        files = [program.directory / "run.sh", program.directory / "huge"]
        with pytest.raises(TooLarge):
            client.submit("example", files, progress=lambda done, _: sent.append(done))

    await _in_thread(server, work)
    assert max(sent, default=0) < 1_000_000_000
    async with AsyncClient(server.url, user_id=1) as client:
        with pytest.raises(TooLarge):
            await client.submit("example", [*_script("exit 0"), program.directory / "huge"])
    assert (await program.run("submit", "run.sh", "huge")).code == 3


async def test_a_full_queue_is_told_after_the_patience(tmp_path: Path) -> None:
    environment = {"MAX_QUEUED_JOBS": "1"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:

        def work() -> None:
            with Client(server.url, user_id=1, patience=0) as client:
                client.submit("example", _script("exit 0"))
                with pytest.raises(QuotaExceeded):
                    client.submit("example", _script("exit 0"))

        await asyncio.to_thread(work)
        program = Program(server.url, tmp_path)
        (tmp_path / "run.sh").write_text("exit 0\n")
        done = await program.run("submit", "run.sh", "--patience", "0")
        assert done.code == 3, done


async def test_tokens(program: Program, server: Server) -> None:
    async def token(*words: str) -> str:
        code, output = await run(
            *(sys.executable, str(PROJECT / "orchestrator.py"), "token", "create", *words),
            *("--db", str(server.database)),
        )
        assert code == 0, output
        return output.decode().splitlines()[0]

    reader = await token("--name", "r", "--user", "1", "--role", "read")
    submitter = await token("--name", "s", "--user", "1", "--role", "submit")

    def refused() -> bool:
        with Client(server.url, user_id=1) as client:
            try:
                list(client.find())
            except Unauthorized:
                return True
            return False

    deadline = time.monotonic() + 20
    while not await asyncio.to_thread(refused):
        assert time.monotonic() < deadline
    (program.directory / "run.sh").write_text("exit 0\n")
    done = await program.run("ls")
    assert done.code == 4 and "token" in done.error
    done = await program.run("submit", "run.sh", environment={"ORCHESTRATOR_TOKEN": reader})
    assert done.code == 4
    (program.directory / "token").write_text(submitter)
    (program.directory / "token").chmod(0o600)
    done = await program.run("submit", "run.sh", "--wait", "--token-file", "token")
    assert done.code == 0, done
    assert submitter not in (await program.run("config", "--token-file", "token")).out

    def others() -> None:
        with Client(server.url, submitter, user_id=2) as client, pytest.raises(Forbidden):
            client.submit("example", _script("exit 0"))

    await asyncio.to_thread(others)


async def test_agents_can_be_drained(server: Server) -> None:
    await server.agent_pid()
    names: list[str] = []

    def work(client: Client) -> None:
        deadline = time.monotonic() + 20
        while not names:
            assert time.monotonic() < deadline
            names.extend(agent["name"] for agent in client.agents())
        assert client.drain(names[0])["is_drained"]
        assert not client.resume(names[0])["is_drained"]
        assert client.health()["status"] == "healthy"
        assert [service["name"] for service in client.services()] == ["example"]

    await _in_thread(server, work)


async def test_events_come_as_they_happen(server: Server) -> None:
    async with AsyncClient(server.url, user_id=1) as client:
        job = await client.submit("example", _script("exit 0"))
        seen = []
        async for event in client.events(user_id=1, after="0-0"):
            seen.append(event.data["status"])
            if JobState(event.data["status"]).has_ended:
                break
        assert seen == ["Queued", "Processing", "Submitted", "Running", "Completed"]
        assert (await job.wait()).is_successful
