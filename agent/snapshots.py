"""ZIPs of jobs that run, each made for one request and gone with it."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from agent import results, trees
from agent.attempt_directory import AttemptDirectory
from agent.attempts import Attempt
from archive.writer import new_zip
from wire import messages
from wire.frames import CHUNK_BYTES, Stream, transfer_id
from wire.outbox import Outbox

_AT_A_TIME = 4


class SnapshotImpossible(Exception):
    """The job's files can't be archived while it runs; the message says why."""


def archive(directory: AttemptDirectory, target: Path, stop: threading.Event) -> None:
    """Archive to ``target`` what a job has now, while it goes on; until ``stop`` is set.

    What changes meanwhile may be in it in a state of any moment, or be missing. Raises
    :class:`SnapshotImpossible` if it is more than a result may be.
    """
    limits, top = directory.assign.output, directory.path / "job"
    if results.excess_of(results.measure(top, limits.result_files), limits):
        raise SnapshotImpossible("the job's files are more, or larger, than a result may be")
    with new_zip(target) as writer:
        results.write_files(writer, _until(stop, trees.walk(top)), directory.logs())


def _until(stop: threading.Event, entries: Iterator[trees.Entry]) -> Iterator[trees.Entry]:
    for entry in entries:
        if stop.is_set():
            raise SnapshotImpossible("it is no longer wanted")
        yield entry


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
    async def of(self, directory: AttemptDirectory) -> AsyncIterator[Path]:
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
        making = self._thread.submit(archive, directory, path, stop)
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


class SnapshotRequests:
    """The requests of one connection, each answered by a task of its own."""

    def __init__(self, snapshots: Snapshots, outbox: Outbox, tasks: asyncio.TaskGroup) -> None:
        self._snapshots = snapshots
        self._outbox = outbox
        self._tasks = tasks
        self._answers: dict[int, asyncio.Task[None]] = {}

    def answer(self, request_id: int, attempt: Attempt | None) -> None:
        """Make and send a ZIP of the attempt; says so if there is no such attempt."""
        self.withdraw(request_id)
        self._answers[request_id] = self._tasks.create_task(
            self._answer(request_id, attempt), name=f"snapshot {request_id}"
        )

    def withdraw(self, request_id: int) -> None:
        """Forget a request, answered or not."""
        if answer := self._answers.pop(request_id, None):
            answer.cancel()

    def close(self) -> None:
        """Forget them all."""
        for request_id in list(self._answers):
            self.withdraw(request_id)

    async def _answer(self, request_id: int, attempt: Attempt | None) -> None:
        """Ends by cancellation, when the server or the connection does."""
        transfer = transfer_id(request_id, Stream.SNAPSHOT)
        try:
            if attempt is None:
                raise SnapshotImpossible("the agent no longer has the job")
            async with self._snapshots.of(attempt.directory) as path:
                if attempt.is_gone:
                    raise SnapshotImpossible("the job has ended meanwhile")

                async def source(offset: int) -> bytes:
                    return await asyncio.to_thread(_read_piece, path, offset)

                size = path.stat().st_size
                self._outbox.put(messages.SnapshotReady(request_id, size))
                failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._outbox.open(transfer, source, 0, size, failed.set_exception)
                await failed
        except (SnapshotImpossible, OSError) as error:
            self._outbox.put(messages.SnapshotRefused(request_id, str(error)))
        finally:
            self._outbox.close(transfer)


def _read_piece(path: Path, offset: int) -> bytes:
    """Return one chunk of a ZIP; nothing if it was removed, for then nobody wants it."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        return os.pread(file.fileno(), CHUNK_BYTES, offset)
    return b""
