"""Jobs that no one would write on purpose: each ends in a clear state and leaves nothing."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.harness import FINAL, Server, attempt_directory, eventually, running_server

_MIB = 1024 * 1024


@dataclass(frozen=True)
class OddJob:
    """A script, how it must end, a part of its message, and what its ZIP must (not) hold."""

    script: str
    state: str = "Completed"
    message: str = ""
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a job ended, and the ZIP that is stored for it, whatever its state."""

    state: str
    message: str
    archive: zipfile.ZipFile = field(repr=False)


def in_python(code: str) -> str:
    return f"python3 - <<'END'\nimport os\n{code}\nEND\n"


ODD_JOBS = {
    "a tree deeper than PATH_MAX and than Python's recursion": OddJob(
        in_python('for i in range(1500): os.mkdir("dir"); os.chdir("dir")\nopen("bottom", "w")'),
        holds=("dir/" * 1500 + "bottom",),
    ),
    "a tree deeper than ZIP can name": OddJob(
        in_python('for i in range(300): os.mkdir("d" * 250); os.chdir("d" * 250)'),
        message="39 files or directories could not be put into the result",
        holds=("run.sh",),
    ),
    "many files": OddJob("seq 3000 | xargs touch", holds=("3000",)),
    "removes its directory": OddJob('rm -rf "$PWD"; echo gone', holds=("stdout.log",)),
    "puts a link in the place of its directory": OddJob(
        "cd ..; mv job moved; ln -s /etc job", holds=("stdout.log",), lacks=("passwd", "hostname")
    ),
    "removes all of its attempt": OddJob('rm -rf "$(dirname "$PWD")"', "Failed", "given up"),
    "no rights": OddJob("mkdir -p a/b; touch a/b/c; chmod 000 a/b/c a/b a", holds=("a/b/c",)),
    "a sparse file": OddJob("truncate -s 50M sparse", holds=("sparse",)),
    "links, fifos and sockets": OddJob(
        "ln -s /etc/shadow shadow; ln -s . self; mkfifo fifo\n"
        + in_python('import socket; socket.socket(socket.AF_UNIX).bind("socket")'),
        holds=("shadow", "self"),
        lacks=("fifo", "socket"),
    ),
    "names that are not UTF-8": OddJob(
        "touch \"$(printf 'raw\\377')\" \"$(printf 'new\\nline')\"", holds=("raw\\xff", "new\nline")
    ),
    "empties its own log": OddJob(
        "echo before; : > ../stdout.log; echo after", holds=("stdout.log",)
    ),
    "puts a fifo in the place of its log": OddJob(
        "rm ../stdout.log; mkfifo ../stdout.log", holds=("stderr.log",), lacks=("stdout.log",)
    ),
    "puts a link in the place of its log": OddJob(
        "ln -sf /etc/hostname ../stderr.log", holds=("stdout.log",), lacks=("stderr.log",)
    ),
    "closes its output": OddJob("exec >&- 2>&-; touch done", holds=("done",)),
    "CRLF": OddJob("exit 3\r\n", "Failed", "exit code 2", ("run.sh",)),
    "binary": OddJob("\x7fELF\x00\x01\x02", "Failed", "exit code", ("run.sh",)),
    "empty": OddJob("", holds=("run.sh", "stdout.log")),
    "no last newline": OddJob("echo x > y", holds=("y",)),
}

_LIMITS = {
    "MAX_RESULT_BYTES": "1000000",
    "MAX_RESULT_FILES": "200",
    "MAX_LOG_BYTES": "5000",
}

OVER_THE_LIMITS = {
    "too many bytes": OddJob(
        "echo said; head -c 1000001 /dev/urandom > big",
        "Failed",
        "more than the limit of 1000000 (MAX_RESULT_BYTES)",
        ("stdout.log",),
        ("big", "run.sh"),
    ),
    "a sparse file of an exabyte": OddJob(
        "truncate -s 1000P big || truncate -s 1T big", "Failed", "MAX_RESULT_BYTES"
    ),
    "too many files": OddJob(
        "seq 500 | xargs touch", "Failed", "more than 200 files", ("stdout.log",), ("1",)
    ),
    "too many bytes and a failure": OddJob(
        "truncate -s 2M big; exit 9", "Failed", "run.sh ended with exit code 9; the files that"
    ),
    "much output": OddJob("seq 100000; seq 7 >&2", holds=("stdout.log", "stderr.log")),
    "much output at full speed": OddJob("yes | head -c 300000000", holds=("stdout.log",)),
}


async def run_all(server: Server, jobs: dict[str, OddJob]) -> dict[str, Outcome]:
    """Run all jobs at the same time; returns how they ended."""
    ids = {}
    for user, (name, job) in enumerate(jobs.items()):
        ids[name] = await server.upload(job.script, user=user)
    ended = f"SELECT count(*) FROM job WHERE state IN {tuple(FINAL)}"
    await eventually(lambda: server.query(ended) == [(len(jobs),)], "all end", seconds=60)
    return {name: _outcome(server, job_id) for name, job_id in ids.items()}


