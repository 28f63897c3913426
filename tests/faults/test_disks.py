"""Disks that are full, read-only, damaged, or that refuse to be written."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.faults.sabotage import through
from tests.harness import PROJECT, AgentProcess, Server, curl, eventually, run, running_server

_MB = 1_000_000


@contextlib.asynccontextmanager
async def small_disk(place: Path, size: str) -> AsyncIterator[Path]:
    """A file system of that size for the time of a test."""
    place.mkdir()
    code, output = await run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
    if code != 0:
        pytest.skip(f"needs to mount a small file system: {output.decode()}")
    try:
        yield place
    finally:
        await run("umount", "-l", str(place))


async def upload(server: Server, directory: Path, *files: str) -> int:
    """Submit ``true`` and the files; returns the HTTP status."""
    (directory / "run.sh").write_text("true")
    form = [word for name in ("run.sh", *files) for word in ("-F", f"file=@{name}")]
    form += ["-F", "user_id=1", "-F", "service=example", f"{server.url}/upload"]
    return (await curl(*form, cwd=directory)).status


# --- the server's -----------------------------------------------------------------


async def _erased(server: Server, blobs: int) -> None:
    """Wait until no more blobs than that are left, and the disk has back what the others took."""
    count = "SELECT count(*) FROM blob"
    await eventually(lambda: server.query(count) == [(blobs,)], "it erases what it refused")
    await eventually(lambda: _is_shrunk(server), "it gives the disk back what it erased")


def _log_of(server: Server) -> Path:
    return server.database.with_name(f"{server.database.name}-wal")


def _is_shrunk(server: Server) -> bool:
    """Whether the file has no free pages and takes no more than its pages, and the log nothing.

    Blocks are counted, as a file that is cut off has its new length before they are free.
    """
    ((free, length),) = server.query(
        "SELECT freelist_count, page_count * page_size"
        " FROM pragma_freelist_count, pragma_page_count, pragma_page_size"
    )
    taken = [path.stat().st_blocks * 512 for path in (server.database, _log_of(server))]
    return (free, *taken) == (0, length, 0)


async def test_a_full_disk_is_said_and_overcome_without_a_restart(tmp_path: Path) -> None:
    async with (
        small_disk(tmp_path / "volume", "100m") as volume,
        running_server(volume / "server", "--no-agent") as server,
    ):
        (tmp_path / "big").write_bytes(bytes(30 * _MB))
        answers = []
        for _ in range(6):
            answers.append(await upload(server, tmp_path, "big"))
            if answers[-1] == 507:
                await _erased(server, blobs=2 * answers.count(201))
        accepted = answers.count(201)
        assert 1 <= accepted <= 4
        assert set(answers[accepted:]) == {507}
        free = os.statvfs(volume).f_bavail * os.statvfs(volume).f_frsize
        (volume / "fill").write_bytes(bytes(free - 5 * _MB))
        health = await curl(f"{server.url}/health")
        assert (health.status, health.json()["status"]) == (500, "unhealthy")
        assert (await server.status(1))["status"] == "Queued"
        (volume / "fill").unlink()
        assert (await curl(f"{server.url}/health")).status == 200
        assert await upload(server, tmp_path) == 201


async def test_a_reader_that_keeps_the_log_long_fills_the_disk_only_as_long_as_it_reads(
    tmp_path: Path,
) -> None:
    """Nothing is taken meanwhile, so no write of a job empties the write-ahead log after it."""
    async with (
        small_disk(tmp_path / "volume", "100m") as volume,
        running_server(volume / "server", "--no-agent") as server,
    ):
        (tmp_path / "big").write_bytes(bytes(20 * _MB))
        assert [await upload(server, tmp_path, "big") for _ in range(3)] == [201, 201, 201]
        with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM job").fetchall() == [(3,)]
            assert await upload(server, tmp_path, "big") == 507
            log = _log_of(server)
            await eventually(lambda: log.stat().st_size > 25 * _MB, "erasing makes the log long")
            assert (await curl(f"{server.url}/health")).status == 500
        await _erased(server, blobs=6)
        assert (await curl(f"{server.url}/health")).status == 200
        assert await upload(server, tmp_path) == 201


async def test_a_disk_that_refuses_to_be_written_is_said_and_overcome_without_a_restart(
    server: Server, tmp_path: Path
) -> None:
    """The limit on file sizes makes writes fail as a file system does that went read-only."""
    process, go = psutil.Process(server.pid), tmp_path / "go"
    running = await server.upload(f"until [ -e {go} ]; do sleep 0.05; done; echo done")
    await server.wait(running, "Running")
    _, most = process.rlimit(psutil.RLIMIT_FSIZE)
    process.rlimit(psutil.RLIMIT_FSIZE, (0, most))
    health = await curl(f"{server.url}/health")
    assert (health.status, health.json()["status"]) == (500, "unhealthy")
    assert await upload(server, tmp_path) == 500
    assert (await server.status(running))["status"] == "Running"
    # its end is told of until it could be written
    go.touch()
    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, most))
    assert (await curl(f"{server.url}/health")).status == 200
    assert (await server.result(running)).read("stdout.log") == b"done\n"
    assert await upload(server, tmp_path) == 201
    assert len(server.query("SELECT id FROM job")) == 2


async def test_after_a_failed_sync_nothing_is_answered_and_the_server_ends(tmp_path: Path) -> None:
    """What was written may be there after a restart or not, so nobody is told either."""
    async with running_server(tmp_path / "server", "--no-agent") as server:
        before = await server.upload("true")
        await server.stop()
        server.through = through({"sync": True})
        await server.start("--no-agent")
        for _ in range(3):  # retention's first look, which writes, too, is over after these
            assert (await curl(f"{server.url}/health")).status == 200
        os.kill(server.pid, signal.SIGUSR1)
        (tmp_path / "run.sh").write_text("true")
        code, output = await run(
            *("curl", "-sS", "-F", f"file=@{tmp_path / 'run.sh'}", "-F", "user_id=1"),
            *("-F", "service=example", "-w", "%{http_code}", f"{server.url}/upload"),
        )
        assert (code, output[-3:]) == (52, b"000"), "the connection ends without an answer"
        assert await server.wait_ended() == 2
        assert "event=sync_failed" in server.log()
        assert "start it again once the disk is" in server.log()
        server.through = ()
        await server.start("--no-agent")
        assert (await curl(f"{server.url}/health")).status == 200
        assert (await server.status(before))["status"] == "Queued"
        await server.check()


async def test_damaged_bytes_end_a_download_as_broken_and_fail_the_job_that_needs_them(
    bare_server: Server, tmp_path: Path
) -> None:
    server = bare_server
    agent = AgentProcess(server, "one")
    await agent.start()
    try:
        large = await server.upload("head -c 3000000 /dev/urandom > out")
        small = await server.upload("echo small")
        for job_id in (large, small):
            await server.result(job_id)
    finally:
        await agent.kill()
    waiting = await server.upload("true", {"data": bytes(100)})
    also_waiting = await server.upload("true", {"data": bytes(500_000)})
    with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as db:
        for blobs in (
            f"SELECT result_blob FROM attempt WHERE job_id IN ({large}, {small})",
            f"SELECT blob_id FROM input_file WHERE job_id IN ({waiting}, {also_waiting})",
        ):
            db.execute(
                "UPDATE chunk SET data = zeroblob(length(data))"
                f" WHERE id IN (SELECT max(id) FROM chunk WHERE id >> 20 IN ({blobs})"
                " GROUP BY id >> 20)"
            )
    target = tmp_path / "result.zip"
    code, _ = await run("curl", "-sS", "-o", str(target), f"{server.url}/download/{large}")
    assert code != 0, "curl is told that the download is broken"
    answer = await curl(f"{server.url}/download/{small}")
    assert (answer.status, "damaged" in answer.json()["message"]) == (500, True)
    agent = AgentProcess(server, "another")
    await agent.start()
    try:
        for job_id in (waiting, also_waiting):
            await server.wait(job_id, "Failed")
        await server.result(await server.upload("true"))
    finally:
        await agent.kill()
    code, output = await run(
        sys.executable, str(PROJECT / "orchestrator.py"), "check", str(server.database)
    )
    assert (code, b"has another checksum" in output) == (1, True)


async def _refusal(database: Path, *before: str) -> str:
    """Start a server that must refuse to start; returns what it says."""
    command = (sys.executable, str(PROJECT / "orchestrator.py"), "--no-agent", "--port", "0")
    code, output = await run(*before, *command, "--db", str(database))
    assert code == 2, output
    assert b"Traceback" not in output
    return output.decode().splitlines()[-1]


async def _new_database(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    async with running_server(path.parent, "--no-agent") as server:
        await server.stop()


async def test_a_read_only_file_system_is_refused_at_start_with_what_to_do(tmp_path: Path) -> None:
    async with small_disk(tmp_path / "volume", "20m") as volume:
        database = volume / "orchestrator.db"
        await _new_database(database)
        await run("mount", "-o", "remount,ro", str(volume))
        for path in (database, volume / "new.db"):
            said = await _refusal(path)
            assert "Read-only file system" in said
            assert "choose another place with --db" in said


async def test_missing_rights_are_refused_at_start_with_what_to_do(tmp_path: Path) -> None:
    database = tmp_path / "server" / "orchestrator.db"
    await _new_database(database)
    as_others: tuple[str, ...] = ()
    if os.geteuid() == 0:  # whose rights do not depend on modes, until that is taken away
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv to give up the rights of root")
        as_others = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    database.chmod(0o400)
    assert "choose another place with --db" in await _refusal(database, *as_others)
    database.chmod(0o600)
    for left in database.parent.glob("orchestrator.db-*"):
        left.unlink()
    database.parent.chmod(0o500)
    assert "choose another place with --db" in await _refusal(database, *as_others)
    database.parent.chmod(0o700)
    assert "make the directory first" in await _refusal(database.with_name("x") / "y.db")


async def test_what_is_no_regular_file_is_refused_in_words(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, tmp_path, Path("/dev/null")):
        assert "choose another place with --db" in await _refusal(path)
        for command in (("check", str(path)), ("backup", str(tmp_path / "b"), "--db", str(path))):
            code, output = await run(sys.executable, str(PROJECT / "orchestrator.py"), *command)
            assert (code, b"is not a regular file" in output) == (2, True), output


async def test_a_damaged_database_is_refused_at_start_with_what_to_do(tmp_path: Path) -> None:
    database = tmp_path / "server" / "orchestrator.db"
    await _new_database(database)
    whole = database.read_bytes()
    for damaged in (
        b"not a database" * 1000,  # another file
        whole[:100] + bytes(8092) + whole[8192:],  # a lost first page
        whole[:8192] + b"\xff" * (len(whole) - 8192),  # all others lost
        whole[:5000],  # cut off
    ):
        database.write_bytes(damaged)
        assert "put the last backup in its place" in await _refusal(database)


# --- the agent's ------------------------------------------------------------------


def _losses(server: Server, job_id: int) -> int:
    """How often an agent lost the job since its disk was full."""
    sql = (
        "SELECT count(*) FROM history WHERE job_id = ? AND reason LIKE '%No space left on device%'"
    )
    return int(server.query(sql, job_id)[0][0])


async def test_a_full_disk_of_an_agent_fails_no_job_that_may_run_elsewhere(
    bare_server: Server, tmp_path: Path
) -> None:
    async with small_disk(tmp_path / "volume", "20m") as volume:
        agent = AgentProcess(bare_server, "small")
        agent.workdir = volume / "agent"
        await agent.start("--slots", "1")
        try:
            # the job fills the disk, so that not even its exit code could be written
            job_id = await bare_server.upload("cat /dev/zero > fill; exit 3")
            status = await bare_server.wait(job_id, "Failed")
            assert status["message"].startswith("run.sh ended with exit code 3; the agent's disk")
            assert bare_server.transitions(job_id).count("Processing") == 1
            # its files fit, their archive does not
            job_id = await bare_server.upload("head -c 15000000 /dev/urandom > out; echo said")
            status = await bare_server.wait(job_id, "Failed")
            assert status["message"].startswith("the agent's disk has no room for the archive")
            assert bare_server.transitions(job_id).count("Processing") == 1
            # its input does not fit: it waits for an agent that has room
            job_id = await bare_server.upload("true", {"big": bytes(30 * _MB)})
            await eventually(lambda: _losses(bare_server, job_id) > 0, "it was lost")
            assert (await curl("-X", "POST", f"{bare_server.url}/terminate/{job_id}")).status == 200
            # others have filled it
            attempts = volume / "agent" / "attempts"
            await eventually(lambda: os.listdir(attempts) == [], "what failed is removed")
            with open(volume / "fill", "wb", buffering=0) as fill, contextlib.suppress(OSError):
                while fill.write(bytes(4096)):
                    pass
            job_id = await bare_server.upload("true")
            await eventually(lambda: _losses(bare_server, job_id) > 0, "it was lost", 60)
            (volume / "fill").unlink()
            await bare_server.result(job_id, seconds=60)
            assert agent.process is not None
            assert agent.process.returncode is None
        finally:
            await agent.kill()
