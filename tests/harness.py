"""Real processes for tests: the server, agents, curl."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import sqlite3
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from config import AGENT_TOKEN_VARIABLE

PROJECT = Path(__file__).parent.parent
FINAL = {"Completed", "Failed", "Invalid", "Killed", "Cleaned"}
POLL_SECONDS = 0.02
# Jobs of tests write marks where the test looks for them, and attack what is around them. What
# keeps them from that has tests of its own, tests/agent/test_isolation.py.
_WITHOUT_ISOLATION = {"ISOLATION": "none"}
_READY = re.compile(r"ready at (http://\S+)")


async def eventually(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fails the test at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Answer:
    """What curl got."""

    status: int
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


async def run(*command: str, cwd: Path | None = None, stdin: bytes = b"") -> tuple[int, bytes]:
    """Run a command; returns its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, output


async def curl(*arguments: str, cwd: Path | None = None) -> Answer:
    """Run curl as a user would; fails the test if it gets no answer."""
    code, output = await run("curl", "-sS", "-o", "-", "-w", "\n%{http_code}", *arguments, cwd=cwd)
    assert code == 0, output
    body, _, status = output.rpartition(b"\n")
    return Answer(int(status), body)


class Server:
    """An orchestrator process with its own directory; may be killed and started again."""

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        self.directory = directory
        self.database = directory / "orchestrator.db"
        self.url = ""
        self.through: tuple[str, ...] = ()  # what to put before the program, to sabotage it
        self.prefix: tuple[str, ...] = ()  # what to put before Python, to be somebody else
        self.environment = {**os.environ, **_WITHOUT_ISOLATION, **environment}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *arguments: str) -> None:
        """Start it on a free port, or on the one it had before; returns when it is ready."""
        await self.launch(*arguments)
        assert self._process is not None
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        match = _READY.search(line.decode())
        assert match, self.log()
        self.url = match[1]

    async def launch(self, *arguments: str) -> None:
        """Start it, which may end before it is ready."""
        port = self.url.rpartition(":")[2] or "0"
        with open(self.directory / "server.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*self.prefix, sys.executable, *self.through, str(PROJECT / "orchestrator.py")),
                *("serve", "--port", port, *arguments),
                cwd=self.directory,
                env=self.environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """Return all that the server and its agent have logged."""
        return (self.directory / "server.log").read_text()

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; returns its exit code. Fails the test after ten seconds."""
        assert self._process is not None
        self._process.send_signal(number)
        return await asyncio.wait_for(self._process.wait(), 60)

    async def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.returncode is not None

    async def wait_ended(self, seconds: float = 60) -> int:
        """Wait until it ends by itself; returns its exit code, negative for a signal."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), seconds)

    async def check(self) -> None:
        """Fail the test if ``orchestrator.py check`` finds damage in the database."""
        code, output = await run(
            sys.executable, str(PROJECT / "orchestrator.py"), "check", str(self.database)
        )
        assert code == 0, output.decode()

    async def clean_up(self) -> None:
        """End what a test left: the server, and every process of its jobs and agents."""
        if self._process is not None and self._process.returncode is None:
            await self.kill()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Return all processes that work in the directory, jobs included."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # a name longer than PATH_MAX, say
                words = [*process.cmdline(), *process.environ().values(), process.cwd()]
                if process.pid != os.getpid() and any(str(self.directory) in w for w in words):
                    found.append(process)
        return found

    async def agent_pid(self) -> int:
        """Wait for the embedded agent; returns its process id."""
        found: list[int] = []

        def is_there() -> bool:
            for process in psutil.Process(self.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "--embedded" in process.cmdline():
                        found.append(process.pid)
            return bool(found)

        await eventually(is_there, "the server has its agent")
        return found[0]

    async def upload(
        self,
        script: str,
        files: Mapping[str, bytes] | None = None,
        user: int = 1,
        service: str = "example",
    ) -> int:
        """Submit a job with curl; returns its id."""
        folder = Path(tempfile.mkdtemp(prefix="upload-", dir=self.directory))
        arguments = []
        for name, content in {"run.sh": script.encode(), **(files or {})}.items():
            (folder / name).write_bytes(content)
            arguments += ["-F", f"file=@{name}"]
        answer = await curl(
            *(f"{self.url}/upload", *arguments),
            *("-F", f"user_id={user}", "-F", f"service={service}"),
            cwd=folder,
        )
        assert answer.status == 201, answer
        return int(answer.json()["id"])

    async def download(self, job_id: int) -> Answer:
        """Ask for a job once."""
        return await curl(f"{self.url}/download/{job_id}")

    async def status(self, job_id: int) -> dict[str, Any]:
        """Return a job's status; for a completed one as the ZIP implies it."""
        answer = await self.download(job_id)
        if answer.body.startswith(b"PK"):
            return {"id": job_id, "status": "Completed", "message": ""}
        return answer.json()

    async def wait(self, job_id: int, *states: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a job is in one of the states (default: any final one)."""
        wanted = set(states) or FINAL
        # asked of the file: a curl for each look would be most of a test's load
        sql = "SELECT state FROM job WHERE id = ?"
        deadline = time.monotonic() + seconds
        while not (seen := {row[0] for row in self.query(sql, job_id)}) & (wanted | FINAL):
            assert time.monotonic() < deadline, (seen, self.log()[-3000:])
            await asyncio.sleep(POLL_SECONDS)
        status = await self.status(job_id)
        assert status["status"] in wanted or not states, status
        return status

    async def result(self, job_id: int, seconds: float = 60) -> zipfile.ZipFile:
        """Wait for a job to complete; returns its ZIP, checked."""
        await self.wait(job_id, "Completed", seconds=seconds)
        archive = zipfile.ZipFile(io.BytesIO((await self.download(job_id)).body))
        assert archive.testzip() is None
        return archive

    def stored_result(self, job_id: int) -> zipfile.ZipFile:
        """Return the ZIP that is stored for a job, whatever its state; an empty one for none."""
        sql = (
            "SELECT data FROM chunk JOIN attempt ON chunk.id >> 20 = result_blob"
            " JOIN job ON job.attempt_id = attempt.id WHERE job.id = ? ORDER BY chunk.id"
        )
        content = b"".join(row[0] for row in self.query(sql, job_id))
        archive = zipfile.ZipFile(io.BytesIO(content), "r" if content else "w")
        assert archive.testzip() is None
        return archive

    def query(self, sql: str, *parameters: object) -> list[Any]:
        """Read the database from outside."""
        with contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as db:
            return db.execute(sql, parameters).fetchall()

    def change(self, sql: str) -> None:
        """Change the database from outside, as nobody should."""
        with contextlib.closing(sqlite3.connect(self.database)) as db, db:
            db.execute(sql)

    def agent_token(self) -> str:
        """Return what agents must present."""
        known = self.environment.get(AGENT_TOKEN_VARIABLE)
        return known or str(self.query("SELECT value FROM setting WHERE name='agent_token'")[0][0])

    def agent_headers(self) -> dict[str, str]:
        """Return what an agent presents when it opens its WebSocket."""
        return {"Authorization": f"Bearer {self.agent_token()}"}

    def transitions(self, job_id: int) -> list[str]:
        """Return the states that a job went through."""
        rows = self.query("SELECT to_state FROM history WHERE job_id = ? ORDER BY id", job_id)
        return [row[0] for row in rows]


class AgentProcess:
    """A stand-alone agent process."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.workdir = server.directory / f"agent-{name}"
        self.through: tuple[str, ...] = ()
        self.prefix: tuple[str, ...] = ()
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Start it, with the server's token unless another is given; does not wait for more."""
        environment = {AGENT_TOKEN_VARIABLE: self.server.agent_token(), **(environment or {})}
        if self.through:
            # an agent that finds it in its environment starts anew without it, and without this
            token = self.server.directory / f"agent-{self.name}.token"
            token.write_text(environment.pop(AGENT_TOKEN_VARIABLE))
            arguments = (*arguments, "--token-file", str(token))
        with open(self.server.directory / f"agent-{self.name}.log", "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(*self.prefix, sys.executable, *self.through, str(PROJECT / "orchestrator.py")),
                *("agent", "--server", self.server.url, "--name", self.name),
                *("--workdir", str(self.workdir), "--isolation", "none", *arguments),
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )

    def attempt(self, attempt_id: int) -> Path:
        """Return the directory of an attempt."""
        return attempt_directory(self.workdir, attempt_id)

    def log(self) -> str:
        """Return what it has logged."""
        return (self.server.directory / f"agent-{self.name}.log").read_text()

    async def wait_connected(self) -> None:
        """Wait for the server's welcome."""
        await eventually(lambda: "event=connected" in self.log(), f"agent {self.name} connected")

    def send(self, number: int) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    async def kill(self) -> None:
        """End it as a crash would."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def running_server(
    directory: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Server]:
    """Start a server for a test and leave nothing of it behind."""
    directory.mkdir(parents=True, exist_ok=True)
    server = Server(directory, environment or {})
    try:
        await server.start(*arguments)
        yield server
    finally:
        await server.clean_up()


def attempt_directory(workdir: Path, attempt_id: int) -> Path:
    """Return where an agent with this work directory has an attempt, or would have it."""
    attempts = workdir / "attempts"
    return next(attempts.glob(f"{attempt_id}.*"), attempts / str(attempt_id))


def lines(path: Path) -> list[str]:
    """Return the lines of a file that may not be there yet."""
    return path.read_text().splitlines() if path.exists() else []
