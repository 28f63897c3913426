"""The process that outlives the agent: parent of one job's process tree at a time.

``forkserver.py`` forks it. It runs a program in ``DIR/job``, waits for it, sees to it
that nothing of the tree survives, and leaves the exit record in ``DIR/exit``. The agent may
die and come back meanwhile. Then it waits for the next job of the same agent process, if
that still lives. It imports little, because there is one for every slot, and nothing of ours
but what is in this folder.

Linux only: a subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) becomes the parent of every
orphan below it, so that a double fork or setsid() does not escape.
"""

import contextlib
import ctypes
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

from agent.supervision import processes
from agent.supervision.control_group import ControlGroup
from agent.supervision.starter import Starter
from agent.supervision.usage import Usage

WATCHED = {signal.SIGCHLD, signal.SIGTERM}
"""The signals that a supervisor waits for; they are blocked before it is forked."""

_PR_SET_CHILD_SUBREAPER = 36
_NOTHING_LEFT = b"0"  # said to the agent
_STORM_PAUSE = 0.002
_REQUEST_BYTES = 64 * 1024
_RECORD_BYTES = 256  # of every record; white space after JSON is no part of it
_FOR_EVER = 365 * 24 * 3600.0
_CANNOT_START = 127  # the shell's exit code for a program that can't be run

_prctl = ctypes.CDLL(None, use_errno=True).prctl
_inherited = dict(os.environ)
_all_cores = os.sched_getaffinity(0)


def serve(agent: int, prepare: Callable[[Any], None]) -> None:
    """Run one job after the other, as the agent asks for them on a socket, until it is gone.

    A request is one packet, a JSON object: the job's ``directory``, the ``argv`` to run in it,
    the ``variables`` that are added to its environment, its time limit (``timeout``) and
    ``grace`` period in seconds, how many bytes of ``memory`` it may use and on which ``cores``
    it runs (null: no limit), and its ``control_group`` (see :class:`ControlGroup`). If its
    ``preparation`` is not null, ``prepare`` is called with what is ``own`` there in the thread
    that starts the program (see :class:`Starter`), and before with what is ``lasting``, if
    anything, in this process: once and for good, as it costs more than what it takes away from a
    supervisor. All later jobs must have the same there.

    One byte in return tells that the job runs, another that it has ended and left no process.
    The end of the file tells that this process is gone, however it went.

    Between two jobs SIGTERM ends it. So a request to kill that comes when the job has just
    ended can't hit the next one: the agent sends that only afterwards.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    identity = f"{os.getpid()} {processes.start_time('self')}"
    starter = Starter(prepare, agent)
    while request := _next_request(agent):
        order = json.loads(request)
        try:
            os.chdir(order["directory"])
            if not _claim(identity):
                return
            if os.path.lexists("kill"):
                # asked for before the claim, by an agent that did not yet see this process
                _write_atomically("exit", {"kind": "killed"})
                return
            starter.take_lasting_steps(order["preparation"])
            _supervise(order, starter)
        except BaseException:
            _log_failure(order["directory"])  # where the agent looks for it
            raise
        os.chdir("/")
        _tell(agent, _NOTHING_LEFT)


def _next_request(agent: int) -> bytes:
    """Wait for a job; returns nothing once the agent is gone."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        return os.read(agent, _REQUEST_BYTES)
    except ConnectionResetError:
        return b""  # it went with a word of ours unread
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _supervise(order: dict[str, Any], starter: Starter) -> None:
    """Run the job of this directory to its end.

    Nothing is synced. The records are for a successor of the agent; after a restart of the
    machine they would prove nothing, as the files of the job were not synced either.
    """
    timeout = order["timeout"]
    deadline = None if timeout is None else time.monotonic() + timeout
    usage = Usage(order["memory"])
    group = ControlGroup(order["control_group"])
    _keep_to(order["cores"])
    with group.entered():
        job = starter.start(order, {**_inherited, **order["variables"]})
    if order["memory"] is not None:
        _keep_to(None)  # who looks at the job must not have to wait for it
    record = _wait(job, deadline, usage) if job else {"kind": "exited", "code": _CANNOT_START}
    if record.get("code") and _is_told_to_end(order["settle"]):
        record = {"kind": _kind_when_told()}
    if record.get("code") and group.was_out_of_memory():
        record = {"kind": "memory"}
    if record["kind"] in ("exited", "signalled"):
        if not _has_children():
            record["usage"] = usage.record()  # nothing more will come to it: one file will do
        # before the rest of the tree is ended: a crash from here on must not repeat the job
        _write_atomically("exit", record)
    _end_tree(order["grace"], usage)
    starter.end_thread()
    group.remove()
    if "usage" not in record:
        with contextlib.suppress(OSError):  # a full disk must not cost the end record
            _write_atomically("usage", usage.record())
    if record["kind"] in ("timeout", "killed", "memory"):
        _write_atomically("exit", record)


