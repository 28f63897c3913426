"""What the kernel tells of the processes below this one (proc(5))."""

import contextlib
import os

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
_PROC_FILE_BYTES = 4096  # more than proc(5) has in the files that are read here


def below() -> set[int]:
    """Return all processes below this one, zombies too, found by who is whose parent."""
    parents = {int(entry): _parent(entry) for entry in os.listdir("/proc") if entry.isdigit()}
    own = os.getpid()
    found: set[int] = set()
    for pid in parents:
        chain: list[int] = []
        above = pid
        while above in parents and above != own and above not in found:
            chain.append(above)
            above = parents[above]
        if above == own or above in found:
            found.update(chain)
    return found


def tree() -> list[int]:
    """Return the processes below this one, by the kernel's own lists of children (proc(5)).

    Cheaper than :func:`below`, but a process whose parent ends meanwhile may be missed.
    """
    if not _HAS_CHILDREN_FILES:
        return list(below())
    found: list[int] = []
    pending = [os.getpid()]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(OSError):  # it ended meanwhile
            for task in os.listdir(f"/proc/{pid}/task"):
                pending += map(int, _read_all(f"/proc/{pid}/task/{task}/children").split())
        found.append(pid)
    return found[1:]


def resident(pid: int) -> int:
    """Return how many bytes of a process are in memory, 0 if it is gone."""
    try:
        return int(_read(f"/proc/{pid}/statm").split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def proportional(pid: int) -> int:
    """Return its share of the memory that it has, alone or with others; 0 if it is gone."""
    try:
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return resident(pid)  # of another user, or a kernel without this file
    return 0


def _stat_fields(pid: str) -> list[bytes]:
    # the command name, in parentheses, may itself hold spaces and parentheses
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _parent(pid: str) -> int:
    try:
        return int(_stat_fields(pid)[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended while /proc was read


def start_time(pid: str) -> int:
    """Return when a process started, in clock ticks since boot; ``self`` is this one."""
    return int(_stat_fields(pid)[19])  # field 22 of proc(5), clock ticks since boot


# Not with open(): file objects and their codecs would cost each supervisor half a megabyte.


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, _PROC_FILE_BYTES)
    finally:
        os.close(descriptor)


def _read_all(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        pieces = []
        while piece := os.read(descriptor, _PROC_FILE_BYTES):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(descriptor)
