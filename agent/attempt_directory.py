"""One attempt's directory: all that must be known of it after a restart of the agent.

The files there say how far the attempt is:

    attempt.json   the Assign message, the boot   (the attempt is held)
    job/           the working directory      (being filled, then the job's own)
    exit.new       space for what follows     (the input is whole)
    executor       a link whose text is the name of what starts the job
    ...            what that leaves for itself (``local``: the link ``process``)
    kill           the agent wants it ended
    exit           how the job ended
    result.zip     the archive, if it is not small
    finished.json  the Finished message       (the archive is whole)

Nothing is synced: all this is for a successor of the agent's process. After a restart of
the machine an attempt counts as lost, unless its archive has the digest of its report.

A little work on files is done at once, as it takes less time than the way to a thread and
back; the rest in threads, so that heartbeats pass.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import hashlib
import logging
import os
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import jobs
from agent import input_files, trees
from agent.captured_log import LOG_NAMES, CapturedLog
from agent.outcomes import JobInvalid, JobLost
from telemetry.logs import event
from wire import codec, messages
from wire.messages import Assign

log = logging.getLogger("orchestrator.attempt_directory")

SMALL_BYTES = 64 * 1024
"""As many bytes of files are handled at once, without a thread."""

_RECORD_BYTES = 256  # see supervisor.py
_LONGEST_FILE_ENTRY = 1024  # bytes of attempt.json
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # ioctl_iflags(2), where a long has 8 bytes
_TOP_OF_DIRECTORIES = 0x00020000
_ATTEMPT = "attempt.json"
_EXECUTOR = "executor"


class AttemptDirectory:
    """One attempt on this machine, as far as files tell of it."""

    def __init__(self, path: Path, assign: Assign) -> None:
        self.path = path
        self.assign = assign
        self.is_of_this_boot = True
        self._input_offset = 0
        self._whole: dict[str, str] = {}  # SHA-256 of the input files that came in one piece

    # --- making and finding

    async def create(self) -> None:
        """Make the directory of a new attempt. Raises :class:`JobInvalid` for unsafe names."""
        _check_names(self.assign)
        self._input_offset = 0
        self._whole.clear()
        segments = sum(file.name.count("/") + 1 for file in self.assign.files)
        await _promptly(segments * _LONGEST_FILE_ENTRY, self._make)

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:  # of an agent that died before it had written attempt.json
            trees.remove_tree(self.path)
            self.path.mkdir(mode=0o700)
        (self.path / "job").mkdir()
        input_files.make_directories(self.path / "job", (file.name for file in self.assign.files))
        # nothing to rename: half of it can't be read, and the directory then counts for nothing
        text = f"{_boot_id()}\n{codec.encode(self.assign)}"
        (self.path / _ATTEMPT).write_text(text, encoding="utf-8")

    @classmethod
    def find_all(cls, root: Path) -> list[AttemptDirectory]:
        """Return the attempts under ``root``; removes what is too incomplete to be one."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _tell_unrelated(root)
        found: list[AttemptDirectory] = []
        for path in sorted(root.iterdir()):
            try:
                boot, text = (path / _ATTEMPT).read_text(encoding="utf-8").splitlines()
                message = codec.decode(text)
            except (OSError, ValueError, messages.ProtocolError) as error:
                event(
                    log,
                    "directory_removed",
                    level=logging.WARNING,
                    path=path,
                    error=str(error),
                )
                _try_to_remove(path)
                continue
            if isinstance(message, Assign):
                directory = cls(path, message)
                directory._input_offset = directory._measure_input()
                directory.is_of_this_boot = boot == _boot_id()
                found.append(directory)
        return found

    def has_input(self) -> bool:
        """Whether the whole input is there and was checked; not asked of a job that was started."""
        return (self.path / "exit.new").exists()

    def has_result(self) -> bool:
        """Whether the result was made and lies on the disk."""
        return (self.path / "finished.json").exists()

    def claim(self, executor: str) -> None:
        """Write down which executor is about to start the job.

        Raises :class:`JobLost` if it was another: then it may run there.
        """
        try:
            # a link to nowhere: there whole or not at all, in one call
            (self.path / _EXECUTOR).symlink_to(executor)
        except FileExistsError:
            if (other := self.executor()) != executor:
                raise JobLost(
                    f"it was started by the executor {other!r}, which this agent no longer uses"
                ) from None

    def executor(self) -> str | None:
        """Return the name of the executor that started the job, or was about to; None if none."""
        with suppress(FileNotFoundError):
            return os.readlink(self.path / _EXECUTOR)
        return None

    def mark_to_be_killed(self) -> None:
        """Have the job not start any more, or end, whoever sees this mark."""
        (self.path / "kill").touch()

    def is_to_be_killed(self) -> bool:
        """Whether the job is to end, perhaps by the wish of an earlier process of the agent."""
        return (self.path / "kill").exists()

    def logs(self) -> tuple[CapturedLog, ...]:
        """Return the job's captured output, as far as it is."""
        limit = self.assign.output.log_bytes
        return tuple(CapturedLog(self.path / name, limit) for name in LOG_NAMES)

    def check_boot(self) -> None:
        """Raise :class:`JobLost` if the machine was restarted since the attempt came.

        Nothing but a finished result, which has a digest, can be trusted then: nothing is
        synced, so the job may have been started, or have ended, without a trace or with half
        of its files.
        """
        if not self.is_of_this_boot:
            raise JobLost("the machine was restarted before the job had finished")

    def remove(self) -> None:
        """Remove everything; in a thread, unless little is there."""
        # this first: half a directory must not be taken for an attempt after a crash
        (self.path / _ATTEMPT).unlink(missing_ok=True)
        trees.remove_tree(self.path)

    # --- input

    @property
    def input_size(self) -> int:
        """How many bytes all input files have together."""
        return sum(file.size for file in self.assign.files)

    @property
    def input_offset(self) -> int:
        """How many bytes of the input, taken as one stream, are here."""
        return self._input_offset

    async def write_input(self, data: bytes) -> None:
        """Append to the input stream, which fills the files in their order."""
        await _promptly(len(data), self._write_input, data)

    def _write_input(self, data: bytes) -> None:
        start = 0
        for file in self.assign.files:
            end = start + file.size
            while data and start <= self._input_offset < end:
                part = data[: end - self._input_offset]
                with input_files.append_to(self.path / "job", file.name) as target:
                    target.write(part)
                if len(part) == file.size:
                    self._whole[file.name] = hashlib.sha256(part).hexdigest()
                self._input_offset += len(part)
                data = data[len(part) :]
            start = end
        if data:
            raise messages.ProtocolError(f"attempt {self.assign.attempt_id}: too much input")

    async def accept_input(self) -> None:
        """Check the whole input and mark it as accepted. Raises :class:`JobLost` if it is wrong."""
        await _promptly(self.input_size, self._accept_input)

    def _accept_input(self) -> None:
        for file in self.assign.files:
            if file.size == 0:
                input_files.append_to(self.path / "job", file.name).close()
            if (self._whole.get(file.name) or self._sha256_of_input(file.name)) != file.sha256:
                raise JobLost(f"the input file {file.name!r:.300} arrived damaged")
        # space for the exit record, which the supervisor writes over it: a full disk must not
        # make a job that has ended look like one that was lost
        (self.path / "exit.new").write_bytes(b" " * _RECORD_BYTES)

    def _sha256_of_input(self, name: str) -> str:
        with input_files.read_from(self.path / "job", name) as source:
            return hashlib.file_digest(source, "sha256").hexdigest()

    def _measure_input(self) -> int:
        total = 0
        for file in self.assign.files:
            try:
                with input_files.read_from(self.path / "job", file.name) as source:
                    size = os.fstat(source.fileno()).st_size
            except FileNotFoundError:
                return total
            total += min(size, file.size)
            if size < file.size:
                break
        return total


