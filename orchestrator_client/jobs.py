"""A job, as the synchronous client has it."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

from orchestrator_client import downloads, job_output, operations, results, waiting
from orchestrator_client.extraction import Extraction
from orchestrator_client.lockstep import iterate, run
from orchestrator_client.records import JobFile, JobInfo
from orchestrator_client.retries import Sender
from orchestrator_client.uploads import Progress


class Job:
    """A handle of one job. ``info`` is what was last heard of it, None before anything was."""

    def __init__(self, sender: Sender, job_id: int, info: JobInfo | None = None) -> None:
        self.id = job_id
        self.info = info
        self._sender = sender

    def __repr__(self) -> str:
        return f"Job({self.id})"

    def show(self) -> JobInfo:
        """Ask for all about it."""
        self.info = run(operations.show(self._sender, self.id))
        return self.info

    def history(self) -> list[dict[str, Any]]:
        """Return the changes of its state, oldest first."""
        return run(operations.history(self._sender, self.id))

    def wait(self, timeout: float | None = None) -> JobInfo:
        """Wait until it has ended, also over restarts of the server; ``timeout`` in seconds.

        Raises :class:`WaitTimeout`. A job that failed is returned like any other; see
        :meth:`result` and :meth:`check`.
        """
        self.info = run(waiting.wait_for_end(self._sender, self.id, timeout))
        return self.info

    def check(self, timeout: float | None = None) -> JobInfo:
        """Wait for it, and raise :class:`JobFailed` if it did not end as ``Completed``."""
        return waiting.check_success(self.wait(timeout))

    def logs(self, stream: str = "stdout", *, follow: bool = False) -> Iterator[str]:
        """Yield the lines that it printed; with ``follow`` until it has ended."""
        return iterate(job_output.lines_of(self._output(stream, follow)))

    def output(self, stream: str = "stdout", *, follow: bool = False) -> Iterator[bytes]:
        """Yield the bytes that it printed, as they come; with ``follow`` until it has ended."""
        return iterate(self._output(stream, follow))

    def output_end(self, stream: str = "stdout", size: int = 65536) -> bytes:
        """Return the last bytes that it printed so far, ``size`` of them at most."""
        return run(job_output.read_end(self._sender, self.id, stream, size))

    def _output(self, stream: str, follow: bool) -> AsyncGenerator[bytes, None]:
        read = job_output.follow_output if follow else job_output.read_output
        return read(self._sender, self.id, stream)

    def terminate(self) -> None:
        """End it. Raises :class:`Conflict` if it has ended already."""
        run(operations.terminate(self._sender, self.id))

    def rerun(self, *, idempotency_key: str | None = None) -> Job:
        """Submit it once more, as a new job."""
        return Job(self._sender, run(operations.rerun(self._sender, self.id, idempotency_key)))

    def delete(self) -> None:
        """Free its bytes. Raises :class:`Conflict` if it has not ended."""
        run(operations.delete(self._sender, self.id))

    # --- files

    def files(self) -> list[JobFile]:
        """List its files: the result, or the input before there is one."""
        return list(iterate(operations.list_files(self._sender, self.id)))

    def read(self, path: str) -> bytes:
        """Return one of its files."""
        where = operations.file_path(self.id, path)
        return b"".join(iterate(downloads.read_pieces(self._sender, where)))

    def stream(self, path: str) -> Iterator[bytes]:
        """Yield one of its files in pieces, as they come."""
        where = operations.file_path(self.id, path)
        return iterate(downloads.read_pieces(self._sender, where))

    def save(
        self, path: str, target: str | os.PathLike[str], progress: Progress | None = None
    ) -> None:
        """Save one of its files as ``target``, in one step."""
        where = operations.file_path(self.id, path)
        run(downloads.download(self._sender, where, Path(target), progress))

    def download(
        self,
        target: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Wait for it, and save its result as a ZIP. Raises :class:`JobFailed`."""
        waiting.check_result(self.wait(timeout))
        run(downloads.download(self._sender, f"/download/{self.id}", Path(target), progress))

    def download_partial(
        self, target: str | os.PathLike[str], progress: Progress | None = None
    ) -> None:
        """Save a ZIP of its files as they are now, whatever its state."""
        where = f"/download_partial/{self.id}"
        run(downloads.download(self._sender, where, Path(target), progress))

    def result(
        self,
        directory: str | os.PathLike[str],
        *,
        timeout: float | None = None,
        progress: Progress | None = None,
        unpack_progress: Progress | None = None,
    ) -> Extraction:
        """Wait for it, and unpack its result into a directory. Raises :class:`JobFailed`.

        All of it or nothing; see :func:`orchestrator_client.extraction.extract`.
        """
        waiting.check_result(self.wait(timeout))
        where = f"/download/{self.id}"
        return run(results.unpack(self._sender, where, directory, progress, unpack_progress))

    def partial_result(
        self,
        directory: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        unpack_progress: Progress | None = None,
    ) -> Extraction:
        """Unpack its files as they are now, whatever its state: also what a failed job left."""
        where = f"/download_partial/{self.id}"
        return run(results.unpack(self._sender, where, directory, progress, unpack_progress))
