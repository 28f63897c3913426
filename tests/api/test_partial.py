"""The files of a job as they are now: from its agent, from the store, and what goes wrong."""

from __future__ import annotations

import asyncio
import io
import os
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from agent import trees
from archive import writer as archive
from fleet.snapshot_relay import SnapshotRelay, SnapshotUnavailable
from tests.harness import AgentProcess, Answer, Server, curl, eventually, run, running_server
from wire.frames import CHUNK_BYTES, Frame
from wire.messages import ProtocolError


async def partial(server: Server, job_id: int) -> Answer:
    return await curl(f"{server.url}/download_partial/{job_id}")


def opened(answer: Answer) -> zipfile.ZipFile:
    assert answer.status == 200, answer
    archived = zipfile.ZipFile(io.BytesIO(answer.body))
    assert archived.testzip() is None
    return archived


async def test_it_gives_what_there_is_in_every_state(server: Server, tmp_path: Path) -> None:
    go = tmp_path / "go"
    script = (
        f'mkdir d; echo half > d/f; echo so far; until [ -e "{go}" ]; do sleep 0.05; done; exit 3'
    )
    job_id = await server.upload(script, {"input.pdb": b"ATOM\n"})
    await eventually(lambda: _stored_output(server), "the job has printed")
    running = opened(await partial(server, job_id))
    assert running.read("stdout.log") == b"so far\n"
    assert running.read("d/f") == b"half\n"
    assert running.read("input.pdb") == b"ATOM\n"
    head = (await curl("-I", f"{server.url}/download_partial/{job_id}")).body.lower()
    assert b"content-type: application/zip" in head
    assert (await server.status(job_id))["status"] == "Running"
    go.touch()
    await server.wait(job_id, "Failed")
    failed = await partial(server, job_id)
    assert opened(failed).read("d/f") == b"half\n"
    rest = await curl("-H", "Range: bytes=10-", f"{server.url}/download_partial/{job_id}")
    assert (rest.status, rest.body) == (206, failed.body[10:])
    # what the job left is listed, too, though it failed
    listed = (await curl(f"{server.url}/jobs/{job_id}/files")).json()
    assert "d/f" in {file["path"] for file in listed["files"]}

    killed = await server.upload("echo before > kept; sleep 60")
    await server.wait(killed, "Running")
    await eventually(
        lambda: any(
            kept.stat().st_size for kept in server.directory.glob("**/attempts/*/job/kept")
        ),
        "it has written",
    )
    await curl("-X", "POST", f"{server.url}/terminate/{killed}")
    assert opened(await partial(server, killed)).read("kept") == b"before\n"

    done = await server.upload("true")
    await server.wait(done, "Completed")
    assert (await partial(server, done)).body == (await server.download(done)).body
    assert (await partial(server, 99)).status == 404
    agent_files = server.directory / "orchestrator.db.agent" / "snapshots"
    await eventually(lambda: not list(agent_files.iterdir()), "snapshots are removed")


def _stored_output(server: Server) -> bool:
    return server.query("SELECT count(*) FROM output") != [(0,)]


async def test_a_job_that_has_not_run_has_its_input(tmp_path: Path) -> None:
    async with running_server(tmp_path / "idle", "--no-agent") as idle:
        large = os.urandom(1_000_000)
        job_id = await idle.upload("true", {"large.bin": large, "empty": b"", "\u00fc": b"1"})
        archived = opened(await partial(idle, job_id))
        assert archived.namelist() == ["run.sh", "large.bin", "empty", "\u00fc"]
        assert archived.read("large.bin") == large


async def test_a_request_that_ends_early_leaves_nothing_and_the_job_goes_on(
    bare_server: Server, tmp_path: Path
) -> None:
    server, go = bare_server, tmp_path / "go"
    agent = AgentProcess(server, "one")
    await agent.start()
    script = f'head -c 30000000 /dev/urandom > big; until [ -e "{go}" ]; do sleep 0.05; done'
    job_id = await server.upload(script)
    await server.wait(job_id, "Running")  # before that it would be the input
    big = agent.attempt(1) / "job" / "big"
    await eventually(lambda: big.exists() and big.stat().st_size == 30_000_000, "it has written")
    snapshots = agent.workdir / "snapshots"
    url = f"{server.url}/download_partial/{job_id}"

    got = tmp_path / "partial.zip"
    slow = ("curl", "-sS", "--limit-rate", "100k", "-o", str(got), url)
    client = await asyncio.create_subprocess_exec(*slow)
    await eventually(got.exists, "the first bytes have come")
    assert any(snapshots.iterdir())
    client.kill()
    await client.wait()
    await eventually(lambda: not any(snapshots.iterdir()), "it is gone with its client", 10)
    assert agent.log().count("event=connected") == 1
    assert "level=ERROR" not in server.log()

    got.unlink()
    # what the kernel holds is read after the end, so the client must not be too slow for that
    asked = asyncio.create_task(run("curl", "-sS", "--limit-rate", "2M", "-o", str(got), url))
    await eventually(got.exists, "the first bytes have come")
    await agent.kill()
    await eventually(lambda: "status=499" in server.log().rpartition("event=agent_disc")[2], "end")
    code, _ = await asyncio.wait_for(asked, 20)
    assert code != 0, got.read_bytes()[:300]  # broken off, and curl knows it
    assert any(snapshots.iterdir())
    away = await partial(server, job_id)
    assert (away.status, away.json()["status"]) == (409, "Unknown")
    assert "agent one" in away.json()["message"]

    await agent.start()
    await eventually(lambda: agent.log().count("event=connected") == 2, "it is back")
    assert not snapshots.exists()
    whole = opened(await partial(server, job_id))
    assert whole.getinfo("big").file_size == 30_000_000
    go.touch()
    await server.wait(job_id, "Completed")


