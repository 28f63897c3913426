"""Starts the program of a job, after all has been given up that the job may not have.

What a job gives up before its program runs (its user, what it may reach) is given up by a thread,
and what that thread starts has it not. The process, with its other thread, keeps what it needs to
end the job. That takes a fraction of the time of fork(2) from Python.
"""

import _thread
import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

_JOB_RUNS = b"1"  # said to the agent


class NotPrepared(Exception):
    """The preparation of a job failed, so the job must not be started."""


class Starter:
    """Starts one program after the other, each in its directory."""

    def __init__(self, prepare: Callable[[Any], None], agent: int) -> None:
        """``prepare`` takes steps in and for the calling thread; what that starts inherits them.

        ``agent`` is the socket on which the agent is told that the job runs.
        """
        self._prepare = prepare
        self._agent = agent
        self._lasting: Any = None
        self._thread: _Thread | None = None

    def take_lasting_steps(self, preparation: Any) -> None:
        """Take the steps that are for good, if they were not taken before.

        All later jobs must have the same. Raises :class:`NotPrepared`.
        """
        wanted = None if preparation is None else preparation.get("lasting")
        if wanted == self._lasting:
            return
        if self._lasting is not None:
            raise NotPrepared("an earlier job had other steps that are for good")
        self._prepare(wanted)
        self._lasting = wanted

    def start(self, order: dict[str, Any], environment: dict[str, str]) -> int | None:
        """Return the process id of the job, None if there is no such program.

        Raises :class:`NotPrepared` if the preparation failed.
        """
        program = _Program(order, environment, self._agent)
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        program.open_streams()
        try:
            os.chdir("job")
            if order["preparation"] is None:
                program.spawn()
            else:
                self._start_prepared(program, order["preparation"]["own"])
        except OSError as error:
            program.tell_failure(error)
        finally:
            os.fchdir(own)  # not "..": the job may have moved its directory
            os.close(own)
            program.close_streams()
        return program.pid

    def _start_prepared(self, program: "_Program", steps: Any) -> None:
        def run() -> None:
            try:
                self._prepare(steps)
            except BaseException as error:
                raise NotPrepared(f"{type(error).__name__}: {error}") from error
            program.spawn()

        self._thread = _Thread()
        self._thread.run(run)

    def end_thread(self) -> None:
        """Let the thread end, the job having ended.

        Not before: whoever asks to be told of the end of its parent (prctl(2), PR_SET_PDEATHSIG)
        is told of the end of the thread.
        """
        if self._thread is not None:
            self._thread.end()
            self._thread = None


class _Program:
    """The program of a job, and where it is started."""

    def __init__(self, order: dict[str, Any], environment: dict[str, str], agent: int) -> None:
        self.pid: int | None = None
        self._argv: list[str] = order["argv"]
        self._environment = environment
        self._agent = agent
        self._streams: list[int] = []

    def open_streams(self) -> None:
        """Open its input and output; the thread that starts it may no longer reach them."""
        output = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        self._streams = [os.open(os.devnull, os.O_RDONLY)]
        self._streams += [os.open(name, output, 0o644) for name in ("stdout.log", "stderr.log")]

    def close_streams(self) -> None:
        """Close them; the program has its own."""
        for descriptor in self._streams:
            os.close(descriptor)

    def spawn(self) -> None:
        """Start it from the calling thread."""
        # posix_spawn(3) copies no page tables, as fork(2) would
        self.pid = os.posix_spawnp(
            self._argv[0],
            self._argv,
            self._environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, descriptor, number)
                for number, descriptor in enumerate(self._streams)
            ],
            # a session of its own: "kill 0" in the script must not reach the supervisor
            setsid=True,
            setsigmask=(),
            # Python ignores these, and an ignored signal stays ignored across exec
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
        )
        # at once, by the thread that is here: the job may have the only core, and another thread
        # of this process its turn when the job has ended
        self._say_that_it_runs()

    def tell_failure(self, error: OSError) -> None:
        """Say in its output why it can't be started."""
        os.write(self._streams[2], f"cannot start {self._argv[0]}: {error}\n".encode())
        self._say_that_it_runs()  # it has ended already, as a program that fails at once

    def _say_that_it_runs(self) -> None:
        with contextlib.suppress(OSError):  # the agent died meanwhile; its successor finds us
            os.write(self._agent, _JOB_RUNS)


class _Thread:
    """A thread that does one piece of work, and stays until it may end."""

    def __init__(self) -> None:
        self._error: BaseException | None = None
        self._has_done = _thread.allocate_lock()
        self._may_end = _thread.allocate_lock()

    def run(self, work: Callable[[], None]) -> None:
        """Have the work done; returns when it is. Raises what the work raises."""
        self._has_done.acquire()
        self._may_end.acquire()
        _thread.start_new_thread(self._run, (work,))
        self._has_done.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Let it end."""
        self._may_end.release()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
            raise  # to nowhere: the error output of a supervisor is /dev/null
        finally:
            self._has_done.release()
        self._may_end.acquire()
