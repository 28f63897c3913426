"""What a process may reach, given up by itself: Landlock.

A ruleset lists what stays allowed; there is no rule that forbids. So "all but these" is
written as rules for everything beside them: a directory above something hidden has no rule of
its own, but each of its other entries has. That also means that such a directory (``/``, say)
can't be listed, and that what is made in it later can't be opened.

Standard library only: the fork server loads this. Sources: landlock(7),
Documentation/userspace-api/landlock.rst of Linux 6.18.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import stat
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from agent.isolation.system_calls import (
    LANDLOCK_ADD_RULE,
    LANDLOCK_CREATE_RULESET,
    LANDLOCK_RESTRICT_SELF,
    landlock_add_rule,
    system_call,
)

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHARACTER_DEVICE, _MAKE_BLOCK_DEVICE = 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEVICE = 1 << 13, 1 << 14, 1 << 15

_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE
_READING = _EXECUTE | _READ_FILE | _READ_DIR
_WRITING = (1 << 16) - 1 & ~(_MAKE_CHARACTER_DEVICE | _MAKE_BLOCK_DEVICE | _IOCTL_DEVICE)
_DEVICE = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _IOCTL_DEVICE
_SHARED_MEMORY = _WRITING & ~(_READ_DIR | _EXECUTE)
_LOG = _READ_FILE | _WRITE_FILE | _TRUNCATE

_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1 << 0, 1 << 1

_CREATE_VERSION = 1 << 0
_RULE_PATH_BENEATH = 1
_RULESET = struct.Struct("=QQQ")
_PATH_BENEATH = struct.Struct("=Qi")

_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights on files an ABI has; 16 from the fifth on."""

REFER_ABI, TRUNCATE_ABI, NETWORK_ABI, IOCTL_ABI, SCOPE_ABI = 2, 3, 4, 5, 6


def abi() -> int:
    """Return the version of the kernel's Landlock interface, 0 if it has none or it is off."""
    try:
        size, flags = ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_VERSION)
        return system_call(LANDLOCK_CREATE_RULESET, None, size, flags)
    except OSError:
        return 0


def restrict(policy: dict[str, Any], without_network: bool) -> None:
    """Give up, in this thread and its children, what ``policy`` does not grant.

    ``writable`` are files and directories, ``logs`` files that may be written. ``standing`` is
    the same for many jobs, and JSON, so that it need not be taken apart for each: ``hidden``,
    ``homes``, ``software`` (see :func:`everything_but`), ``readable``, which is granted also
    inside of these, ``devices`` for reading, writing and ioctl, and ``shared_memory``,
    directories in which files may be made but not listed. Paths that are not there are ignored:
    there is nothing to reach. Needs no_new_privs, or root. Raises :class:`OSError` if the kernel
    refuses.
    """
    ruleset = _standing.new_ruleset(policy["standing"], without_network)
    handled = _handled(abi())
    try:
        for name, rights in (("writable", _WRITING), ("logs", _LOG)):
            for descriptor, allowed in _opened(_present(policy[name]), rights):
                _add(ruleset, _rule(descriptor, allowed & handled))
                os.close(descriptor)
        _enforce(ruleset)
    finally:
        os.close(ruleset)


class _Standing:
    """What all jobs of a service may reach, opened once and kept for the next job.

    To look for it again and to open it takes longer than all the rest. It is looked for again
    when one of the directories that were listed has changed, or a mount has.
    """

    def __init__(self) -> None:
        self._asked = ""
        self._opened: list[int] = []
        self._rules: list[bytes] = []
        self._listed: dict[str, tuple[int, int, int]] = {}
        self._mounts: int | None = None
        self._poll = select.poll()

    def new_ruleset(self, asked: str, without_network: bool) -> int:
        """Return a ruleset that grants all this, to be added to and closed by the caller."""
        rules = self.rules(asked)
        version = abi()
        network = _BIND_TCP | _CONNECT_TCP if without_network and version >= NETWORK_ABI else 0
        ruleset = _new_ruleset(_handled(version), network, version)
        try:
            for rule in rules:
                _add(ruleset, rule)
        except BaseException:
            os.close(ruleset)
            raise
        return ruleset

    def rules(self, asked: str) -> list[bytes]:
        """Return what lies there as rules for Landlock, which name open descriptors."""
        if self._has_changed() or asked != self._asked:
            for descriptor in self._opened:
                os.close(descriptor)
            self._asked, self._opened, self._rules, self._listed = "", [], [], {}
            handled = _handled(abi())
            for descriptor, rights in self._open(json.loads(asked)):
                self._opened.append(descriptor)
                self._rules.append(_rule(descriptor, rights & handled))
            self._asked = asked
        return self._rules

    def _open(self, policy: dict[str, list[str]]) -> Iterator[tuple[int, int]]:
        hidden, homes, software = (policy[name] for name in ("hidden", "homes", "software"))
        everything = everything_but(hidden, homes, software, self._listed)
        yield from _opened(everything, _READING)
        yield from _opened(_present(policy["readable"]), _READING)
        yield from _opened(_present(policy["shared_memory"]), _SHARED_MEMORY)
        yield from _opened(_present(policy["devices"]), _DEVICE)

    def _has_changed(self) -> bool:
        if self._mounts is None:
            self._mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._poll.register(self._mounts, select.POLLPRI)
        # proc_pid_mountinfo(5): an exceptional condition is a mount that came or went
        return bool(self._poll.poll(0)) or any(
            _state_of(path) != state for path, state in self._listed.items()
        )


