"""How an agent has its jobs run: by supervisors, which its fork server makes.

A supervisor runs one job after the other. It and the agent hold the ends of a socket: one
byte tells that the job runs, another that nothing of it is left, end of file that the
supervisor is gone. So no request can be lost unnoticed, whether the fork server or the
supervisor died before it, in it or after it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from telemetry.logs import event

log = logging.getLogger("orchestrator.launcher")

_APPLICATION = Path(__file__).parents[2]  # from where "agent" can be imported
_CLOSE_SECONDS = 1.0
_ASK_FOR_SUPERVISOR = b"supervisor"  # any byte would do; what counts is the socket with it
_JOB_RUNS, _NOTHING_LEFT = b"1", b"0"  # see starter.py and supervisor.py
_WORD_BYTES = 16  # more than is ever said
_MAX_IDLE = 16  # about 1 MB each; more jobs at a time than that are rarely small ones


@dataclass(frozen=True, slots=True)
class LaunchRequest:
    """What a supervisor is told: ``variables`` are added to what all jobs inherit.

    ``preparation`` is what the launcher's ``preparing`` module is called with, None if there is
    nothing to prepare: with what is ``own`` in a thread that then starts the program, and with
    what is ``lasting``, if anything, in the supervisor itself, which is from then on for jobs with
    the same there. ``memory_bytes`` None means no limit, no ``cores`` all of them.
    ``control_group`` are the paths of the job's group and of the supervisor's own. When a job has
    ended badly, ``settle_seconds`` pass for the supervisor to hear that all processes were told to
    end.
    """

    directory: Path
    variables: Mapping[str, str]
    timeout_seconds: float | None
    grace_seconds: float
    argv: Sequence[str]
    preparation: Mapping[str, object] | None = None
    memory_bytes: int | None = None
    cores: Sequence[int] = ()
    control_group: tuple[str, str] | None = None
    settle_seconds: float = 0.0

    @property
    def lasting(self) -> object:
        """Return what of the preparation stays with the supervisor."""
        return None if self.preparation is None else self.preparation.get("lasting")

    def encode(self) -> bytes:
        """Return the packet that a supervisor understands."""
        order = {
            "directory": str(self.directory),
            "argv": list(self.argv),
            "variables": dict(self.variables),
            "timeout": self.timeout_seconds,
            "grace": self.grace_seconds,
            "preparation": self.preparation,
            "memory": self.memory_bytes,
            "cores": list(self.cores) or None,
            "control_group": self.control_group,
            "settle": self.settle_seconds,
        }
        return json.dumps(order).encode()


class LifeLine:
    """What an agent hears of a job from its supervisor."""

    def __init__(self, on_close: Callable[[], None]) -> None:
        self._on_close = on_close
        self._job_runs = False
        self._is_nothing_left = False
        self._first_word = asyncio.Event()
        self._end = asyncio.Event()

    async def wait_for_start(self) -> bool:
        """Wait until the job runs (True) or it is certain that this supervisor won't run it."""
        await self._first_word.wait()
        return self._job_runs

    async def wait_for_end(self) -> bool:
        """Wait for the end of the job (True) or of its supervisor, which left processes behind."""
        await self._end.wait()
        return self._is_nothing_left

    def has_ended(self) -> bool:
        """Whether the supervisor has nothing more to do with the job."""
        return self._end.is_set()

    def close(self) -> None:
        """Listen no more; the supervisor goes on, and takes no other job."""
        if not self._end.is_set():
            self._on_close()
            self._end.set()

    def hear(self, word: bytes) -> None:
        """Take what the supervisor says; nothing means that it is gone."""
        self._job_runs |= word == _JOB_RUNS
        self._is_nothing_left |= word == _NOTHING_LEFT
        self._first_word.set()
        if self._is_nothing_left or not word:
            self._end.set()


class _Supervisor:
    """The agent's end of the socket to a supervisor."""

    def __init__(self, connection: socket.socket, idle: list[_Supervisor]) -> None:
        """It joins the ``idle`` ones whenever its job has ended, and leaves them if it dies."""
        self.cores: Sequence[int] | None = None
        self.lasting: object = None
        self._connection = connection
        self._idle = idle
        self._life_line: LifeLine | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection, self._on_readable)

    def start(self, packet: bytes, request: LaunchRequest) -> LifeLine:
        """Ask for a job, the one before having ended. Raises :class:`OSError` if it is gone."""
        self._connection.send(packet)
        self.cores, self.lasting = request.cores, request.lasting or self.lasting
        self._life_line = LifeLine(self.close)
        return self._life_line

    def close(self) -> None:
        """Let go of it: it ends when its job has ended."""
        self._loop.remove_reader(self._connection)
        self._connection.close()

    def _on_readable(self) -> None:
        try:
            word = self._connection.recv(_WORD_BYTES)
        except ConnectionResetError:  # it went without having read its request
            word = b""
        if self._life_line is not None:
            self._life_line.hear(word)
        if not word:
            self.close()
            with suppress(ValueError):
                self._idle.remove(self)
        elif self._life_line is not None and self._life_line.has_ended():
            self._life_line = None
            self._rest()

    def _rest(self) -> None:
        if len(self._idle) < _MAX_IDLE:
            self._idle.append(self)
        else:
            self.close()


