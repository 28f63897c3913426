"""Be told that a file was written to, without looking again and again: inotify(7)."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path

from telemetry.logs import event

log = logging.getLogger("orchestrator.agent")

_IN_MODIFY = 0x00000002
_IN_CLOSE_WRITE = 0x00000008
_IN_Q_OVERFLOW = 0x00004000
_IN_DONT_FOLLOW = 0x02000000
_IN_ONESHOT = 0x80000000
_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows
_READ_BYTES = 64 * 1024
_UNWATCHED_SECONDS = 1.0


class WriteWatch:
    """Sets an event at the next write to a file, once.

    So a file costs the same whether it is written to a thousand times a second or once. One
    inotify instance serves all files, as a user may have few (128 by default).
    """

    def __init__(self) -> None:
        self._descriptor = -1
        self._waiting: dict[int, asyncio.Event] = {}
        self._has_failed = False

    def arm(self, path: Path, written: asyncio.Event) -> None:
        """Have ``written`` set at the next write; where that can't be known, in a second."""
        try:
            watch = self._add(path)
        except OSError as error:
            if not self._has_failed:
                event(log, "unwatched", level=logging.WARNING, path=path, error=str(error))
            self._has_failed = True
            asyncio.get_running_loop().call_later(_UNWATCHED_SECONDS, written.set)
        else:
            self._waiting[watch] = written

    def disarm(self, written: asyncio.Event) -> None:
        """Forget the files for which ``written`` was to be set."""
        for watch, is_written in list(self._waiting.items()):
            if is_written is written:
                del self._waiting[watch]
                _libc().inotify_rm_watch(self._descriptor, watch)

    def close(self) -> None:
        """Give the instance back."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _add(self, path: Path) -> int:
        if self._descriptor < 0:
            # looked up at the first use: an agent whose jobs are all short never needs it
            self._descriptor = _checked(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            asyncio.get_running_loop().add_reader(self._descriptor, self._take_events)
        mask = _IN_MODIFY | _IN_ONESHOT | _IN_DONT_FOLLOW
        return _checked(
            _libc().inotify_add_watch(self._descriptor, os.fsencode(path), ctypes.c_uint32(mask))
        )

    def _take_events(self) -> None:
        data = os.read(self._descriptor, _READ_BYTES)
        at = 0
        while at < len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, at)
            at += _EVENT.size + length
            if mask & _IN_Q_OVERFLOW:
                for is_written in self._waiting.values():
                    is_written.set()
            # a watch that fired, or whose file is gone, no longer exists
            elif is_written_or_none := self._waiting.pop(watch, None):
                is_written_or_none.set()


class TimedWatch(WriteWatch):
    """For files that another machine writes to, of which this one is not told."""

    def arm(self, path: Path, written: asyncio.Event) -> None:
        """Have ``written`` set in a second."""
        asyncio.get_running_loop().call_later(_UNWATCHED_SECONDS, written.set)


class DirectoryWatch:
    """Calls back when a file in a directory was written and closed, on this machine."""

    def __init__(self, path: Path, on_change: Callable[[], None]) -> None:
        """No error where that can't be known: whoever watches has to look now and then anyway."""
        self._on_change = on_change
        self._descriptor = -1
        try:
            self._descriptor = _checked(_libc().inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
            mask = ctypes.c_uint32(_IN_CLOSE_WRITE)
            _checked(_libc().inotify_add_watch(self._descriptor, os.fsencode(path), mask))
        except OSError as error:
            event(log, "unwatched", level=logging.WARNING, path=path, error=str(error))
            self.close()
        else:
            asyncio.get_running_loop().add_reader(self._descriptor, self._take_events)

    def close(self) -> None:
        """Give the instance back."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _take_events(self) -> None:
        os.read(self._descriptor, _READ_BYTES)
        self._on_change()


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
