"""Ways out that a job may try, and somebody else than root to try them as.

Each way is a piece of shell, or of Python where shell has no words for it. It succeeds, with
status 0, if the job got out. Nothing here changes the machine: what is not the test's own is
opened for writing, at most, and never written to.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.harness import PROJECT

UID = 61234
"""An ordinary user, without an account."""

SHELL: dict[str, str] = {
    "read another job's file": 'cat "$VICTIM/job/secret"',
    "list the jobs of the machine": 'ls "$WORKDIR/attempts" | grep -qx "${VICTIM##*/}"',
    "read the work directory": 'cat "$WORKDIR/agent-id"',
    "read the record of another attempt": 'cat "$VICTIM/attempt.json"',
    "read its own record": 'cat "$OWN/attempt.json"',
    "read the agent's token": 'cat "$TOKEN"',
    "read the database": 'head -c 16 "$DATABASE" | grep -q SQLite',
    "read the database's log": 'head -c 16 "$DATABASE-wal" | grep -q .',
    "read an ssh key": 'cat "$HOMEDIR/.ssh/id_ed25519"',
    "read a netrc": 'cat "$HOMEDIR/.netrc"',
    "link an ssh key": 'ln "$HOMEDIR/.ssh/id_ed25519" stolen',
    "read an ssh key through a link": 'ln -s "$HOMEDIR/.ssh" link && cat link/id_ed25519',
    "read the agent's environment": 'grep -q "$MARK" "/proc/$AGENT/environ"',
    "read the server's environment": 'grep -q "$MARK" "/proc/$SERVER/environ"',
    "read another job's environment": 'grep -q "$VICTIM" "/proc/$VICTIM_PID/environ"',
    "see the files of the agent": 'ls "/proc/$AGENT/root/" | grep -q .',
    "see the files of another job": 'cat "/proc/$VICTIM_PID/cwd/secret"',
    "see what the fork server has open": 'readlink "/proc/$FORK_SERVER/fd/0"',
    "signal the agent": 'kill -0 "$AGENT"',
    "signal the server": 'kill -0 "$SERVER"',
    "signal the fork server": 'kill -0 "$FORK_SERVER"',
    "signal another job": 'kill -0 "$VICTIM_PID"',
    "signal another supervisor": 'kill -0 "$SUPERVISOR"',
    "write into another job's directory": 'echo x > "$VICTIM/job/planted"',
    "write the exit record of another attempt": 'exec 3>> "$VICTIM/exit.new"',
    "write the home": 'exec 3>> "$HOMEDIR/.netrc"',
    "write beside its home": 'exec 3>> "$HOMEDIR/data"',
    "write the database": 'exec 3>> "$DATABASE"',
    "write into the files of others in /tmp": 'exec 3>> "$OUTSIDE/file"',
    "make a file in a directory of others": 'echo x > "$OUTSIDE/planted"',
    "move its own directory away": 'mv "$OWN/job" "$OWN/gone"',
}
"""Where jobs run without an isolation, as the user of the agent, all of these succeed."""

HARMLESS: dict[str, str] = {
    "write /etc": "exec 3>> /etc/passwd",
    "write the kernel's settings": "exec 3>> /proc/sys/kernel/core_pattern",
    "read the shadow file": "cat /etc/shadow",
    "read the disk": "head -c 1 /dev/vda || head -c 1 /dev/sda || head -c 1 /dev/nvme0n1",
}
"""What the user alone may not do, which must be so for users that root becomes, too."""

PYTHON: dict[str, str] = {
    "trace the agent": "traced(AGENT)",
    "trace another job": "traced(VICTIM_PID)",
    "read another job's memory": "open(f'/proc/{VICTIM_PID}/mem', 'rb')",
    "take a descriptor of the agent": "call(438, call(434, AGENT, 0), 0, 0)",
    "limit the agent": "resource.prlimit(AGENT, resource.RLIMIT_CORE, (0, 0))",
    "reach an abstract socket": "connected(socket.AF_UNIX, chr(0) + ABSTRACT)",
}

WITHOUT_NETWORK: dict[str, str] = {
    "connect to this machine": "connected(socket.AF_INET, ('127.0.0.1', PORT))",
    "connect by IPv6": "connected(socket.AF_INET6, ('::1', PORT))",
    "send a datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    ".sendto(b'out', ('127.0.0.1', PORT))",
    "listen": "listening()",
}

_PRELUDE = """\
import ctypes, os, resource, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), 'system call')
    return result
