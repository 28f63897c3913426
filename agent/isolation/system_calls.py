"""System calls for which the C library has no function, or one that does too much.

They are made for the calling thread alone: glibc's ``setuid(2)`` changes all threads, and the
child of a thread inherits what that thread has given up. Standard library only, and little of
it, since it is loaded into the process that every supervisor is forked from.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
landlock_add_rule = ctypes.CDLL(None, use_errno=True).syscall
"""The same function, its types declared, which is faster: number, ruleset, type, rule, flags."""

landlock_add_rule.restype = ctypes.c_long
landlock_add_rule.argtypes = [
    *(ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
]
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

_NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {"setgroups": 116, "setresuid": 117, "setresgid": 119},
    "aarch64": {"setresuid": 147, "setresgid": 149, "setgroups": 159},
}
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
"""The same on every machine, as all system calls are since Linux 5.1."""

_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4


def system_call(number: int, *arguments: object) -> int:
    """Make a system call. Raises :class:`OSError` if it fails."""
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def process_control(option: int, *arguments: int) -> int:
    """Call prctl(2). Raises :class:`OSError` if it fails."""
    padded = [*arguments, 0, 0, 0, 0][:4]
    result: int = _libc.prctl(option, *padded)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
    return result


def is_machine_known() -> bool:
    """Whether the numbers of the calls that give up root are known for this machine."""
    return os.uname().machine in _NUMBERS


def give_up_root(uid: int, gid: int, groups: list[int]) -> None:
    """Become another user in this thread for good, without any capability."""
    numbers = _NUMBERS[os.uname().machine]
    process_control(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    array = (ctypes.c_uint32 * len(groups))(*groups)
    system_call(numbers["setgroups"], ctypes.c_size_t(len(groups)), array)
    group, user = ctypes.c_uint32(gid), ctypes.c_uint32(uid)
    system_call(numbers["setresgid"], group, group, group)
    system_call(numbers["setresuid"], user, user, user)


def forbid_new_privileges() -> None:
    """Have setuid programs run without their privileges from here on, in all descendants."""
    process_control(_PR_SET_NO_NEW_PRIVS, 1)
