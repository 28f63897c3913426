"""What runs on a node of a cluster: the supervisor of one job, told by files instead of a socket.

Slurm starts it, ``python -E -s -S on_node.py ATTEMPT NOTICES LIMITED MODULE NAMES PREFIXES``. The
agent is on another machine, and may be dead; what both see is the file system:

    ATTEMPT/order         the request, as the supervisor understands it
    ATTEMPT/slurm-claim   a link whose text is the job of Slurm that runs this attempt
    ATTEMPT/nothing-left  the job has ended, and no process of it is left
    NOTICES/N             attempt N has something new to be looked at

The claim is what keeps a job from being started twice: whichever job of Slurm comes first has
it, and another, of a submission whose answer was lost, ends at once.

``LIMITED`` says whose time limit comes first, ``MODULE`` prepares the job's process, and of the
environment on the node the job gets the variables ``NAMES`` and those that begin with ``PREFIXES``.
"""

import _thread
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

_SECRETS = {"SLURM_JWT"}
_WORD_BYTES = 16
_LAST_WORD_SECONDS = 150.0  # Slurm sends SIGTERM up to a minute before it was asked to
_TAKEN_BY_ANOTHER = 3
_ENDED_WITHOUT_RECORD = 4


def main(arguments: list[str]) -> int:
    """Run the job of an attempt; returns the exit status, which is for people only."""
    attempt, notices, limited, module, names, prefixes = arguments
    _clear_environment(set(names.split(",")) - _SECRETS, tuple(prefixes.split(",")))
    order = Path(attempt, "order").read_bytes()
    if not _claim(attempt):
        return _TAKEN_BY_ANOTHER
    _serve(order, module, os.path.join(notices, os.path.basename(attempt)))
    has_record = os.path.exists(os.path.join(attempt, "exit"))
    # from now on the agent may remove the directory
    _touch(os.path.join(attempt, "nothing-left"))
    _notify(os.path.join(notices, os.path.basename(attempt)))
    if has_record:
        return 0
    if limited == "by-slurm":
        # told to end, and not by the agent: perhaps by Slurm, ahead of its time limit. If this
        # process ended now, Slurm would call the job failed, and nobody would know why
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigtimedwait({signal.SIGTERM}, _LAST_WORD_SECONDS)
    return _ENDED_WITHOUT_RECORD


def _clear_environment(names: set[str], prefixes: tuple[str, ...]) -> None:
    """Remove all but what a job may see; the supervisor, once imported, passes the rest on."""
    for name in list(os.environ):
        if name in _SECRETS or (name not in names and not name.startswith(prefixes)):
            del os.environ[name]


def _serve(order: bytes, module: str, notice: str) -> None:
    from agent.supervision import forkserver, supervisor  # noqa: PLC0415 see _clear_environment

    prepare = forkserver.preparation([module])
    signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.WATCHED)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.sendall(order)
    ours.shutdown(socket.SHUT_WR)  # there is no second job
    _thread.start_new_thread(_pass_on, (ours, notice))
    supervisor.serve(theirs.fileno(), prepare)


def _claim(attempt: str) -> bool:
    """Be the one job of Slurm that runs this attempt."""
    # told apart from itself, requeued
    variables = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURMD_NODENAME")
    own = " ".join(os.environ.get(name, "0") for name in variables)
    path = os.path.join(attempt, "slurm-claim")
    try:
        os.symlink(own, path)
    except FileExistsError:
        # NFS may have made it in a first try whose answer was lost
        return os.readlink(path) == own
    return True


def _pass_on(ours: socket.socket, notice: str) -> None:
    """Have the agent look when the supervisor says that the job runs, or has ended."""
    while ours.recv(_WORD_BYTES):
        _notify(notice)


def _notify(notice: str) -> None:
    # it is found out without, only later
    with contextlib.suppress(OSError):
        _touch(notice)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


if __name__ == "__main__":
    # the folder of the program, wherever it lies on this node
    sys.path.insert(0, str(Path(__file__).absolute().parents[2]))
    sys.exit(main(sys.argv[1:]))
