"""The clients against broken connections, restarts, slow links and full disks."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable, Coroutine
from pathlib import Path

import pytest

from orchestrator_client import AsyncClient, Client, JobFilter, Submission, UnusableFile
from tests.client.program import Program
from tests.faults.proxy import FaultyProxy
from tests.faults.test_disks import small_disk
from tests.harness import AgentProcess, Server, eventually

_MB = 1_000_000
_PATIENCE = 60.0

Submit = Callable[[str, list[tuple[str, bytes | Path]]], Coroutine[None, None, int]]


async def _submit_synchronously(url: str, files: list[tuple[str, bytes | Path]]) -> int:
    def submit() -> int:
        with Client(url, user_id=1, patience=_PATIENCE) as client:
            return client.submit("example", files).id

    return await asyncio.to_thread(submit)


async def _submit_asynchronously(url: str, files: list[tuple[str, bytes | Path]]) -> int:
    async with AsyncClient(url, user_id=1, patience=_PATIENCE) as client:
        return (await client.submit("example", files)).id


both_ways = pytest.mark.parametrize("submit", [_submit_synchronously, _submit_asynchronously])


def _port(server: Server) -> int:
    return int(server.url.rpartition(":")[2])


async def _jobs(server: Server) -> list[int]:
    return [row[0] for row in server.query("SELECT id FROM job ORDER BY id")]


# --- uploads ----------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("passed", [10, 50_000, 700_000, 1_000_900])
async def test_an_upload_that_breaks_anywhere_makes_one_job(
    server: Server, submit: Submit, passed: int
) -> None:
    """At 1,000,900 bytes the body is through, and what gets lost is the answer."""
    content = os.urandom(_MB)
    async with FaultyProxy(_port(server)).running() as proxy:
        proxy.cut_after = passed
        submitting = asyncio.create_task(
            submit(proxy.url, [("run.sh", b"exit 0"), ("data", content)])
        )
        await eventually(lambda: proxy.connections > 1, "it tries again")
        proxy.cut_after = None
        job_id = await submitting
    assert await _jobs(server) == [job_id]
    result = await server.result(job_id)
    assert result.read("data") == content


@both_ways
async def test_an_upload_survives_a_restart_of_the_server(
    server: Server, submit: Submit, tmp_path: Path
) -> None:
    content = os.urandom(2 * _MB)
    (tmp_path / "data").write_bytes(content)
    async with FaultyProxy(_port(server)).running() as proxy:
        proxy.rate = 4 * _MB
        submitting = asyncio.create_task(
            submit(proxy.url, [("run.sh", b"exit 0"), ("data", tmp_path / "data")])
        )
        await eventually(lambda: proxy.connections > 0, "it uploads")
        await server.kill()
        await server.start("--slots", "4")
        proxy.rate = None
        job_id = await submitting
    assert await _jobs(server) == [job_id]
    assert (await server.result(job_id)).read("data") == content


async def test_a_stream_that_can_be_read_once_is_sent_again_whole(server: Server) -> None:
    content = os.urandom(3 * _MB)
    reader, writer = os.pipe()

    def fill() -> None:
        with open(writer, "wb") as file:
            file.write(content)

    def submit(url: str) -> int:
        with Client(url, user_id=1) as client, open(reader, "rb") as stream:
            return client.submit("example", [("run.sh", b"exit 0"), ("data", stream)]).id

    async with FaultyProxy(_port(server)).running() as proxy:
        proxy.cut_after = 2 * _MB
        filling = asyncio.create_task(asyncio.to_thread(fill))
        submitting = asyncio.create_task(asyncio.to_thread(submit, proxy.url))
        await eventually(lambda: proxy.connections > 1, "it tries again")
        proxy.cut_after = None
        job_id = await submitting
        await filling
    assert (await server.result(job_id)).read("data") == content


class _Worn(io.BytesIO):
    """A file on a disk that can't be read to its end."""

    def read(self, size: int | None = -1) -> bytes:
        """Read, or fail past the first megabyte."""
        if self.tell() > _MB:
            raise OSError(5, "Input/output error")
        return super().read(size)


async def test_a_file_that_can_not_be_read_ends_the_upload_at_once(server: Server) -> None:
    def submit() -> None:
        with Client(server.url, user_id=1, patience=600) as client:
            client.submit("example", [("run.sh", b"exit 0"), ("data", _Worn(bytes(5 * _MB)))])

    with pytest.raises(UnusableFile, match="input/output error"):
        await asyncio.to_thread(submit)
    async with AsyncClient(server.url, user_id=1, patience=600) as client:
        with pytest.raises(UnusableFile, match="input/output error"):
            await client.submit("example", [("run.sh", b"exit 0"), ("data", _Worn(bytes(5 * _MB)))])
    assert await _jobs(server) == []


