"""What an ended job left becomes its result: a ZIP and the message that reports it.

A small one is made at once and in memory, as that takes less time than the way to a thread and
back; the rest in threads, so that heartbeats pass, and on the disk: ``result.zip`` and, once
that is whole, ``finished.json``.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import logging
import os
import signal
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent import plain_files, trees
from agent.attempt_directory import SMALL_BYTES, AttemptDirectory
from agent.captured_log import CapturedLog
from agent.outcomes import Exit, ExitKind, JobLost
from agent.records import Unreadable, decode_report, encode_report
from archive.writer import ZipWriter, zip_into
from jobs import JobState, Usage
from telemetry.logs import event
from wire.frames import READ_BYTES
from wire.messages import Assign, Finished, OutputLimits

log = logging.getLogger("orchestrator.results")

_FEW_FILES = 50
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GIVEN_UP = "given-up"
_NO_ROOM = (
    "the agent's disk has no room for the archive of the job's files;"
    " of its output only the logs are kept"
)


class Result:
    """The result of one attempt."""

    def __init__(self, directory: AttemptDirectory) -> None:
        self._directory = directory
        self._path = directory.path
        self._in_memory: bytes | None = None
        self._size = 0
        self._usage: Usage | None = None

    @property
    def is_small(self) -> bool:
        """Whether what the job left was small enough to be archived in memory."""
        return self._in_memory is not None

    async def make(self, ended: Exit, usage: Usage | None = None) -> Finished:
        """Archive what the job left, and return the message that reports it."""
        self._usage = usage
        try:
            return self._finish_in_memory(ended)
        except _NotSmall:
            return await asyncio.to_thread(self._finish_on_disk, ended)

    def _finish_in_memory(self, ended: Exit) -> Finished:
        """Spare a small archive the disk: a successor of the agent makes it again.

        Raises :class:`_NotSmall` before anything large is read.
        """
        tally = _Tally(SMALL_BYTES - sum(captured.size() for captured in self._directory.logs()))
        content, problem = self._zip_in_memory(tally.count(trees.walk(self._path / "job")))
        excess = self._excess(tally.contents())
        if excess:
            content, problem = self._zip_in_memory(())
        self._in_memory = content
        digest = hashlib.sha256(content).hexdigest()
        return self._finished(ended, (excess, problem), len(content), digest)

    def _zip_in_memory(self, entries: Iterable[trees.Entry]) -> tuple[bytes, str | None]:
        target = io.BytesIO()
        with zip_into(target, self._path) as writer:
            problem = write_files(writer, entries, self._directory.logs())
        return target.getvalue(), problem

    def _finish_on_disk(self, ended: Exit) -> Finished:
        excess = self._excess(
            measure(self._path / "job", self._directory.assign.output.result_files)
        )
        try:
            problem = self._archive(None if excess else self._path / "job")
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            excess = self._give_up_files(error)
            problem = self._archive(None)
        size = (self._path / "result.zip").stat().st_size
        report = self._finished(ended, (excess, problem), size, self._digest())
        plain_files.replace_text(self._path / "finished.json", encode_report(report))
        self._size = size
        return report

    def _finished(
        self, ended: Exit, flaws: tuple[str | None, str | None], size: int, digest: str
    ) -> Finished:
        state, outcome = _outcome(ended, self._directory.assign)
        excess, _ = flaws
        if excess and state is JobState.COMPLETED:
            state = JobState.FAILED
        return Finished(
            attempt_id=self._directory.assign.attempt_id,
            state=state,
            exit_code=ended.code if ended.kind is ExitKind.EXITED else None,
            message="; ".join(part for part in (outcome, *flaws) if part),
            result_size=size,
            result_sha256=digest,
            usage=self._usage,
        )

    def _excess(self, contents: Contents) -> str | None:
        """Say why the job's files can't be in the result, if they can't."""
        if os.path.lexists(f"{self._path}/{_GIVEN_UP}"):
            return _NO_ROOM  # found out before, perhaps before a crash
        return excess_of(contents, self._directory.assign.output)

    def _archive(self, top: Path | None) -> str | None:
        unfinished = self._path / "result.zip.new"
        try:
            with plain_files.open_new(unfinished) as target, zip_into(target, self._path) as writer:
                entries = () if top is None else trees.walk(top)
                problem = write_files(writer, entries, self._directory.logs())
            unfinished.rename(self._path / "result.zip")
        finally:
            unfinished.unlink(missing_ok=True)
        return problem

    def _give_up_files(self, error: OSError) -> str:
        """Remove the job's files, which the full disk has no room to archive, for the logs."""
        event(
            log,
            "result_given_up",
            level=logging.WARNING,
            job=self._directory.assign.job_id,
            attempt=self._directory.assign.attempt_id,
            error=str(error),
        )
        # a new name says it, and takes no space: an empty directory would look like a result
        with suppress(FileNotFoundError):
            (self._path / "job").rename(self._path / _GIVEN_UP)
        trees.remove_contents(self._path / _GIVEN_UP)
        return _NO_ROOM

    def report(self) -> Finished:
        """Return the report that :meth:`make` wrote. Raises :class:`JobLost` if it is damaged."""
        try:
            report = decode_report(plain_files.read_text(self._path / "finished.json"))
            digest = self._digest()
        except (OSError, Unreadable) as error:
            raise JobLost(f"the record of the result can't be read: {error}") from None
        # the archive itself was not synced: the machine may have gone down with a part of it
        if report.result_sha256 != digest:
            raise JobLost("the result archive is damaged")
        self._size = report.result_size
        return report

    def _digest(self) -> str:
        with plain_files.open_for_reading(self._path / "result.zip") as archive:
            return hashlib.file_digest(archive, "sha256").hexdigest()

    async def read(self, offset: int) -> bytes:
        """Return some chunks of the archive, at least one byte.

        Raises :class:`OSError`, or :class:`JobLost` if there is not as much as was reported.
        """
        if self._in_memory is not None:
            return self._in_memory[offset:]
        return await asyncio.to_thread(self._read_archive, offset)

    def _read_archive(self, offset: int) -> bytes:
        with plain_files.open_for_reading(self._path / "result.zip") as archive:
            if (size := os.fstat(archive.fileno()).st_size) != self._size:
                raise JobLost(f"it has {size} bytes, not {self._size}")
            return os.pread(archive.fileno(), READ_BYTES, offset)