async def test_more_than_a_result_may_be_is_refused_with_the_reason(tmp_path: Path) -> None:
    environment = {"MAX_RESULT_BYTES": "1000", "MAX_AGE": "1"}
    async with running_server(tmp_path / "server", environment=environment) as server:
        job_id = await server.upload("head -c 2000 /dev/zero > f; echo; sleep 60")
        await eventually(lambda: _stored_output(server), "it has written")
        answer = await partial(server, job_id)
        assert (answer.status, answer.json()["status"]) == (409, "Unknown")
        assert "larger" in answer.json()["message"]
        await curl("-X", "POST", f"{server.url}/terminate/{job_id}")
        await eventually(lambda: _state(server) == "Cleaned", "retention came")
        answer = await partial(server, job_id)
        assert (answer.status, "retention" in answer.json()["message"]) == (409, True)


def _state(server: Server) -> str:
    return str(server.query("SELECT state FROM job")[0][0])


# --- parts ------------------------------------------------------------------------


def test_a_tree_that_changes_while_it_is_read_is_archived_all_the_same(tmp_path: Path) -> None:
    top, stop = tmp_path / "job", threading.Event()

    def churn() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            folder = top / f"d{number % 7}"
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "a" / "b").mkdir(parents=True)
            (folder / "a" / "grows").write_bytes(bytes(number % 3000))
            (folder / "a" / "link").symlink_to("/etc/passwd")
            os.replace(folder / "a" / "grows", folder / "a" / "b" / "moved")

    top.mkdir()
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(40):
            with archive.new_zip(tmp_path / "target.zip") as writer:
                for entry in trees.walk(top):
                    trees.add_entry(writer, entry)
            with zipfile.ZipFile(tmp_path / "target.zip") as archived:
                assert archived.testzip() is None
    finally:
        stop.set()
        thread.join()


def test_a_directory_that_is_moved_away_does_not_lead_the_walk_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "job" / "a" / "b").mkdir(parents=True)
    (tmp_path / "job" / "a" / "b" / "inner").touch()
    (tmp_path / "other" / "secret").mkdir(parents=True)
    seen = []
    for entry in trees.walk(tmp_path / "job"):
        seen.append(entry.archive_name)
        if entry.name == "inner":
            (tmp_path / "job" / "a" / "b").rename(tmp_path / "other" / "b")
    assert seen == ["a/", "a/b/", "a/b/inner"]


async def test_a_snapshot_holds_no_more_than_the_window_and_says_when_it_breaks_off() -> None:
    acknowledged: list[int] = []
    incoming = SnapshotRelay(acknowledged.append)
    incoming.begin(20 * CHUNK_BYTES)
    pieces = incoming.pieces()
    chunk = bytes(CHUNK_BYTES)
    incoming.put(Frame(0, 0, chunk))
    incoming.put(Frame(0, CHUNK_BYTES, chunk))
    assert await anext(pieces) == chunk
    assert acknowledged == []  # not before the client has taken it
    assert await anext(pieces) == chunk
    assert acknowledged == [CHUNK_BYTES]
    with pytest.raises(ProtocolError):
        incoming.put(Frame(0, 5, chunk))
    with pytest.raises(ProtocolError):
        for number in range(2, 20):
            incoming.put(Frame(0, number * CHUNK_BYTES, chunk))
    broken: list[bool] = []
    incoming.when_broken(lambda: broken.append(True))
    incoming.fail("gone")
    assert broken  # at once, however slow the client is
    with pytest.raises(ConnectionResetError):
        async for _ in pieces:
            pass
    incoming = SnapshotRelay(acknowledged.append)
    incoming.fail("no room")
    with pytest.raises(SnapshotUnavailable, match="no room"):
        await incoming.size()