# --- waiting and following --------------------------------------------------------

_GATED = "echo started; until [ -e '{gate}' ]; do sleep 0.05; done; exit 0"


async def test_a_wait_goes_on_through_a_restart(server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = await server.upload(_GATED.format(gate=gate))
    await server.wait(job_id, "Running")

    def wait() -> str:
        with Client(server.url, user_id=1) as client:
            return client.job(job_id).wait().state

    waiting = asyncio.create_task(asyncio.to_thread(wait))
    async with AsyncClient(server.url, user_id=1) as client:
        also = asyncio.create_task(client.job(job_id).wait())
        both = asyncio.create_task(_ended(client, [job_id]))
        for _ in range(2):
            await server.kill()
            await server.start("--slots", "4")
        assert await server.stop() == 0
        await server.start("--slots", "4")
        gate.touch()
        assert await waiting == "Completed"
        assert (await also).state == "Completed"
        assert await both == [job_id]


async def _ended(client: AsyncClient, ids: list[int]) -> list[int]:
    return [info.id async for info in client.wait_all(ids)]


@pytest.mark.parametrize("way", ["synchronous", "asynchronous"])
async def test_following_through_a_restart_shows_each_line_once(
    server: Server, tmp_path: Path, way: str
) -> None:
    gate = tmp_path / "gate"
    script = f"for i in $(seq 1 400); do echo line $i; sleep 0.01; done; {_GATED.format(gate=gate)}"
    job_id = await server.upload(script)
    seen: list[str] = []

    def follow() -> None:
        with Client(server.url, user_id=1) as client:
            seen.extend(client.job(job_id).logs(follow=True))

    async def follow_too() -> None:
        async with AsyncClient(server.url, user_id=1) as client:
            async for line in client.job(job_id).logs(follow=True):
                seen.append(line)

    follower = asyncio.to_thread(follow) if way == "synchronous" else follow_too()
    following = asyncio.create_task(follower)
    for number in (50, 200):
        await eventually(lambda n=number: len(seen) > n, f"{number} lines have come")  # type: ignore[misc]
        await server.kill()
        await server.start("--slots", "4")
    await eventually(lambda: "started" in seen, "all lines have come")
    gate.touch()
    await following
    assert seen == [f"line {i}" for i in range(1, 401)] + ["started"]


@pytest.mark.lease(3)
async def test_following_a_job_that_is_started_again_meanwhile(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    first, second = new_agent("first"), new_agent("second")
    await first.start("--slots", "1")
    await first.wait_connected()
    script = 'echo "attempt $ORCHESTRATOR_ATTEMPT"; [ "$ORCHESTRATOR_ATTEMPT" != 1 ] || sleep 1000'
    job_id = await bare_server.upload(script)
    seen: list[str] = []

    def follow(url: str) -> None:
        with Client(url, user_id=1) as client:
            seen.extend(client.job(job_id).logs(follow=True))

    async with FaultyProxy(_port(bare_server)).running() as proxy:
        following = asyncio.create_task(asyncio.to_thread(follow, proxy.url))
        await eventually(lambda: seen == ["attempt 1"], "it follows")
        await first.kill()
        proxy.is_down = True
        proxy.cut()
        await second.start("--slots", "1")
        await bare_server.wait(job_id, "Completed")
        proxy.is_down = False
        await following
    assert seen == ["attempt 1", "", "[... attempt 2 ...]", "attempt 2"]


# --- downloads --------------------------------------------------------------------


async def _big_result(server: Server, size: int) -> int:
    job_id = await server.upload(f"head -c {size} /dev/urandom > big")
    await server.wait(job_id, "Completed")
    return job_id


@pytest.mark.parametrize("way", ["synchronous", "asynchronous"])
async def test_a_download_that_breaks_is_resumed_and_whole(
    server: Server, tmp_path: Path, way: str
) -> None:
    job_id = await _big_result(server, 8 * _MB)
    target = tmp_path / "result.zip"

    def download(url: str) -> None:
        with Client(url, user_id=1) as client:
            client.job(job_id).download(target)

    async def download_too(url: str) -> None:
        async with AsyncClient(url, user_id=1) as client:
            await client.job(job_id).download(target)

    async with FaultyProxy(_port(server)).running() as proxy:
        proxy.cut_after = 3 * _MB  # if it began anew each time, it would never end
        if way == "synchronous":
            await asyncio.to_thread(download, proxy.url)
        else:
            await download_too(proxy.url)
        assert 3 <= proxy.connections <= 8
    assert target.read_bytes() == (await server.download(job_id)).body
    assert os.listdir(tmp_path / "server") and not list(tmp_path.glob(".*part"))


async def test_a_download_survives_a_restart_of_the_server(server: Server, tmp_path: Path) -> None:
    job_id = await _big_result(server, 8 * _MB)
    target = tmp_path / "result.zip"
    seen: list[int] = []

    def download(url: str) -> None:
        with Client(url, user_id=1) as client:
            client.job(job_id).download(target, progress=lambda done, _: seen.append(done))

    async with FaultyProxy(_port(server)).running() as proxy:
        proxy.rate = 4 * _MB
        downloading = asyncio.create_task(asyncio.to_thread(download, proxy.url))
        await eventually(lambda: bool(seen) and seen[-1] > _MB, "some of it has come")
        await server.kill()
        await server.start("--slots", "4")
        proxy.rate = None
        await downloading
    assert target.read_bytes() == (await server.download(job_id)).body
    assert seen == sorted(seen)


async def test_a_full_disk_leaves_no_half_file(
    program: Program, server: Server, tmp_path: Path
) -> None:
    job_id = await _big_result(server, 8 * _MB)
    async with small_disk(tmp_path / "small", "4m") as disk:
        for words in (
            ["-o", str(disk / "out")],
            ["--zip", "-o", str(disk)],
            ["big", "-o", str(disk)],
        ):
            done = await program.run("get", str(job_id), *words)
            assert done.code == 1, done
            assert "no space left" in done.error.lower()
            assert "Traceback" not in done.error
            assert not (disk / "out").exists()
            assert list(disk.iterdir()) == []


# --- many -------------------------------------------------------------------------


async def _run_many(server: Server, jobs: int, restarts: int, place: Path) -> None:
    """Submit by map and fetch each, while the server is killed again and again."""
    fetched: dict[int, str] = {}

    def work() -> None:
        submissions = (
            Submission("example", [("run.sh", f"echo {number}".encode())], tags={"many": "x"})
            for number in range(jobs)
        )
        with Client(server.url, user_id=1, patience=120) as client:
            for index, job in client.map(submissions, in_flight=40):
                job.result(place / str(index))
                assert index not in fetched
                fetched[index] = (place / str(index) / "stdout.log").read_text()

    working = asyncio.create_task(asyncio.to_thread(work))
    for number in range(restarts):
        wanted = (number + 1) * jobs // (restarts + 1)
        await eventually(
            lambda w=wanted: len(fetched) >= w or working.done(),  # type: ignore[misc]
            f"{wanted} jobs are fetched",
            300,
        )
        await server.kill()
        await server.start("--slots", "4")
    await working
    assert fetched == {number: f"{number}\n" for number in range(jobs)}
    assert len(await _jobs(server)) == jobs


async def test_jobs_by_map_are_made_and_fetched_once_through_restarts(
    server: Server, tmp_path: Path
) -> None:
    await _run_many(server, 60, 3, tmp_path / "results")


@pytest.mark.soak
async def test_500_jobs_through_20_restarts(server: Server, tmp_path: Path) -> None:
    await _run_many(server, 500, 20, tmp_path / "results")


async def test_1000_jobs_by_map(server: Server) -> None:
    async def work() -> int:
        submissions = (Submission("example", [("run.sh", b"exit 0")]) for _ in range(1000))
        seen = set()
        async with AsyncClient(server.url, user_id=1) as client:
            async for index, job in client.map(submissions, in_flight=200):
                assert job.info is not None and job.info.is_successful
                seen.add(index)
            found = [info.id async for info in client.find(JobFilter(user_id=1))]
        assert len(found) == 1000
        return len(seen)

    assert await work() == 1000


# --- memory -----------------------------------------------------------------------


async def test_400_megabytes_pass_through_little_memory(
    program: Program, server: Server, tmp_path: Path
) -> None:
    (program.directory / "run.sh").write_text("exit 0\n")
    (program.directory / "small").write_bytes(b"x")
    with open(program.directory / "large", "wb") as file:
        file.truncate(400 * _MB)
    peaks = {}
    for name in ("small", "large"):
        peaks[name] = await _peak(program, "submit", "run.sh", name, "--wait")
        peaks[f"get {name}"] = await _peak(program, "get", "last", "-o", f"out-{name}")
    assert (program.directory / "out-large" / "large").stat().st_size == 400 * _MB
    bound = 32 * 1024 * 1024
    assert peaks["large"] - peaks["small"] < bound, peaks
    assert peaks["get large"] - peaks["get small"] < bound, peaks


async def _peak(program: Program, *arguments: str) -> int:
    """Run a command; returns the most memory that it had, in bytes."""

    def work() -> tuple[int, int]:
        process = program.popen(*arguments)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_maxrss * 1024

    code, peak = await asyncio.to_thread(work)
    assert code == 0
    return peak