def sha256_of(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _check_names(assign: Assign) -> None:
    names = [file.name for file in assign.files]
    for name in names:
        if problem := jobs.file_name_problem(name):
            raise JobInvalid(f"the file name {name!r:.300} {problem}")
    if problem := jobs.file_names_problem(names):
        raise JobInvalid(problem)
    if jobs.RUN_SCRIPT not in names:
        raise JobInvalid(f"there is no {jobs.RUN_SCRIPT}")


async def _promptly(size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call a function that handles ``size`` bytes of files: here if few, else in a thread."""
    if size <= SMALL_BYTES:
        function(*arguments)
    else:
        await asyncio.to_thread(function, *arguments)


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _try_to_remove(path: Path) -> None:
    """Remove a left-over; what resists must not keep the agent from starting."""
    try:
        trees.remove_tree(path)
    except OSError as error:
        event(log, "remove_failed", level=logging.ERROR, path=path, error=str(error))


def _tell_unrelated(root: Path) -> None:
    """Tell the file system that the directories in ``root`` have nothing to do with each other.

    ext4 then spreads them over the disk (chattr(1), attribute T). Within one group of inodes it
    would pass over all that were deleted of late, one by one, at each file that is made.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # other file systems have no such attribute, and no such trouble
        with suppress(OSError):
            flags = struct.unpack("q", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8)))[0]
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("q", flags | _TOP_OF_DIRECTORIES))
    finally:
        os.close(descriptor)
