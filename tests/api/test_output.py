"""What jobs print, live and after: real server, real agents, curl."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from agent.inotify import WriteWatch
from tests.harness import AgentProcess, Answer, Server, curl, eventually, run, running_server
from wire.outbox import Outbox

LIMIT = 300_000
"""MAX_LOG_BYTES of the servers here, so that little output is much."""


@pytest.fixture
async def limited(tmp_path: Path) -> AsyncIterator[Server]:
    environment = {"MAX_LOG_BYTES": str(LIMIT)}
    async with running_server(
        tmp_path / "server", "--slots", "4", environment=environment
    ) as server:
        yield server


async def logs(server: Server, job_id: int, query: str = "") -> Answer:
    return await curl(f"{server.url}/jobs/{job_id}/logs?{query}")


@contextlib.asynccontextmanager
async def followed(
    server: Server, job_id: int, query: str = ""
) -> AsyncIterator[asyncio.StreamReader]:
    """Follow with curl; what it prints can be read as it comes."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sSN", f"{server.url}/jobs/{job_id}/logs?follow=1&{query}"),
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_lines_come_while_the_job_runs_and_the_answer_ends_with_it(
    server: Server, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = f'echo first; echo wrong >&2; until [ -e "{go}" ]; do sleep 0.05; done; echo last'
    job_id = await server.upload(script)
    async with followed(server, job_id) as out, followed(server, job_id, "stream=stderr") as err:
        assert await asyncio.wait_for(out.readline(), 60) == b"first\n"
        assert await asyncio.wait_for(err.readline(), 60) == b"wrong\n"
        await server.wait(job_id, "Running")
        running = await logs(server, job_id)
        go.touch()
        assert await asyncio.wait_for(out.read(), 60) == b"last\n"
        assert await asyncio.wait_for(err.read(), 60) == b""
    assert running.body == b"first\n"
    await server.wait(job_id, "Completed")
    assert (await logs(server, job_id)).body == b"first\nlast\n"


async def test_no_line_waits_for_the_next_one(server: Server, tmp_path: Path) -> None:
    job_id = await server.upload(
        f'for i in 1 2 3 4; do echo $i; until [ -e "{tmp_path}/go-$i" ]; do sleep 0.05; done; done'
    )
    async with followed(server, job_id) as out:
        for number in range(1, 5):
            assert await asyncio.wait_for(out.readline(), 60) == b"%d\n" % number
            (tmp_path / f"go-{number}").touch()
        assert await asyncio.wait_for(out.read(), 60) == b""


async def test_what_is_asked_wrongly_or_is_not_there_is_said(server: Server) -> None:
    job_id = await server.upload("printf 0123456789")
    await server.wait(job_id, "Completed")
    for query, status in {
        "stream=both": 400,
        "follow=yes": 400,
        "offset=-1": 400,
        "offset=x": 400,
    }.items():
        answer = await logs(server, job_id, query)
        assert (answer.status, answer.json()["status"]) == (status, "Unknown"), query
    assert (await logs(server, 99)).status == 404
    head = await curl("-I", f"{server.url}/jobs/{job_id}/logs")
    assert b"X-Next-Offset: 10\r\n" in head.body
    assert b"Content-Type: text/plain; charset=utf-8\r\n" in head.body
    for query, body in {"offset=7": b"789", "offset=10": b"", "offset=99": b""}.items():
        assert (await logs(server, job_id, query)).body == body
        assert (await logs(server, job_id, f"follow=1&{query}")).body == body
    # nothing was printed there, so nothing was stored
    assert (await logs(server, job_id, "stream=stderr")).body == b""
    assert server.query("SELECT count(*) FROM output WHERE stream <> 2") == [(0,)]


async def test_a_job_that_waits_is_followed_once_it_runs_one_that_never_ran_is_empty(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    job_id = await bare_server.upload("echo late")
    killed = await bare_server.upload("echo never")
    assert (await logs(bare_server, job_id)).body == b""
    await curl("-X", "POST", f"{bare_server.url}/terminate/{killed}")
    assert await logs(bare_server, killed, "follow=1") == Answer(200, b"")
    async with followed(bare_server, job_id) as out:
        await new_agent("one").start()
        assert await asyncio.wait_for(out.read(), 20) == b"late\n"


async def test_of_much_output_the_start_and_the_end_are_kept_as_in_the_result(
    limited: Server,
) -> None:
    # slow enough to be followed while it runs, fast enough to be too much
    script = (
        "for i in $(seq 30); do seq $((i * 10000)) $((i * 10000 + 9999)); sleep 0.05; done;"
        " echo the end; seq 1000 >&2"
    )
    job_id = await limited.upload(script)
    async with followed(limited, job_id) as out:
        live = await asyncio.wait_for(out.read(), 30)
    whole = b"".join(b"%d\n" % i for i in range(10_000, 310_000)) + b"the end\n"
    result = await limited.result(job_id)
    kept = (await logs(limited, job_id)).body
    assert kept == result.read("stdout.log")
    half = LIMIT // 2
    mark = b"\n[... %d bytes left out ...]\n" % (len(whole) - LIMIT)
    assert kept == whole[:half] + mark + whole[-half:]
    assert (await logs(limited, job_id, "stream=stderr")).body == result.read("stderr.log")
    # a follower saw the start, the end, and some of what is between
    assert live.startswith(whole[:half])
    assert live.endswith(whole[-half:]) or live.endswith(whole[-60_000:])
    assert (await logs(limited, job_id, f"offset={len(whole) - 8}")).body == b"the end\n"
    stored = limited.query("SELECT sum(length(data)) FROM output WHERE stream = 2")[0][0]
    assert stored == LIMIT
    assert limited.query("SELECT count(*) FROM output WHERE stream > 3") == [(0,)]


async def test_the_latest_of_much_output_is_there_while_the_job_runs(limited: Server) -> None:
    job_id = await limited.upload("seq 200000; echo so far; sleep 60")
    async with followed(limited, job_id) as out:
        await asyncio.wait_for(out.readuntil(b"so far\n"), 20)
    answer = await logs(limited, job_id)
    assert answer.body.startswith(b"1\n2\n3\n")
    assert answer.body.endswith(b"so far\n")
    assert answer.body.count(b"bytes left out ...]\n") == 1
    await curl("-X", "POST", f"{limited.url}/terminate/{job_id}")
    assert (await logs(limited, job_id)).body.endswith(b"so far\n")


async def test_nothing_is_lost_or_repeated_when_agent_and_server_are_killed(
    bare_server: Server, new_agent: Callable[[str], AgentProcess], tmp_path: Path
) -> None:
    go = tmp_path / "go"
    script = (
        f'for i in 1 2 3 4 5 6; do seq $i $((i + 20000)); until [ -e "{go}.$i" ];'
        " do sleep 0.05; done; done"
    )
    agent = new_agent("one")
    await agent.start()
    job_id = await bare_server.upload(script)

    async def has_stored(step: int) -> None:
        size = sum(len(f"{n}\n") for i in range(1, step + 1) for n in range(i, i + 20001))

        def is_there() -> bool:
            sql = "SELECT coalesce(sum(length(data)), 0) FROM output"
            return bool(bare_server.query(sql) == [(size,)])

        await eventually(is_there, f"the output of step {step} is stored")

    await has_stored(1)
    await agent.kill()
    Path(f"{go}.1").touch()
    await agent.start()
    await has_stored(2)
    await bare_server.kill()
    Path(f"{go}.2").touch()
    await bare_server.start("--no-agent")
    await has_stored(3)
    for step in (3, 4, 5):
        Path(f"{go}.{step}").touch()
    await has_stored(6)
    await agent.kill()
    Path(f"{go}.6").touch()
    await agent.start()
    result = await bare_server.result(job_id)
    assert (await logs(bare_server, job_id)).body == result.read("stdout.log")


@pytest.mark.lease(3)
async def test_an_attempt_that_is_lost_takes_its_output_along(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    first, second = new_agent("one"), new_agent("two")
    await first.start()
    script = 'echo "attempt $ORCHESTRATOR_ATTEMPT"; [ $ORCHESTRATOR_ATTEMPT = 2 ] || sleep 60'
    job_id = await bare_server.upload(script)
    async with followed(bare_server, job_id) as out:
        assert await asyncio.wait_for(out.readline(), 60) == b"attempt 1\n"
        await first.kill()
        await second.start()
        rest = await asyncio.wait_for(out.read(), 20)
    assert rest == b"\n[... attempt 2 ...]\nattempt 2\n"
    assert (await logs(bare_server, job_id)).body == b"attempt 2\n"
    await eventually(
        lambda: len(bare_server.query("SELECT DISTINCT attempt_id FROM output")) == 1,
        "the output of the first attempt is erased",
    )


async def test_retention_removes_the_output(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", environment={"MAX_AGE": "1"}) as server:
        job_id = await server.upload("echo gone soon")
        await eventually(
            lambda: server.query("SELECT state FROM job") == [("Cleaned",)], "retention came"
        )
        answer = await logs(server, job_id)
        assert (answer.status, answer.json()["status"]) == (409, "Unknown")
        assert "retention" in answer.json()["message"]
        await eventually(
            lambda: server.query("SELECT count(*) FROM output") == [(0,)], "it is erased"
        )


async def test_followers_end_when_the_server_stops_and_do_not_think_that_it_is_the_end(
    server: Server,
) -> None:
    job_id = await server.upload("echo one; sleep 1000")
    await server.wait(job_id, "Running")
    follower = asyncio.create_task(run("curl", "-sSN", f"{server.url}/jobs/{job_id}/logs?follow=1"))
    await eventually(lambda: server.query("SELECT count(*) FROM output") == [(1,)], "one line")
    await server.stop()
    code, output = await asyncio.wait_for(follower, 60)
    assert output.startswith(b"one\n")
    assert code != 0


async def test_a_slow_follower_misses_nothing_and_holds_nobody_up(server: Server) -> None:
    job_id = await server.upload("for i in $(seq 8); do head -c 700000 /dev/zero; sleep 0.3; done")
    code, output = await run(
        "curl", "-sSN", "--limit-rate", "1500k", f"{server.url}/jobs/{job_id}/logs?follow=1"
    )
    assert (code, output == bytes(5_600_000)) == (0, True)


# --- parts ------------------------------------------------------------------------


async def test_a_watched_file_is_told_of_once_and_an_unwatched_one_in_a_second(
    tmp_path: Path,
) -> None:
    watch, written = WriteWatch(), asyncio.Event()
    file = tmp_path / "file"
    file.touch()
    watch.arm(file, written)
    file.write_bytes(b"1")
    await asyncio.wait_for(written.wait(), 20)
    written.clear()
    watch.arm(file, written)
    watch.disarm(written)
    watch.arm(tmp_path / "none", written)
    began = time.monotonic()
    await asyncio.wait_for(written.wait(), 20)
    assert time.monotonic() - began > 0.5
    watch.close()


async def test_a_transfer_that_grows_leaves_out_its_gap_and_ends_where_its_source_does() -> None:
    sent: list[bytes] = []
    content = b"0123456789"

    class Socket:
        async def send_str(self, data: str) -> None: ...

        async def send_bytes(self, data: bytes) -> None:
            sent.append(data[16:])

        def get_extra_info(self, name: str) -> None: ...

    async def source(offset: int) -> bytes:
        return content[offset : offset + 3]

    outbox, done = Outbox(), asyncio.Event()
    task = asyncio.create_task(outbox.run(Socket()))
    outbox.extend(16, source, 0, 2)
    while not sent:
        await asyncio.sleep(0)
    outbox.extend(16, source, 2, 20, range(4, 7), done.set)
    await asyncio.wait_for(done.wait(), 20)
    assert sent == [b"01", b"23", b"789"]
    assert outbox.position(16) == 10
    outbox.acknowledge(16, 10)
    assert outbox.position(16) is None
    task.cancel()
