"""ZIPs of jobs that run, each made for one request and gone with it."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from agent.attempt_directory import JobDirectory, SnapshotImpossible
from wire.frames import CHUNK_BYTES

_AT_A_TIME = 4


class Snapshots:
    """Makes the ZIPs, in a thread of its own, so that jobs do not wait for them."""

    def __init__(self, root: Path) -> None:
        """``root`` is for the ZIPs alone; what an earlier process left there is removed."""
        shutil.rmtree(root, ignore_errors=True)
        self._root = root
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._present = 0
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def of(self, directory: JobDirectory) -> AsyncIterator[Path]:
        """Give a ZIP of the directory as it is now, which is removed in the end.

        Raises :class:`SnapshotImpossible` with the reason.
        """
        if self._present >= _AT_A_TIME:
            raise SnapshotImpossible(
                "the agent is busy with other requests of this kind; try again"
            )
        self._present += 1
        path, stop = self._root / f"{next(self._numbers)}.zip", threading.Event()
        self._root.mkdir(mode=0o700, exist_ok=True)
        making = self._thread.submit(directory.snapshot, path, stop)
        try:
            await asyncio.wrap_future(making)
            yield path
        except OSError as error:
            raise SnapshotImpossible(f"the agent can't archive it: {error.strerror}") from None
        finally:
            stop.set()
            # at once, or by the thread when it has noticed
            making.add_done_callback(lambda _: path.unlink(missing_ok=True))
            self._present -= 1

    def close(self) -> None:
        """Make no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def read_piece(path: Path, offset: int) -> bytes:
    """Return one chunk of a ZIP; nothing if it was removed, for then nobody wants it."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return os.pread(file.fileno(), CHUNK_BYTES, offset)
    return b""
