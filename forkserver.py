"""The warm process that forks the supervisor of every job of an agent.

To start Python costs more than the rest of a small job; to fork a process in which it has
started costs a small part of that. ``launcher.py`` starts one for an agent, as ``python -E
-s -S forkserver.py SOCKET``, with the environment that jobs inherit, so that the agent's
token is not in it. A request is one packet: a JSON list, and with it the write end of a
pipe, the job's life line, which the supervisor holds for as long as it lives.

It ends when the agent's end of the socket is closed, however that came about. Supervisors
are in sessions of their own and do not need it. It ignores SIGCHLD, so the kernel reaps
those that end before it; init reaps those that outlive it.
"""

import gc
import json
import os
import signal
import socket
import struct
import sys

import supervisor

_REQUEST_BYTES = 64 * 1024


def main(arguments: list[str]) -> int:
    """Fork supervisors on request until the agent is gone; returns the exit status."""
    requests = socket.socket(fileno=int(arguments[0]))
    signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.WATCHED)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # what is loaded stays for ever; a collection would only unshare its pages
    gc.disable()
    gc.freeze()
    while True:
        # not socket.recv_fds(), which in Python 3.11 passes over its flags
        request, ancillary, _, _ = requests.recvmsg(
            _REQUEST_BYTES, socket.CMSG_LEN(struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC
        )
        if not request:
            return 0
        directory, variables, timeout, grace = json.loads(request)
        (life_line,) = struct.unpack("i", ancillary[0][2])
        if _fork(directory) == 0:
            requests.close()
            _supervise(directory, variables, timeout, grace, life_line)
        # without a supervisor that holds it, too, the agent reads its end and asks again
        os.close(life_line)


def _fork(directory: str) -> int:
    try:
        return os.fork()
    except OSError:
        _log_failure(directory)
        return -1


def _supervise(
    directory: str,
    variables: dict[str, str],
    timeout: float | None,
    grace: float,
    life_line: int,
) -> None:
    """Be the supervisor of one job; does not return."""
    status = 1
    try:
        os.setsid()
        # the agent's error output is a pipe, perhaps, and whoever reads it waits for its end
        os.dup2(1, 2)
        supervisor.supervise(directory, variables, timeout, grace, life_line)
        status = 0
    except BaseException:  # noqa: BLE001 - the agent reads it there
        _log_failure(directory)
    finally:
        os._exit(status)  # an interpreter that tidies up first costs more than the fork


def _log_failure(directory: str) -> None:
    with open(os.path.join(directory, "supervisor.log"), "a", encoding="utf-8") as file:
        sys.stderr = file
        sys.excepthook(*sys.exc_info())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