@dataclass(frozen=True, slots=True)
class _ForkServer:
    process: subprocess.Popen[bytes]
    connection: socket.socket


class Launcher:
    """Has jobs run, and starts the fork server anew whenever it is found dead."""

    def __init__(
        self,
        workdir: Path,
        environment: Mapping[str, str],
        preparing: str | None = None,
        umask: int = -1,
    ) -> None:
        """``environment`` is all that jobs inherit; ``preparing`` the name of a module.

        Its function ``prepare`` takes the ``preparation`` of a :class:`LaunchRequest`. Jobs get
        the ``umask``; -1 is the agent's own.
        """
        self._workdir = workdir
        self._preparing = preparing
        self._umask = umask
        self._environment = dict(environment)
        self._fork_server: _ForkServer | None = None
        self._idle: list[_Supervisor] = []
        self._asking = asyncio.Lock()

    def warm_up(self) -> None:
        """Start the fork server, so that the first job finds it ready."""
        self._living_fork_server()

    async def launch(self, request: LaunchRequest) -> LifeLine:
        """Have a job run. Raises :class:`OSError` if that can't even be asked for."""
        packet = request.encode()
        while True:
            supervisor = self._take_idle(request) or await self._new_supervisor()
            with suppress(ConnectionError):  # it has died a moment ago
                return supervisor.start(packet, request)

    def _take_idle(self, request: LaunchRequest) -> _Supervisor | None:
        """Return an idle supervisor for a job, one that is on its cores already if there is any."""
        # the last one to rest first: its memory is the warmest
        fitting = [idle for idle in reversed(self._idle) if idle.lasting in (None, request.lasting)]
        if not fitting:
            return None
        taken = next((idle for idle in fitting if idle.cores == request.cores), fitting[0])
        self._idle.remove(taken)
        return taken

    def close(self) -> None:
        """End the fork server and the supervisors that have no job; the others go on."""
        while self._idle:
            self._idle.pop().close()
        self._end_fork_server()

    def replace_fork_server(self) -> None:
        """End the fork server, which does not do its work; the next job has another one started.

        What it was asked for and has not made is asked for again, by those who wait for it.
        """
        if self._fork_server is not None:
            pid = self._fork_server.process.pid
            event(log, "fork_server_hangs", level=logging.WARNING, pid=pid)
            self._fork_server.process.kill()
            self._end_fork_server()

    async def _new_supervisor(self) -> _Supervisor:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            with theirs:
                await self._ask_for_supervisor(theirs)
        except BaseException:
            ours.close()
            raise
        return _Supervisor(ours, self._idle)

    async def _ask_for_supervisor(self, theirs: socket.socket) -> None:
        async with self._asking:
            while True:
                connection = self._living_fork_server().connection
                try:
                    socket.send_fds(connection, [_ASK_FOR_SUPERVISOR], [theirs.fileno()])
                    return
                except BlockingIOError:
                    await _writable(connection)
                except ConnectionError:
                    self._end_fork_server()  # it is about to end anyway

    def _end_fork_server(self) -> None:
        if self._fork_server is not None:
            self._fork_server.connection.close()
            with suppress(subprocess.TimeoutExpired):
                self._fork_server.process.wait(_CLOSE_SECONDS)
            self._fork_server = None

    def _living_fork_server(self) -> _ForkServer:
        known = self._fork_server
        if known is not None and known.process.poll() is None:
            return known
        if known is not None:
            event(log, "fork_server_ended", level=logging.WARNING, code=known.process.returncode)
            self._end_fork_server()
        self._fork_server = self._start_fork_server()
        event(log, "fork_server_started", pid=self._fork_server.process.pid)
        return self._fork_server

    def _start_fork_server(self) -> _ForkServer:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            descriptor = theirs.fileno()
            process = subprocess.Popen(
                # -E, -s, -S: variables and packages of the user do not change what it is
                [
                    *(sys.executable, "-E", "-s", "-S", "-m", "agent.supervision.forkserver"),
                    *(str(descriptor), str(self._workdir)),
                    *(() if self._preparing is None else (self._preparing,)),
                ],
                cwd=_APPLICATION,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(descriptor,),
                umask=self._umask,
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
