"""How an agent starts supervisors: through its fork server, which it keeps running.

A supervisor holds the write end of a pipe, its *life line*, for as long as it lives: one
byte tells that the job runs, another that nothing of it is left, end of file that the
supervisor is gone. So no request can be lost unnoticed, whether the fork server died before
it, in it or after it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("orchestrator.launcher")

_FORK_SERVER = Path(__file__).with_name("forkserver.py")
_CLOSE_SECONDS = 1.0
_JOB_RUNS, _NOTHING_LEFT = b"1", b"0"  # see supervisor.py
_WORDS_BYTES = 16  # more than is ever said


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What a supervisor is told: ``variables`` are added to what all jobs inherit."""

    directory: Path
    variables: Mapping[str, str]
    timeout_seconds: float | None
    grace_seconds: float

    def encode(self) -> bytes:
        """Return the packet that the fork server understands."""
        fields = [str(self.directory), dict(self.variables)]
        return json.dumps([*fields, self.timeout_seconds, self.grace_seconds]).encode()


class LifeLine:
    """The agent's end of a supervisor's life line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._job_runs = False
        self._nothing_left = False
        self._first_word = asyncio.Event()
        self._end = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(descriptor, self._on_readable)

    async def job_runs(self) -> bool:
        """Wait until the job runs (True) or it is certain that this supervisor won't run it."""
        await self._first_word.wait()
        return self._job_runs

    async def nothing_left(self) -> bool:
        """Wait for the end of the job (True) or of its supervisor, which left processes behind."""
        await self._end.wait()
        return self._nothing_left

    def close(self) -> None:
        """Listen no more; the supervisor goes on."""
        if not self._end.is_set():
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._end.set()

    def _on_readable(self) -> None:
        words = os.read(self._descriptor, _WORDS_BYTES)
        self._job_runs |= _JOB_RUNS in words
        self._nothing_left |= _NOTHING_LEFT in words
        if self._nothing_left or not words:
            self.close()
        self._first_word.set()


@dataclass(frozen=True, slots=True)
class _ForkServer:
    process: subprocess.Popen[bytes]
    connection: socket.socket


class Launcher:
    """Starts supervisors, and the fork server anew whenever it is found dead."""

    def __init__(self, workdir: Path, environment: Mapping[str, str]) -> None:
        """``environment`` is all that jobs inherit."""
        self._workdir = workdir
        self._environment = dict(environment)
        self._fork_server: _ForkServer | None = None
        self._sending = asyncio.Lock()

    def warm_up(self) -> None:
        """Start the fork server, so that the first job finds it ready."""
        self._living_fork_server()

    async def launch(self, request: LaunchRequest) -> LifeLine:
        """Have a supervisor started. Raises :class:`OSError` if the request can't be sent."""
        receiving, sending = os.pipe()
        try:
            await self._send(request.encode(), sending)
        except BaseException:
            os.close(receiving)
            raise
        finally:
            os.close(sending)
        return LifeLine(receiving)

    def close(self) -> None:
        """End the fork server; supervisors go on."""
        if self._fork_server is not None:
            self._fork_server.connection.close()
            with suppress(subprocess.TimeoutExpired):
                self._fork_server.process.wait(_CLOSE_SECONDS)
            self._fork_server = None

    async def _send(self, packet: bytes, life_line: int) -> None:
        async with self._sending:
            while True:
                connection = self._living_fork_server().connection
                try:
                    socket.send_fds(connection, [packet], [life_line])
                    return
                except BlockingIOError:
                    await _writable(connection)
                except ConnectionError:
                    self.close()  # it is about to end anyway

    def _living_fork_server(self) -> _ForkServer:
        known = self._fork_server
        if known is not None and known.process.poll() is None:
            return known
        if known is not None:
            log.warning("event=fork_server_ended code=%d", known.process.returncode)
            self.close()
        self._fork_server = self._start_fork_server()
        log.info("event=fork_server_started pid=%d", self._fork_server.process.pid)
        return self._fork_server

    def _start_fork_server(self) -> _ForkServer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                # -E, -s, -S: variables and packages of the user do not change what it is
                [sys.executable, "-E", "-s", "-S", str(_FORK_SERVER), str(descriptor)],
                cwd=self._workdir,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(descriptor,),
                # Ctrl-C in a terminal is for the agent
                start_new_session=True,
            )
        ours.setblocking(False)
        return _ForkServer(process, ours)


async def _writable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    is_writable = asyncio.Event()
    loop.add_writer(connection, is_writable.set)
    try:
        await is_writable.wait()
    finally:
        loop.remove_writer(connection)