def _tell(agent: int, word: bytes) -> None:
    with contextlib.suppress(OSError):  # it died meanwhile; its successor finds us
        os.write(agent, word)


def _log_failure(directory: str) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    descriptor = os.open(os.path.join(directory, "supervisor.log"), flags, 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        sys.stderr = file
        sys.excepthook(*sys.exc_info())


def _claim(identity: str) -> bool:
    """Be the one supervisor of this directory, for ever.

    symlink(2) decides. The link leads nowhere: its text is the record, there whole or not at
    all, in one call and without a file.
    """
    try:
        os.symlink(f"{identity} {time.monotonic():.3f}", "process")
    except FileExistsError:
        return False
    return True


def _keep_to(cores: list[int] | None) -> None:
    """Run on these cores only, and what is started from now on; on all if none of them is there.

    This process stays on those of its last job: the next one often has the same, and to be moved
    from one core to another takes longer than all else of a start.
    """
    wanted = _all_cores.intersection(cores or ()) or _all_cores
    with contextlib.suppress(OSError):
        if os.sched_getaffinity(0) != wanted:  # asked: a job may have changed it
            os.sched_setaffinity(0, wanted)


def _wait(job: int, deadline: float | None, usage: Usage) -> dict[str, object]:
    """Wait for the job, its limits or a request to end it, and say which it was."""
    while True:
        left = _FOR_EVER if deadline is None else max(0.0, deadline - time.monotonic())
        received = signal.sigtimedwait(WATCHED, min(left, usage.until_next_look()))
        if received is None and deadline is not None and time.monotonic() >= deadline:
            return {"kind": "timeout"}
        if usage.until_next_look() <= 0 and (used := usage.look()) is not None:
            return {"kind": "memory", "used": used}
        if received is None:
            continue
        if received.si_signo == signal.SIGTERM:
            return {"kind": _kind_when_told()}
        status = _reap(usage).get(job)
        if status is not None:
            return _record_of(status)


def _is_told_to_end(seconds: float) -> bool:
    """Whether SIGTERM comes within this time, as it may have come to the job before.

    Who ends all processes of a job, as Slurm does, tells one after the other.
    """
    return seconds > 0 and signal.sigtimedwait({signal.SIGTERM}, seconds) is not None


def _kind_when_told() -> str:
    # without the agent's mark the machine is shutting down: the job is lost, not killed
    return "killed" if os.path.lexists("kill") else "lost"


def _record_of(status: int) -> dict[str, object]:
    if os.WIFSIGNALED(status):
        return {"kind": "signalled", "code": os.WTERMSIG(status)}
    return {"kind": "exited", "code": os.WEXITSTATUS(status)}


def _reap(usage: Usage) -> dict[int, int]:
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status, spent = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = status
        usage.add(spent)


def _has_children() -> bool:
    """Whether there is any child; every orphan below a subreaper is one."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _end_tree(grace: float, usage: Usage) -> None:
    """Leave no descendant alive: SIGTERM, the grace period, then SIGKILL until none is left."""
    deadline = time.monotonic() + grace
    terminated: set[int] = set()
    while descendants := _descendants(usage):
        new = descendants - terminated
        _signal_all(new, signal.SIGTERM)
        _signal_all(new, signal.SIGCONT)
        terminated |= new
        left = deadline - time.monotonic()
        if left <= 0:
            break
        signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.1))
        _reap(usage)
    while descendants := _descendants(usage):
        _signal_all(descendants, signal.SIGKILL)
        # SIGCHLD comes with each death; the bound is for those that are not our children
        signal.sigtimedwait({signal.SIGCHLD}, _STORM_PAUSE)
        _reap(usage)


def _signal_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        # gone already, or a setuid program, which only root may signal
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _descendants(usage: Usage) -> set[int]:
    """Return all processes below this one, those of ours that ended being reaped first.

    A zombie that is not our child counts, for it may be a program whose first thread
    has ended and whose others live.
    """
    _reap(usage)
    if not _has_children():
        return set()
    _keep_to(None)  # they may be many, and busy
    return processes.below()


def _open_own(name: str) -> int:
    """Open a file that the agent has made, or make it; nothing else, and nothing elsewhere."""
    with contextlib.suppress(OSError):
        descriptor = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
            return descriptor
        os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _write_atomically(name: str, content: dict[str, object]) -> None:
    # Not truncated: the agent reserved the space of the exit record, so that it can be written
    # when the job has filled the disk. What the job has put in its place is not written to.
    descriptor = _open_own(f"{name}.new")
    try:
        os.write(descriptor, json.dumps(content).ljust(_RECORD_BYTES).encode())
    finally:
        os.close(descriptor)
    os.rename(f"{name}.new", name)
