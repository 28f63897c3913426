"""One attempt's directory: all that must be known of it after a restart of the agent.

The files there say how far the attempt is:

    attempt.json   what is to be run, and since which boot   (the attempt is held)
    job/           the working directory      (being filled, then the job's own)
    exit.new       space for what follows     (the input is whole)
    ...            what the executor leaves for itself (``local``: the link ``process``)
    kill           the agent wants it ended
    dropped        the server does not want it
    exit           how the job ended
    result.zip     the archive, if it is not small
    finished.json  the report of the result   (the archive is whole)

The directory's name is the attempt's id and the incarnation of the database that gave it out;
``removed-`` stands before it while it is being removed.

Nothing is synced: all this is for a successor of the agent's process. After a restart of
the machine an attempt counts as lost, unless its archive has the digest of its report.

Small work on files is done at once, as it takes less time than the way to a thread and
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
from dataclasses import dataclass
from pathlib import Path

import jobs
from agent import input_files, plain_files, trees
from agent.captured_log import LOG_NAMES, CapturedLog
from agent.outcomes import JobInvalid, JobLost
from agent.records import (
    AttemptRecord,
    Incomplete,
    Unreadable,
    decode_attempt,
    encode_attempt,
)
from telemetry.logs import event
from wire import messages
from wire.messages import Assign

log = logging.getLogger("orchestrator.attempt_directory")

SMALL_BYTES = 64 * 1024
"""As many bytes of files are handled at once, without a thread."""

_RECORD_BYTES = 256  # see supervisor.py
_LONGEST_FILE_ENTRY = 1024  # bytes of attempt.json
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # ioctl_iflags(2), where a long has 8 bytes
_TOP_OF_DIRECTORIES = 0x00020000
_ATTEMPT = "attempt.json"
_BEFORE_INPUT = {_ATTEMPT, "job", "kill", "dropped"}
"""All that may be there while ``attempt.json`` is not whole: nothing is started before."""
_REMOVED = "removed-"


class AttemptDirectory:
    """One attempt on this machine, as far as files tell of it."""

    def __init__(
        self, path: Path, assign: Assign, incarnation: str = "", executor: str = ""
    ) -> None:
        """``incarnation`` is that of the server's database in which the attempt has its id.

        ``executor`` is the name of what starts the job, empty if that is not known.
        """
        self.path = path
        self.assign = assign
        self.incarnation = incarnation
        self.executor = executor
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
        except FileExistsError:
            # whose it is can't be read, else it would be held
            raise JobLost(f"{self.path} is in the way, whatever it is") from None
        (self.path / "job").mkdir()
        input_files.make_directories(self.path / "job", (file.name for file in self.assign.files))
        record = AttemptRecord(self.assign, _boot_id(), self.incarnation, self.executor)
        # nothing to rename: half of it is known as such, and nobody has claimed the directory yet
        with plain_files.open_new(self.path / _ATTEMPT) as file:
            file.write(encode_attempt(record).encode())

    @classmethod
    def read(cls, path: Path) -> AttemptDirectory:
        """Return an attempt that an earlier process of the agent has left.

        Raises :class:`Unreadable` or :class:`OSError`.
        """
        record = decode_attempt(plain_files.read_text(path / _ATTEMPT))
        directory = cls(path, record.assign, record.incarnation, record.executor)
        directory._input_offset = directory._measure_input()
        directory.is_of_this_boot = record.boot == _boot_id()
        return directory

    def exists(self) -> bool:
        """Whether there is a directory, or something in its way."""
        return os.path.lexists(self.path)

    def has_input(self) -> bool:
        """Whether the whole input is there and was checked; not asked of a job that was started."""
        return os.path.lexists(f"{self.path}/exit.new")

    def has_result(self) -> bool:
        """Whether the result was made and lies on the disk."""
        return os.path.lexists(f"{self.path}/finished.json")

    def mark_to_be_killed(self) -> None:
        """Have the job end, or never start, by whoever sees this mark."""
        plain_files.mark(self.path / "kill")

    def is_to_be_killed(self) -> bool:
        """Whether the job is to end, perhaps by the wish of an earlier process of the agent."""
        return os.path.lexists(f"{self.path}/kill")

    def mark_dropped(self) -> None:
        """Note that the server does not want the attempt: no later process is to report it."""
        plain_files.mark(self.path / "dropped")

    def is_dropped(self) -> bool:
        """Whether the server said that it does not want the attempt."""
        return os.path.lexists(f"{self.path}/dropped")

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
        """Remove everything; to be called in a thread, unless the job is known to be small."""
        # another name first: half a directory must not be taken for an attempt after a crash
        removed = self.path.with_name(f"{_REMOVED}{self.path.name}")
        with suppress(FileNotFoundError):
            self.path.rename(removed)
        trees.remove_tree(removed)

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
        with plain_files.open_new(self.path / "exit.new") as target:
            target.write(b" " * _RECORD_BYTES)

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


@dataclass(frozen=True, slots=True)
class Found:
    """What earlier processes of the agent have left: attempts, and what can't be read.

    Of the latter something may run.
    """

    attempts: list[AttemptDirectory]
    unreadable: list[Path]


def path_of(root: Path, attempt_id: int, incarnation: str) -> Path:
    """Return where an attempt has its directory."""
    return root / (f"{attempt_id}.{incarnation}" if incarnation else str(attempt_id))


def find_all(root: Path) -> Found:
    """Return what is under ``root``; removes what is surely incomplete and was never claimed."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    _tell_unrelated(root)
    found = Found([], [])
    for path in sorted(root.iterdir()):
        if path.name.startswith(_REMOVED):
            _try_to_remove(path)
            continue
        try:
            found.attempts.append(AttemptDirectory.read(path))
        except (FileNotFoundError, NotADirectoryError, Incomplete) as error:
            if _is_claimed(path):
                found.unreadable.append(path)
            else:
                event(log, "directory_removed", level=logging.WARNING, path=path, error=str(error))
                _try_to_remove(path)
        except (OSError, Unreadable) as error:
            event(log, "attempt_unreadable", level=logging.ERROR, path=path, error=str(error))
            found.unreadable.append(path)
    return found


def _is_claimed(path: Path) -> bool:
    """Whether an executor may have started something there; also if that can't be found out."""
    try:
        return not set(os.listdir(path)) <= _BEFORE_INPUT
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


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
    would skip all that were deleted of late, one by one, at each file that is made.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # other file systems have no such attribute, and no such trouble
        with suppress(OSError):
            flags = struct.unpack("q", fcntl.ioctl(descriptor, _GET_FLAGS, bytes(8)))[0]
            fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("q", flags | _TOP_OF_DIRECTORIES))
    finally:
        os.close(descriptor)
