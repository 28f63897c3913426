"""The processes under test, what they cost, and that nothing is left of them.

A :class:`Stage` is the directory in which one benchmark plays and owns all processes started
there; whoever leaves it, also by Ctrl-C, leaves no process and no file behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.measure import BenchmarkError
from config import AGENT_TOKEN_VARIABLE

PROJECT = Path(__file__).parent.parent

_READY = re.compile(r"ready at (http://\S+)")
_START_SECONDS = 120.0
_STOP_SECONDS = 30.0
_LOG_POLL_SECONDS = 0.01
_LEFTOVER_ROUNDS = 50
_LEFTOVER_PAUSE_SECONDS = 0.02
AGENT_TOKEN = "token-of-the-benchmarks"
IMAGE = "localhost/orchestrator-bench"
"""Of the jobs that run in containers; see container_image.py."""

_SERVICE_SETTINGS = {
    # quotas must not be what limits
    "SERVICE_EXAMPLE_RUNS_PER_USER": "100000",
    "SERVICE_EXAMPLE_MAX_RUNS": "100000",
    # for jobs that are to wait for ever: no agent here offers it
    "SERVICE_PARKED_MAX_RUNS": "100000",
    # the same job with other isolations; "example" has what is the default
    "SERVICE_PLAIN_ISOLATION": "none",
    "SERVICE_BUBBLEWRAP_ISOLATION": "bubblewrap",
    "SERVICE_PODMAN_ISOLATION": "podman",
    "SERVICE_PODMAN_NETWORK": "false",
    "SERVICE_PODMAN_IMAGE": IMAGE,
}


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, all threads, to the nanosecond.

    The clock's number is made as clock_getcpuclockid(3) makes it in glibc: the complement of
    the process id, shifted by 3, and CPUCLOCK_SCHED = 2.
    """
    return time.clock_gettime((~pid << 3) | 2)


def peak_memory(pid: int) -> int:
    """Return the most resident memory that a process ever had, in bytes (VmHWM, proc(5))."""
    return _status_bytes(pid, "VmHWM")


def resident_memory(pid: int) -> int:
    """Return the resident memory of a process now, in bytes (VmRSS, proc(5))."""
    return _status_bytes(pid, "VmRSS")


def _status_bytes(pid: int, name: str) -> int:
    match = re.search(
        rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE
    )
    if match is None:
        raise BenchmarkError(f"process {pid} has ended")
    return int(match[1]) * 1024


