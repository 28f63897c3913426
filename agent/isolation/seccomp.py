"""Doors that Landlock leaves open and that are system calls: a filter closes them.

- Kernel keyrings (Kerberos tickets, for example) belong to a user, not to a process.
- ``prlimit(2)`` on another process of the same user can end it (a CPU limit of no seconds).
- Without the network: every socket but those of this machine's own kinds (``AF_UNIX``,
  ``AF_NETLINK``), and io_uring, which makes sockets past the filter.

A filter is a program of the classic BPF, made here by hand for the machines whose numbers are
known; the 32-bit calls of a 64-bit machine are covered as well. Standard library only.
Sources: seccomp(2), include/uapi/linux/seccomp.h, asm/unistd.h.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct

from agent.isolation.system_calls import process_control

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_INSTRUCTION = struct.Struct("=HBBI")
_X32_BIT = 0x40000000
_AF_UNIX, _AF_NETLINK = 1, 16

_KEYRINGS = ("add_key", "request_key", "keyctl")
_X86_64, _I386, _AARCH64, _ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028

_IO_URING_SETUP = 425

_NUMBERS: dict[int, dict[str, int]] = {
    _X86_64: {"prlimit": 302, "socket": 41, "add_key": 248, "request_key": 249, "keyctl": 250},
    _I386: {"prlimit": 340, "socket": 359, "add_key": 286, "request_key": 287, "keyctl": 288},
    _AARCH64: {"prlimit": 261, "socket": 198, "add_key": 217, "request_key": 218, "keyctl": 219},
    _ARM: {"prlimit": 369, "socket": 281, "add_key": 309, "request_key": 310, "keyctl": 311},
}
_I386_SOCKETCALL = 102
_MACHINES = {"x86_64": (_X86_64, _I386), "aarch64": (_AARCH64, _ARM)}


@functools.cache
def is_supported() -> bool:
    """Whether a filter for this machine is known and its kernel has filters."""
    if os.uname().machine not in _MACHINES:
        return False
    try:
        process_control(_PR_SET_SECCOMP, _MODE_FILTER, 0)
    except OSError as error:
        return error.errno == errno.EFAULT  # it looked for the filter
    return False


def restrict(without_network: bool) -> None:
    """Install the filter in this thread; needs no_new_privs. Raises :class:`OSError`."""
    program = _PROGRAMS[without_network]
    header = struct.pack("=H6xQ", len(program) // _INSTRUCTION.size, ctypes.addressof(program))
    pointer = ctypes.create_string_buffer(header, len(header))
    process_control(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(pointer))


def _program(architectures: tuple[int, ...], without_network: bool) -> bytes:
    code: list[bytes] = []
    for architecture in architectures:
        part = _filter_for(architecture, without_network)
        code += [_load(_ARCHITECTURE_AT), _test(_EQUAL, architecture, 0, len(part)), *part]
    return b"".join([*code, _refuse(errno.ENOSYS)])


def _filter_for(architecture: int, without_network: bool) -> list[bytes]:
    """Return the instructions for the calls of one architecture; each way ends in a return."""
    numbers = _NUMBERS[architecture]
    part = [_load(_NUMBER_AT)]
    if architecture == _X86_64:
        part += [_test(_GREATER_OR_EQUAL, _X32_BIT, 0, 1), _refuse(errno.ENOSYS)]
    for name in _KEYRINGS:
        part += [_test(_EQUAL, numbers[name], 0, 1), _refuse(errno.ENOSYS)]
    part += [_test(_EQUAL, numbers["prlimit"], 0, 8), *_own_limits_only()]
    if without_network:
        part += [_test(_EQUAL, _IO_URING_SETUP, 0, 1), _refuse(errno.ENOSYS)]
        if architecture == _I386:
            part += [_test(_EQUAL, _I386_SOCKETCALL, 0, 1), _refuse(errno.EACCES)]
        part += [_test(_EQUAL, numbers["socket"], 0, 4), _load(_ARGUMENTS_AT)]
        part += [_test(_EQUAL, _AF_UNIX, 2, 0), _test(_EQUAL, _AF_NETLINK, 1, 0)]
        part += [_refuse(errno.EACCES)]
    return [*part, _allow()]


def _own_limits_only() -> list[bytes]:
    """Allow prlimit(2) for the caller (pid 0), and for others without a new limit."""
    return [
        _load(_ARGUMENTS_AT),
        _test(_EQUAL, 0, 4, 0),
        _load(_ARGUMENTS_AT + 2 * 8),
        _test(_EQUAL, 0, 0, 3),
        _load(_ARGUMENTS_AT + 2 * 8 + 4),
        _test(_EQUAL, 0, 0, 1),
        _allow(),
        _refuse(errno.EPERM),
    ]


def _load(offset: int) -> bytes:
    return _INSTRUCTION.pack(_LOAD, 0, 0, offset)


def _test(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    """Skip so many instructions, depending on how the loaded word compares with a value."""
    return _INSTRUCTION.pack(kind, if_true, if_false, value)


def _refuse(code: int) -> bytes:
    return _INSTRUCTION.pack(_RETURN, 0, 0, _ERRNO | code)


def _allow() -> bytes:
    return _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)


def _loaded(without_network: bool) -> ctypes.Array[ctypes.c_char]:
    program = _program(_MACHINES.get(os.uname().machine, ()), without_network)
    return ctypes.create_string_buffer(program, len(program))


_PROGRAMS = {False: _loaded(False), True: _loaded(True)}
"""Made once, before the fork: a job is to wait for no more than it must."""