def _outcome(ended: Exit, assign: Assign) -> tuple[JobState, str]:
    match ended.kind:
        case ExitKind.EXITED if ended.code == 0:
            return JobState.COMPLETED, ""
        case ExitKind.EXITED:
            return JobState.FAILED, f"run.sh ended with exit code {ended.code}"
        case ExitKind.SIGNALLED:
            name = signal.strsignal(ended.code) or "unknown"
            return JobState.FAILED, f"run.sh was ended by signal {ended.code} ({name})"
        case ExitKind.TIMEOUT:
            return JobState.FAILED, f"timed out after {assign.timeout_seconds} s"
        case ExitKind.KILLED:
            return JobState.KILLED, "Job terminated"
        case ExitKind.MEMORY:
            limit = readable_size(assign.resources.memory)
            if not ended.memory_used:  # the kernel did not let it
                return JobState.FAILED, f"needed more memory than its {limit}"
            used = readable_size(ended.memory_used)
            return JobState.FAILED, f"used {used} of memory, more than its {limit}"
        case ExitKind.ENDED_OUTSIDE:
            return JobState.FAILED, ended.message


def readable_size(size: int) -> str:
    """Return a number of bytes as people say it, in units of 1,024, such as ``9.1 GB``."""
    amount, unit = float(size), "B"
    for following in ("KB", "MB", "GB", "TB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, following
    return f"{amount:.1f}".removesuffix(".0") + f" {unit}"


@dataclass(frozen=True, slots=True)
class Contents:
    """How many files and directories there are, and how many bytes they hold, uncompressed."""

    files: int
    size: int


def measure(top: Path, limit: int) -> Contents:
    """Count what is below ``top``, up to one more than ``limit`` files."""
    files = size = 0
    for entry in trees.walk(top):
        files += 1
        size += _size_of(entry)
        if files > limit:
            break
    return Contents(files, size)


def _size_of(entry: trees.Entry) -> int:
    return entry.status.st_size if stat.S_ISREG(entry.status.st_mode) else 0


class _NotSmall(Exception):
    """There is more than may be handled at once."""


class _Tally:
    """Counts what passes by, as long as it is small."""

    def __init__(self, bytes_left: int) -> None:
        self._bytes_left = bytes_left
        self._files = self._size = 0

    def contents(self) -> Contents:
        """Return what has passed by."""
        return Contents(self._files, self._size)

    def count(self, entries: Iterable[trees.Entry]) -> Iterator[trees.Entry]:
        """Yield the entries. Raises :class:`_NotSmall` in the place of one that is too much."""
        self._check()
        for entry in entries:
            self._files += 1
            self._size += _size_of(entry)
            self._check()
            yield entry

    def _check(self) -> None:
        if self._files > _FEW_FILES or self._size > self._bytes_left:
            raise _NotSmall


def excess_of(contents: Contents, limits: OutputLimits) -> str | None:
    """Say what of a result is over the limits."""
    if contents.files > limits.result_files:
        return (
            f"the job left more than {limits.result_files} files,"
            " which is the limit (MAX_RESULT_FILES); of its output only the logs are kept"
        )
    if contents.size > limits.result_bytes:
        return (
            f"the files that the job left have {contents.size} bytes, more than the limit of"
            f" {limits.result_bytes} (MAX_RESULT_BYTES); of its output only the logs are kept"
        )
    return None


def write_files(
    writer: ZipWriter, entries: Iterable[trees.Entry], logs: Sequence[CapturedLog]
) -> str | None:
    """Write the files and the logs of a job; says what had to be left out."""
    skipped = 0
    taken: set[str] = set()
    log_names = {captured.path.name for captured in logs}
    for entry in entries:
        skipped += not trees.add_entry(writer, entry)
        taken |= {entry.archive_name} & log_names
    for captured in logs:
        status, name = captured.status(), captured.path.name
        if status is not None:
            writer.add(
                f"orchestrator-{name}" if name in taken else name, status, captured.content()
            )
    return f"{skipped} files or directories could not be put into the result" if skipped else None