class Child:
    """A child process whose output lines are read and whose log is a file; may be restarted."""

    def __init__(self, stage: Stage, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._stage = stage
        self._command = tuple(command)
        self._peak = 0
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, *arguments: str) -> None:
        """Start it; does not wait for it to be of use."""
        # its own session: Ctrl-C is for the benchmark, which then ends what it started
        with open(self.log_path, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                *arguments,
                cwd=PROJECT,
                env={**os.environ, **_SERVICE_SETTINGS, AGENT_TOKEN_VARIABLE: AGENT_TOKEN},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log_path(self) -> Path:
        """Where its standard error goes."""
        return self._stage.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running().pid

    def exit_code(self) -> int | None:
        """Return how it has ended; None while it runs."""
        return self._running().returncode

    def peak_memory(self) -> int:
        """Return the most resident memory that it had, restarts included, in bytes."""
        if self._process is not None and self._process.returncode is None:
            # it may be a zombie already, which has no memory
            with contextlib.suppress(BenchmarkError, FileNotFoundError):
                self._peak = max(self._peak, peak_memory(self._process.pid))
        return self._peak

    async def read_line(self, seconds: float = _START_SECONDS) -> str:
        """Return its next line of output. Raises :class:`BenchmarkError` if none comes in time."""
        stdout = self._running().stdout
        assert stdout is not None
        try:
            line = await asyncio.wait_for(stdout.readline(), seconds)
        except TimeoutError:
            raise self.failure(f"said nothing for {seconds:g} s") from None
        if not line:
            raise self.failure("ended")
        return line.decode()

    async def read_record(self, seconds: float = _START_SECONDS) -> dict[str, Any]:
        """Return its next line of output, which must be a JSON object."""
        record = json.loads(await self.read_line(seconds))
        assert isinstance(record, dict)
        return record

    async def stop(self) -> None:
        """Ask it to stop and wait until it has."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """End it as a crash would."""
        await self._end(signal.SIGKILL)

    def failure(self, what: str) -> BenchmarkError:
        """Return an error about this process that shows the end of its log."""
        end = self.log_path.read_text(errors="replace")[-2000:]
        return BenchmarkError(f"{self.name} {what}; its log ends:\n{end}")

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise BenchmarkError(f"{self.name} was not started")
        return self._process

    async def _end(self, number: int) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        self.peak_memory()
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            process.kill()
            raise self.failure(f"did not end within {_STOP_SECONDS:g} s") from None


class Server(Child):
    """A real server on a free port, without an embedded agent."""

    def __init__(self, stage: Stage, name: str, database: Path) -> None:
        command = (sys.executable, "orchestrator.py", "serve", "--no-agent", "--db", str(database))
        super().__init__(stage, name, command)
        self.database = database
        self.url = ""

    async def start(self, *arguments: str) -> None:
        """Start it, on the port that it had before if it had one; returns when it is ready."""
        port = self.url.rpartition(":")[2] or "0"
        await super().start("--port", port, *arguments)
        match = _READY.search(await self.read_line())
        if match is None:
            raise self.failure("did not say that it is ready")
        self.url = match[1]


class Stage:
    """A directory and the processes that were started for one benchmark."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._children: list[Child] = []

    def new_server(self, name: str = "server", database: Path | None = None) -> Server:
        """Return a server that is still to be started."""
        server = Server(self, name, database or self.directory / f"{name}.db")
        self._children.append(server)
        return server

    async def server(self) -> Server:
        """Start a server on a new database."""
        server = self.new_server()
        await server.start()
        return server

    async def agent(
        self, server: Server, slots: int, name: str = "agent", options: Sequence[str] = ()
    ) -> Child:
        """Start a real agent; returns when it is connected.

        Raises :class:`BenchmarkError` with the end of its log if it ends before, or is too slow.
        """
        command = (
            *(sys.executable, "orchestrator.py", "agent", "--server", server.url, "--name", name),
            *("--slots", str(slots), "--services", "example"),
            *("--workdir", str(self.directory / f"{name}.work"), *options),
        )
        agent = await self._start(Child(self, name, command))
        deadline = time.monotonic() + _START_SECONDS
        while b"event=connected" not in agent.log_path.read_bytes():
            if (code := agent.exit_code()) is not None:
                raise agent.failure(f"ended with exit code {code} before it was connected")
            if time.monotonic() > deadline:
                raise agent.failure("did not connect")
            await asyncio.sleep(_LOG_POLL_SECONDS)
        return agent

    async def program(self, name: str, *arguments: str) -> Child:
        """Start a command of ``orchestrator.py``; does not wait for it to be of use."""
        return await self._start(Child(self, name, (sys.executable, "orchestrator.py", *arguments)))

    async def module(self, module: str, *arguments: str) -> Child:
        """Start a module of this package as a process of its own."""
        name = module.rpartition(".")[2]
        return await self._start(Child(self, name, (sys.executable, "-m", module, *arguments)))

    async def _start(self, child: Child) -> Child:
        self._children.append(child)
        await child.start()
        return child

    async def clear(self) -> None:
        """End all processes, those of jobs included, and remove the directory."""
        for child in reversed(self._children):
            await child.kill()
        for _ in range(_LEFTOVER_ROUNDS):
            left = list(_processes_in(self.directory))
            if not left:
                break
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_LEFTOVER_PAUSE_SECONDS)
        shutil.rmtree(self.directory)


@contextlib.asynccontextmanager
async def stage(directory: Path) -> AsyncIterator[Stage]:
    """Make a stage in a new directory and clear it at the end, whatever the end is."""
    directory.mkdir()
    made = Stage(directory)
    try:
        yield made
    finally:
        await made.clear()


def _processes_in(directory: Path) -> Iterator[int]:
    """Find processes that work in the directory or were started with a path in it."""
    place = os.fsencode(directory)
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is not ours
            cwd = os.fsencode(os.readlink(f"{entry.path}/cwd"))
            command = Path(entry.path, "cmdline").read_bytes()
            if cwd.startswith(place) or place in command:
                yield int(entry.name)