def _outcome(server: Server, job_id: int) -> Outcome:
    state, message = server.query("SELECT state, message FROM job WHERE id = ?", job_id)[0]
    return Outcome(state, message, server.stored_result(job_id))


def assert_as_expected(jobs: dict[str, OddJob], outcomes: dict[str, Outcome]) -> None:
    wrong = []
    for name, job in jobs.items():
        outcome = outcomes[name]
        names = set(outcome.archive.namelist())
        if (
            outcome.state != job.state
            or job.message not in outcome.message
            or not set(job.holds) <= names
            or set(job.lacks) & names
        ):
            wrong.append((name, outcome, sorted(name[-40:] for name in names)[:20]))
    assert not wrong


async def assert_nothing_is_left(server: Server) -> None:
    attempts = server.directory / "orchestrator.db.agent" / "attempts"
    await eventually(lambda: os.listdir(attempts) == [], "directories are removed")
    assert "embedded_agent_ended" not in server.log()
    assert not [p for p in server.processes() if p.name() in ("bash", "sleep", "yes")]


async def test_odd_jobs_end_like_any_other(server: Server) -> None:
    outcomes = await run_all(server, ODD_JOBS)
    assert_as_expected(ODD_JOBS, outcomes)
    archive = outcomes["empties its own log"].archive
    assert archive.read("stdout.log") == b"after\n"
    await assert_nothing_is_left(server)


async def test_what_is_over_a_limit_is_said_and_its_logs_are_kept(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", environment=_LIMITS) as server:
        outcomes = await run_all(server, OVER_THE_LIMITS)
        assert_as_expected(OVER_THE_LIMITS, outcomes)
        assert outcomes["too many bytes"].archive.read("stdout.log") == b"said\n"
        whole = b"".join(b"%d\n" % number for number in range(1, 100_001))
        kept = outcomes["much output"].archive
        marker = b"\n[... %d bytes left out ...]\n" % (len(whole) - 5000)
        assert kept.read("stdout.log") == whole[:2500] + marker + whole[-2500:]
        assert kept.read("stderr.log") == b"1\n2\n3\n4\n5\n6\n7\n"
        await assert_nothing_is_left(server)


async def test_output_past_the_limit_takes_no_space_on_the_agents_disk(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", environment=_LIMITS) as server:
        job_id = await server.upload("yes | head -c 100000000; sleep 1000")
        await server.wait(job_id, "Running")
        workdir = server.directory / "orchestrator.db.agent"
        log = attempt_directory(workdir, 1) / "stdout.log"
        await eventually(lambda: log.stat().st_size == 100_000_000, "all is written")
        await eventually(lambda: log.stat().st_blocks * 512 < 2 * _MIB, "the middle is given back")


@pytest.mark.soak
async def test_two_gigabytes_of_output_and_a_million_files(tmp_path: Path) -> None:
    jobs = {
        "much output": OddJob("yes 0123456789 | head -c 2000000000", holds=("stdout.log",)),
        "many files": OddJob(
            in_python('for i in range(999_990): open(f"file-{i}", "w").close()'), holds=("file-7",)
        ),
        "too many files": OddJob(
            in_python('for i in range(1_000_001): open(f"file-{i}", "w").close()'),
            "Failed",
            "more than 1000000 files",
        ),
    }
    async with running_server(tmp_path / "server", "--slots", "1") as server:
        await server.result(await server.upload("true"))
        agent = psutil.Process(await server.agent_pid())
        before = agent.memory_info().rss
        peak = 0

        def look() -> bool:
            nonlocal peak
            peak = max(peak, agent.memory_info().rss)
            sql = f"SELECT count(*) FROM job WHERE state IN {tuple(FINAL)}"
            return server.query(sql) == [(len(jobs) + 1,)]

        ids = [await server.upload(job.script) for job in jobs.values()]
        await eventually(look, "all end", seconds=900)
        outcomes = {name: _outcome(server, job_id) for name, job_id in zip(jobs, ids, strict=True)}
        assert_as_expected(jobs, outcomes)
        await eventually(
            lambda: os.listdir(server.directory / "orchestrator.db.agent" / "attempts") == [],
            "directories are removed",
            seconds=300,
        )
        print(f"agent: {before >> 20} MiB before, {peak >> 20} MiB at most")  # noqa: T201
        assert peak - before < 32 * _MIB


@pytest.mark.parametrize("variable", ["LC_ALL", "LANG"])
async def test_names_that_are_not_ascii_come_through_whatever_the_locale(
    tmp_path: Path, variable: str
) -> None:
    environment = {"LC_ALL": "", "LC_CTYPE": "", "LANG": "", variable: "POSIX"}
    async with running_server(tmp_path / "server", environment=environment) as server:
        script = "cat 'Größe 中.txt' > 'Ausgabe ß.txt'; echo \"$ORCHESTRATOR_SERVICE\""
        job_id = await server.upload(script, {"Größe 中.txt": "Inhalt ü".encode()})
        archive = await server.result(job_id)
        assert archive.read("Größe 中.txt") == archive.read("Ausgabe ß.txt") == "Inhalt ü".encode()
