"""The warm process that forks the supervisors of an agent.

To start Python costs more than the rest of a small job; to fork a process in which it has
started costs a small part of that. ``launcher.py`` starts one for an agent, as ``python -E
-s -S -m agent.supervision.forkserver SOCKET WORKDIR MODULE``, with the environment that jobs
inherit, so that the agent's token is not in it. A request is one packet with a socket, at
whose other end the agent gives the new supervisor its jobs.

``MODULE``, if there is one, has a function ``prepare``, which supervisors call before they
start the program of a job. It is imported here, once; what it does is none of this folder's
business.

It ends when the agent's end of its own socket is closed, however that came about.
Supervisors are in sessions of their own and do not need it. It ignores SIGCHLD, so the
kernel reaps those that end before it; init reaps those that outlive it.
"""

import gc
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from agent.supervision import supervisor

_REQUEST_BYTES = 16


def main(arguments: list[str]) -> int:
    """Fork supervisors on request until the agent is gone; returns the exit status."""
    descriptor, workdir, *preparing = arguments
    prepare = preparation(preparing)
    os.chdir(workdir)
    requests = socket.socket(fileno=int(descriptor))
    signal.pthread_sigmask(signal.SIG_BLOCK, supervisor.WATCHED)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # what is loaded stays for ever; a collection would only unshare its pages
    gc.disable()
    gc.freeze()
    while True:
        # not socket.recv_fds(), which in Python 3.11 ignores its flags
        request, ancillary, _, _ = requests.recvmsg(
            _REQUEST_BYTES, socket.CMSG_LEN(struct.calcsize("i")), socket.MSG_CMSG_CLOEXEC
        )
        if not request:
            return 0
        (agent,) = struct.unpack("i", ancillary[0][2])
        if _fork() == 0:
            requests.close()
            _supervise(agent, prepare)
        # without a supervisor that holds it, too, the agent reads its end and asks again
        os.close(agent)


def preparation(modules: list[str]) -> Callable[[Any], None]:
    """Import the module that is named, if one is; returns its function."""
    for name in modules:
        __import__(name)
        prepare: Callable[[Any], None] = sys.modules[name].prepare
        return prepare

    def refuse(_: Any) -> None:
        raise ValueError("no module was named that prepares jobs")

    return refuse


def _fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        # the agent's log; logging itself would make every supervisor larger
        name = "level=ERROR logger=orchestrator.forkserver"
        sys.stderr.write(f"{name} event=fork_failed error={str(error)!r}\n")
        return -1


def _supervise(agent: int, prepare: Callable[[Any], None]) -> None:
    """Be a supervisor; does not return."""
    status = 1
    try:
        os.setsid()
        # the agent's error output is a pipe, perhaps, and whoever reads it waits for its end
        os.dup2(1, 2)
        gc.enable()
        supervisor.serve(agent, prepare)
        status = 0
    finally:
        os._exit(status)  # an interpreter that tidies up first costs more than the fork


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