_standing = _Standing()


def restrict_scope() -> None:
    """Give up signals to and abstract sockets of other processes, and nothing else.

    Does nothing where the kernel's Landlock has no scopes.
    """
    version = abi()
    if version < SCOPE_ABI:
        return
    ruleset = _new_ruleset(0, 0, version)
    try:
        _enforce(ruleset)
    finally:
        os.close(ruleset)


def everything_but(
    hidden: Iterable[str],
    homes: Iterable[str],
    software: Iterable[str],
    listed: dict[str, tuple[int, int, int]] | None = None,
) -> Iterator[tuple[str, int]]:
    """Yield what together is the whole file system without what is ``hidden``.

    Each is a path and its type (``stat.S_IFDIR``, ``S_IFLNK``, or ``S_IFREG`` for the rest). The
    directories ``homes`` are shown also where they lie in something hidden. In them, entries
    whose names begin with a dot are left out, as that is where secrets lie, except what
    ``software`` names (``.local/bin``, say). All paths must be absolute and without links. What
    a link leads to is there on its own account, or is not. The directories that had to be listed
    are noted in ``listed``, with the state in which they were.
    """
    noted = {} if listed is None else listed
    concealed, dotted = frozenset(hidden), frozenset(homes)
    above = _parents(concealed | dotted)
    pending = list(_present(f"{home}/{name}" for home in dotted for name in software))
    for home in dotted - concealed:
        noted[home] = _state_of(home)
        pending += _below(home, may_be_dotted=False)
    pending.append(("/", stat.S_IFDIR))
    while pending:
        path, kind = pending.pop()
        if path in concealed or path in dotted:
            continue
        if path in above and kind == stat.S_IFDIR:
            noted[path] = _state_of(path)
            pending += _below(path, may_be_dotted=True)
        else:
            yield path, kind


def _below(directory: str, may_be_dotted: bool) -> list[tuple[str, int]]:
    """Return the entries of a directory, and their types."""
    prefix = directory.rstrip("/")
    try:
        with os.scandir(directory) as entries:
            return [
                (f"{prefix}/{entry.name}", _type_of(entry))
                for entry in entries
                if may_be_dotted or not entry.name.startswith(".")
            ]
    except OSError:
        return []  # who may not list it gets nothing of it


def _state_of(directory: str) -> tuple[int, int, int]:
    """Return what is different when something came to a directory, left it, or took its place."""
    try:
        status = os.stat(directory)
    except OSError:
        return 0, 0, 0
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _type_of(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    return stat.S_IFDIR if entry.is_dir(follow_symlinks=False) else stat.S_IFREG


def _present(paths: Iterable[str]) -> Iterator[tuple[str, int]]:
    for path in paths:
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            continue
        yield path, stat.S_IFMT(mode)


def _parents(paths: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found | {"/"}


def _handled(version: int) -> int:
    """Return the rights on files that a version of Landlock can take away."""
    return (1 << _FS_RIGHTS.get(version, 16)) - 1


def _new_ruleset(handled: int, network: int, version: int) -> int:
    scopes = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if version >= SCOPE_ABI else 0
    attributes = _RULESET.pack(handled, network, scopes)
    return system_call(
        LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0)
    )


def _opened(paths: Iterable[tuple[str, int]], rights: int) -> Iterator[tuple[int, int]]:
    """Open what is there, links apart, and say which of the rights fit it."""
    for path, type_ in paths:
        if type_ == stat.S_IFLNK:
            continue
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue  # gone meanwhile, or out of this user's reach anyway
        yield descriptor, rights if type_ == stat.S_IFDIR else rights & _FILE_RIGHTS


def _rule(descriptor: int, rights: int) -> bytes:
    return _PATH_BENEATH.pack(rights, descriptor)


def _add(ruleset: int, rule: bytes) -> None:
    if landlock_add_rule(LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0) != 0:
        raise OSError(ctypes.get_errno(), "landlock_add_rule")


def _enforce(ruleset: int) -> None:
    system_call(LANDLOCK_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
