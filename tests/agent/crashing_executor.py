"""An agent with an executor of its own, which kills the agent at a step of its choice.

Run as ``python crashing_executor.py orchestrator.py agent ...``. The step is in the variable
``CRASH_AT``; the agent dies there once, as the file ``crashed`` in its work directory tells.

The executor is as small as the seam allows: a detached shell for each job, of which the first
that makes the directory ``taken`` runs it. It shares nothing with the one that the product has.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(sys.argv[1]).parent))

from agent import command, executor_options
from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Command, Execution, Executor
from agent.executors.records import exit_record
from agent.isolation.choice import Isolator
from agent.outcomes import Exit, ExitKind, JobLost
from agent.resources import Machine

_LOOK_SECONDS = 0.02
_SHELL = """
mkdir taken 2> /dev/null || exit 0
echo $$ > session.new && mv session.new session
[ -e kill ] && exit 0
cd job && "$@" > ../stdout.log 2> ../stderr.log < /dev/null
printf '{"kind": "exited", "code": %d}' $? > ../exit.new && mv ../exit.new ../exit
"""


class CrashingExecutor(Executor):
    """Runs jobs in sessions of their own, and dies when it is told to."""

    name = "crashing"

    def __init__(
        self,
        workdir: Path,
        environment: Mapping[str, str],
        isolator: Isolator,
        machine: Machine,
        umask: int = -1,
    ) -> None:
        self._crashed = workdir / "crashed"
        self._environment = dict(environment)

    async def run(self) -> None:
        self.step("run")

    def execution(self, directory: AttemptDirectory) -> Execution:
        self.step("execution")
        return _Execution(directory, self.step, self._environment)

    async def end_abandoned(self, attempt: Path) -> None:
        raise AssertionError("every record can be read")

    def close(self) -> None:
        pass

    def step(self, name: str) -> None:
        """Die if this is the step, for the first time."""
        if name == os.environ.get("CRASH_AT") and not self._crashed.exists():
            self._crashed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class _Execution(Execution):
    def __init__(
        self,
        directory: AttemptDirectory,
        step: Callable[[str], None],
        environment: Mapping[str, str],
    ) -> None:
        self._directory = directory
        self._path = directory.path
        self._step = step
        self._environment = environment

    def is_started(self) -> bool:
        return (self._path / "taken").exists()

    def check_adopted(self) -> None:
        self._step("check")
        self._directory.check_boot()

    async def start(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        self._step("before the start")
        subprocess.Popen(  # noqa: ASYNC220
            ["bash", "-c", _SHELL, "job", *command.argv],
            cwd=self._path,
            env={**self._environment, **command.variables},
            start_new_session=True,
        )
        self._step("while it starts")
        while not self.is_started():
            on_reason("it has not begun")
            await asyncio.sleep(_LOOK_SECONDS)
        self._step("after the start")
        return None

    async def wait(self) -> Exit:
        self._step("before the wait")
        while (ended := exit_record(self._path)) is None:
            if self._directory.is_to_be_killed() and not self._session():
                raise JobLost("it was killed")
            await asyncio.sleep(_LOOK_SECONDS)
        self._step("after the wait")
        return ended

    async def kill(self) -> Exit:
        self._step("before the kill")
        self._directory.mark_to_be_killed()
        self._step("after the mark")
        while session := self._session():
            os.killpg(session, signal.SIGKILL)
            await asyncio.sleep(_LOOK_SECONDS)
        self._step("after the kill")
        return exit_record(self._path) or Exit(ExitKind.KILLED)

    def usage(self, ended: Exit) -> None:
        self._step("usage")

    def forget(self) -> None:
        self._step("forget")

    def _session(self) -> int | None:
        """Return the process group while any of it lives; nobody may have waited for the dead."""
        try:
            session = int((self._path / "session").read_text())
        except FileNotFoundError:
            return None
        states = subprocess.run(
            ["ps", "-o", "state=", "-g", str(session)], stdout=subprocess.PIPE, check=False
        )
        return session if set(states.stdout.split()) - {b"Z"} else None


if __name__ == "__main__":
    vars(executor_options)["LocalExecutor"] = CrashingExecutor
    sys.exit(command.main(sys.argv[3:]))