def traced(pid):
    if libc.ptrace(0x4206, pid, 0, 0) != 0:  # PTRACE_SEIZE, which stops nobody
        raise OSError(ctypes.get_errno(), 'ptrace')
def connected(family, address):
    with socket.socket(family) as end:
        end.settimeout(3)
        end.connect(address)
def listening():
    with socket.socket() as end:
        end.bind(('127.0.0.1', 0))
        end.listen()
"""


def script(targets: dict[str, str], python: str | None, ways: dict[str, str]) -> str:
    """Return a job that tries the ways of :data:`SHELL` and of Python, and prints its success."""
    lines = ['OWN=$(dirname "$ORCHESTRATOR_JOB_DIRECTORY")']
    lines += [f"{name}={_quoted(value)}" for name, value in targets.items()]
    for way, snippet in ways.items():
        lines.append(f"if ( {snippet} ) > /dev/null 2>&1")
        lines.append(f"then echo {_quoted('out: ' + way)}; else echo {_quoted('held: ' + way)}; fi")
    for way, snippet in (PYTHON if python else {}).items():
        lines += _python_lines(python or "", targets, way, snippet)
    return "\n".join(lines) + "\necho end\n"


def network_script(targets: dict[str, str], python: str) -> str:
    """Return a job that tries the ways to the network."""
    lines: list[str] = []
    for way, snippet in WITHOUT_NETWORK.items():
        lines += _python_lines(python, targets, way, snippet)
    return "\n".join(lines) + "\necho end\n"


def _python_lines(python: str, targets: dict[str, str], way: str, snippet: str) -> list[str]:
    values = "\n".join(f"{name} = {int(v) if v.isdigit() else v!r}" for name, v in targets.items())
    code = f"{_PRELUDE}{values}\n{snippet}\n"
    return [
        f"if {python} - > /dev/null 2>> errors <<'END'",
        code + "END",
        f"then echo {_quoted('out: ' + way)}; else echo {_quoted('held: ' + way)}; fi",
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def python_for_jobs() -> str | None:
    """Return a Python that jobs may run: not one in a home."""
    for candidate in (Path(sys.base_prefix) / "bin" / "python3", Path("/usr/bin/python3")):
        real = candidate.resolve()
        if candidate.exists() and not real.is_relative_to("/root") and "home" not in real.parts:
            return str(candidate)
    return None


def as_ordinary_user(directory: Path) -> tuple[str, ...]:
    """Return what has root run a program as the user :data:`UID`, with the same Python.

    In a mount namespace of its own, in which the ways to this Python and this project are open
    to everybody, whatever they are on this machine.
    """
    needed = [Path(sys.base_prefix), Path(sys.prefix), PROJECT]
    tops = {
        top
        for path in needed
        for top in path.resolve().parents
        if not top.stat().st_mode & 0o001 and top != Path("/")
    }
    closed = [top for top in tops if not any(other in top.parents for other in tops)]
    lines = ["set -e", "mount --make-rprivate /"]
    kept = [
        path.resolve() for path in needed if any(top in path.resolve().parents for top in closed)
    ]
    for number, path in enumerate(kept):
        lines += [
            f"mkdir -p {directory}/kept/{number}",
            f"mount --bind {path} {directory}/kept/{number}",
        ]
    lines += [f"mount -t tmpfs -o mode=755 none {top}" for top in closed]
    for number, path in enumerate(kept):
        lines += [f"mkdir -p {path}", f"mount --bind {directory}/kept/{number} {path}"]
    lines += [f'exec setpriv --reuid {UID} --regid {UID} --clear-groups -- "$@"']
    wrapper = directory / "as-ordinary-user"
    wrapper.write_text("\n".join(lines) + "\n")
    return ("unshare", "--mount", "sh", str(wrapper))
