"""The command line as users start it: as a process, through pipes or on a pseudo-terminal."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.harness import PROJECT

_SECONDS = 60.0
_PROGRAM = (sys.executable, str(PROJECT / "orchestrator.py"))


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    error: str


def environment_of(home: Path, url: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment in which no setting of the machine's user counts."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ORCHESTRATOR_", "XDG_")) and name not in ("NO_COLOR", "COLUMNS")
    }
    return {
        **kept,
        "HOME": str(home),
        "ORCHESTRATOR_URL": url,
        "ORCHESTRATOR_USER": "1",
        "TERM": "xterm-256color",
        **(more or {}),
    }


class Program:
    """Runs commands against one server, in one directory."""

    def __init__(self, url: str, directory: Path) -> None:
        self.directory = directory
        self.url = url
        self.environment = environment_of(directory, url)

    async def run(
        self,
        *arguments: str,
        stdin: bytes = b"",
        environment: Mapping[str, str] | None = None,
        seconds: float = _SECONDS,
    ) -> Done:
        """Run a command through pipes."""
        process = await self.start(*arguments, environment=environment)
        out, error = await asyncio.wait_for(process.communicate(stdin), seconds)
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), error.decode())

    async def start(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        """Start a command with pipes."""
        return await asyncio.create_subprocess_exec(
            *_PROGRAM,
            *arguments,
            cwd=self.directory,
            env={**self.environment, **(environment or {})},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    def popen(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command without a loop, for who waits for it by its process id."""
        return subprocess.Popen(
            (*_PROGRAM, *arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    async def ids(self, *arguments: str) -> list[int]:
        """Run a command that prints ids, and must succeed."""
        done = await self.run(*arguments)
        assert done.code == 0, done
        return [int(word) for word in done.out.split()]

    async def on_terminal(
        self,
        *arguments: str,
        columns: int = 80,
        environment: Mapping[str, str] | None = None,
    ) -> Terminal:
        """Start a command on a pseudo-terminal."""
        terminal = Terminal(columns)
        await terminal.start(
            (*_PROGRAM, *arguments), self.directory, {**self.environment, **(environment or {})}
        )
        return terminal


class Terminal:
    """A pseudo-terminal, the program on it, and all that it has shown."""

    def __init__(self, columns: int) -> None:
        self.shown = b""
        self._controller, self._side = pty.openpty()
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._side, termios.TIOCSWINSZ, size)
        self._process: asyncio.subprocess.Process | None = None
        self._news = asyncio.Event()

    async def start(
        self, command: tuple[str, ...], directory: Path, environment: Mapping[str, str]
    ) -> None:
        """Start a program on it."""
        self._process = await asyncio.create_subprocess_exec(
            *command,
            cwd=directory,
            env=environment,
            stdin=self._side,
            stdout=self._side,
            stderr=self._side,
            start_new_session=True,
        )
        os.close(self._side)
        os.set_blocking(self._controller, False)
        asyncio.get_running_loop().add_reader(self._controller, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._controller, 65536)
        except OSError:  # the program has ended
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._controller)
        self.shown += data
        self._news.set()

    async def wait_for(self, text: str, seconds: float = _SECONDS) -> None:
        """Wait until a text is shown."""
        async with asyncio.timeout(seconds):
            while text.encode() not in self.shown:
                self._news.clear()
                await self._news.wait()

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)

    async def end(self, seconds: float = _SECONDS) -> Done:
        """Wait for its end; everything was shown on one terminal."""
        assert self._process is not None
        code = await asyncio.wait_for(self._process.wait(), seconds)
        self._read()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._controller)
        os.close(self._controller)
        return Done(code, self.shown.decode("utf-8", "replace"), "")
