"""One job on this machine: directory, process tree, output, exit code, result archive.

Everything that must be known after a restart of the agent lies in the attempt's
directory; the files there say how far the attempt is:

    attempt.json   the Assign message, the boot   (the attempt is held)
    job/           the working directory      (being filled, then the job's own)
    exit.new       space for what follows     (the input is whole)
    process        a link whose text is pid and start time of the supervisor   (it was started)
    kill           the agent wants it ended
    exit           how the job ended
    result.zip     the archive, if it is not little
    finished.json  the Finished message       (the archive is whole)

Nothing is synced: all this is for a successor of the agent's process. After a restart of
the machine an attempt counts as lost, unless its archive has the digest of its report.

A little work on files is done at once, as it takes less time than the way to a thread and
back; the rest in threads, so that heartbeats pass.
"""

from __future__ import annotations

import asyncio
import ctypes
import enum
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import jobs
from agent.supervision.launcher import Launcher, LaunchRequest, LifeLine
from archive import writer as archive
from archive.writer import ZipWriter
from jobs import JobState
from wire import codec, messages
from wire.frames import READ_BYTES
from wire.messages import Assign, AttemptPhase, Finished, OutputLimits

log = logging.getLogger("orchestrator.runner")

_DIRECTORY_VARIABLE = "ORCHESTRATOR_JOB_DIRECTORY"
_KILL_PAUSE_SECONDS = 0.01
_RECORD_BYTES = 256  # see supervisor.py
_START_TRIES = 3
_FEW_FILES = 50
_LONGEST_FILE_ENTRY = 1024  # bytes of attempt.json
_LITTLE_BYTES = 64 * 1024
_TRIM_BYTES = 1024 * 1024  # a smaller gap, or one that grew by less, is not worth a call
_PUNCH_HOLE, _KEEP_SIZE = 0x02, 0x01  # fallocate(2)
_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602  # ioctl_iflags(2), where a long has 8 bytes
_TOP_OF_DIRECTORIES = 0x00020000
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_GIVEN_UP = "given-up"
_NO_ROOM = (
    "the agent's disk has no room for the archive of the job's files;"
    " of its output only the logs are kept"
)
_ATTEMPT = "attempt.json"

_PASSED_VARIABLES = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "MODULEPATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    ]
)
_PASSED_PREFIXES = ("LC_",)

_LOG_NAMES = {"stdout.log": "orchestrator-stdout.log", "stderr.log": "orchestrator-stderr.log"}
"""The captured output and, if the job has a file of that name, the name it gets instead."""


class JobLost(Exception):
    """The attempt can't go on here; the message says why. Another attempt may succeed."""


class JobInvalid(Exception):
    """The job can't run anywhere; the message says why."""


class SnapshotImpossible(Exception):
    """The job's files can't be archived while it runs; the message says why."""


class ExitKind(enum.StrEnum):
    """How the supervisor saw the job end."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    TIMEOUT = "timeout"
    KILLED = "killed"


@dataclass(frozen=True, slots=True)
class Exit:
    """How a job ended; ``code`` is the exit code or the signal's number."""

    kind: ExitKind
    code: int = 0


@dataclass(frozen=True, slots=True)
class _ProcessIdentity:
    pid: int
    start: int


class JobDirectory:
    """One attempt on this machine."""

    def __init__(self, path: Path, assign: Assign) -> None:
        self.path = path
        self.assign = assign
        self._input_offset = 0
        self._whole: dict[str, str] = {}  # SHA-256 of the input files that came in one piece
        self._is_of_this_boot = True
        self._life_line: LifeLine | None = None
        self._little_archive: bytes | None = None

    # --- making and finding

    async def create(self) -> None:
        """Make the directory of a new attempt. Raises :class:`JobInvalid` for unsafe names."""
        _check_names(self.assign)
        self._input_offset = 0
        self._whole.clear()
        await _promptly(len(self.assign.files) * _LONGEST_FILE_ENTRY, self._make)

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True)
        except FileExistsError:  # of an agent that died before it had written attempt.json
            _remove_tree(self.path)
            self.path.mkdir(mode=0o700)
        (self.path / "job").mkdir()
        # nothing to rename: half of it can't be read, and the directory then counts for nothing
        text = f"{_boot_id()}\n{codec.encode(self.assign)}"
        (self.path / _ATTEMPT).write_text(text, encoding="utf-8")

    @classmethod
    def find_all(cls, root: Path) -> list[JobDirectory]:
        """Return the attempts under ``root``; removes what is too incomplete to be one."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _tell_unrelated(root)
        found: list[JobDirectory] = []
        for path in sorted(root.iterdir()):
            try:
                boot, text = (path / _ATTEMPT).read_text(encoding="utf-8").splitlines()
                message = codec.decode(text)
            except (OSError, ValueError, messages.ProtocolError) as error:
                log.warning("event=directory_removed path=%s error=%r", path, str(error))
                _try_to_remove(path)
                continue
            if isinstance(message, Assign):
                directory = cls(path, message)
                directory._input_offset = directory._measure_input()
                directory._is_of_this_boot = boot == _boot_id()
                found.append(directory)
        return found

    def phase(self) -> AttemptPhase:
        """Tell from the files how far the attempt is."""
        if (self.path / "finished.json").exists():
            return AttemptPhase.FINISHED
        if self._is_started():
            return AttemptPhase.RUNNING
        if (self.path / "exit.new").exists():
            return AttemptPhase.ACCEPTED
        return AttemptPhase.RECEIVING

    def check_boot(self) -> None:
        """Raise :class:`JobLost` if the machine was restarted since the attempt came.

        Nothing but a finished result, which has a digest, can be trusted then: nothing is
        synced, so the job may have been started, or have ended, without a trace or with half
        of its files.
        """
        if not self._is_of_this_boot:
            raise JobLost("the machine was restarted before the job had finished")

    async def remove(self) -> None:
        """Remove everything."""
        if self._little_archive is not None:
            self._remove()
        else:
            await asyncio.to_thread(self._remove)

    def _remove(self) -> None:
        # this first: half a directory must not be taken for an attempt after a crash
        (self.path / _ATTEMPT).unlink(missing_ok=True)
        _remove_tree(self.path)

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
                with open(self.path / "job" / file.name, "ab") as target:
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
            path = self.path / "job" / file.name
            if file.size == 0:
                path.touch()
            if (self._whole.get(file.name) or _sha256_of(path)) != file.sha256:
                raise JobLost(f"the input file {file.name!r} arrived damaged")
        # space for the exit record, which the supervisor writes over it: a full disk must not
        # make a job that has ended look like one that was lost
        (self.path / "exit.new").write_bytes(b" " * _RECORD_BYTES)

    def _measure_input(self) -> int:
        total = 0
        for file in self.assign.files:
            try:
                size = (self.path / "job" / file.name).stat().st_size
            except FileNotFoundError:
                return total
            total += min(size, file.size)
            if size < file.size:
                break
        return total

    # --- process

    async def start(self, launcher: Launcher) -> None:
        """Start the job under its supervisor; returns when ``run.sh`` runs.

        Does nothing if it was started before: of several supervisors of a directory only
        the first takes it. Raises :class:`JobLost` if there can't be one.
        """
        request = LaunchRequest(
            self.path,
            self._variables(),
            self.assign.timeout_seconds,
            self.assign.grace_seconds,
            ("bash", jobs.RUN_SCRIPT),
        )
        for _ in range(_START_TRIES):
            if self._is_started():
                return
            life_line = await launcher.launch(request)
            try:
                if await life_line.job_runs():
                    self._life_line = life_line
                    return
            finally:
                if self._life_line is not life_line:
                    life_line.close()
        if not self._is_started():
            raise JobLost(f"the supervisor did not start: {self._supervisor_errors()}")

    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended.

        Works for a job that another agent process started. Raises :class:`JobLost` if it
        vanished without an exit record (the machine went down, or its supervisor was killed).
        """
        self.check_boot()
        if self._life_line is None:
            await _end_of(self._identity())
            await self._kill_leftovers()
        elif not await self._life_line.nothing_left():
            await self._kill_leftovers()
        record = self._exit_record()
        if record is not None:
            return record
        raise JobLost(f"the job's supervisor was killed {self._supervisor_errors()}".strip())

    async def kill(self) -> Exit:
        """End the job's whole process tree, whatever its state; returns when it is gone.

        Says how the job ended, which may have been by itself, just before.
        """
        # The mark first: a supervisor that has not made its claim yet sees it after that.
        (self.path / "kill").touch()
        if self._is_started() and not self._has_ended():
            self._signal_supervisor()
        with suppress(JobLost):
            return await self.wait()
        return Exit(ExitKind.KILLED)

    def is_to_be_killed(self) -> bool:
        """Whether :meth:`kill` was begun, perhaps by an earlier process of the agent."""
        return (self.path / "kill").exists()

    def _is_started(self) -> bool:
        return os.path.lexists(self.path / "process")

    def _has_ended(self) -> bool:
        """Whether the supervisor said so; it may have another job by now."""
        return self._life_line is not None and self._life_line.has_ended()

    def _signal_supervisor(self) -> None:
        if not self._is_of_this_boot:
            return
        identity = self._identity()
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(identity.pid)
            try:
                if _start_time(identity.pid) == identity.start:
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            finally:
                os.close(descriptor)

    def _variables(self) -> dict[str, str]:
        return {
            "ORCHESTRATOR_JOB_ID": str(self.assign.job_id),
            "ORCHESTRATOR_ATTEMPT": str(self.assign.number),
            "ORCHESTRATOR_USER_ID": str(self.assign.user_id),
            "ORCHESTRATOR_SERVICE": self.assign.service,
            _DIRECTORY_VARIABLE: str(self.path / "job"),
        }

    def _identity(self) -> _ProcessIdentity:
        try:
            pid, start = os.readlink(self.path / "process").split()
            return _ProcessIdentity(int(pid), int(start))
        except (OSError, ValueError) as error:
            raise JobLost(f"the record of the job's process can't be read: {error!r}") from None

    def _exit_record(self) -> Exit | None:
        try:
            record = json.loads((self.path / "exit").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None
        return Exit(ExitKind(record["kind"]), record.get("code", 0))

    def _supervisor_errors(self) -> str:
        with suppress(OSError):
            text = (self.path / "supervisor.log").read_text(encoding="utf-8", errors="replace")
            return " ".join(text.split())[-300:]
        return ""

    async def _kill_leftovers(self) -> None:
        """Kill what a killed supervisor left behind, known by its environment."""
        mark = f"{_DIRECTORY_VARIABLE}={self.path / 'job'}".encode()
        while pids := await asyncio.to_thread(_processes_with, mark):
            for pid in pids:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_KILL_PAUSE_SECONDS)

    # --- result

    async def finish(self, ended: Exit) -> Finished:
        """Archive what the job left, and return the message that reports it."""
        try:
            return self._finish_in_memory(ended)
        except _NotLittle:
            return await asyncio.to_thread(self._finish_on_disk, ended)

    def _finish_in_memory(self, ended: Exit) -> Finished:
        """Spare a little archive the disk: a successor of the agent makes it again.

        Raises :class:`_NotLittle` before anything large is read.
        """
        tally = _Tally(_LITTLE_BYTES - sum(captured.size() for captured in self.logs()))
        content, problem = self._zip_in_memory(tally.count(archive.walk(self.path / "job")))
        excess = self._excess(tally.contents())
        if excess:
            content, problem = self._zip_in_memory(())
        self._little_archive = content
        digest = hashlib.sha256(content).hexdigest()
        return self._finished(ended, (excess, problem), len(content), digest)

    def _zip_in_memory(self, entries: Iterable[archive.Entry]) -> tuple[bytes, str | None]:
        target = io.BytesIO()
        with archive.zip_into(target, self.path) as writer:
            problem = _fill(writer, entries, self.logs())
        return target.getvalue(), problem

    def _finish_on_disk(self, ended: Exit) -> Finished:
        excess = self._excess(_measure(self.path / "job", self.assign.output.result_files))
        try:
            problem = self._archive(None if excess else self.path / "job")
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            excess = self._give_up_files(error)
            problem = self._archive(None)
        size = (self.path / "result.zip").stat().st_size
        report = self._finished(
            ended, (excess, problem), size, _sha256_of(self.path / "result.zip")
        )
        _write_atomically(self.path / "finished.json", codec.encode(report))
        return report

    def _finished(
        self, ended: Exit, flaws: tuple[str | None, str | None], size: int, digest: str
    ) -> Finished:
        state, outcome = _outcome(ended, self.assign)
        excess, _ = flaws
        if excess and state is JobState.COMPLETED:
            state = JobState.FAILED
        return Finished(
            attempt_id=self.assign.attempt_id,
            state=state,
            exit_code=ended.code if ended.kind is ExitKind.EXITED else None,
            message="; ".join(part for part in (outcome, *flaws) if part),
            result_size=size,
            result_sha256=digest,
        )

    def _excess(self, contents: _Contents) -> str | None:
        """Say why the job's files can't be in the result, if they can't."""
        if (self.path / _GIVEN_UP).exists():
            return _NO_ROOM  # found out before, perhaps before a crash
        return _excess(contents, self.assign.output)

    def _archive(self, top: Path | None) -> str | None:
        unfinished = self.path / "result.zip.new"
        try:
            with archive.new_zip(unfinished) as writer:
                entries = () if top is None else archive.walk(top)
                problem = _fill(writer, entries, self.logs())
            unfinished.rename(self.path / "result.zip")
        finally:
            unfinished.unlink(missing_ok=True)
        return problem

    def _give_up_files(self, error: OSError) -> str:
        """Remove the job's files, which the full disk has no room to archive, for the logs."""
        log.warning("event=result_given_up attempt=%d error=%r", self.assign.attempt_id, error)
        # a new name says it, and takes no space: an empty directory would look like a result
        with suppress(FileNotFoundError):
            (self.path / "job").rename(self.path / _GIVEN_UP)
        _remove_contents(self.path / _GIVEN_UP)
        return _NO_ROOM

    def snapshot(self, target: Path, stop: threading.Event) -> None:
        """Archive to ``target`` what is there now, while the job goes on; until ``stop`` is set.

        What changes meanwhile may be there in a state of any moment, or be missing. Raises
        :class:`SnapshotImpossible` if it is more than a result may be.
        """
        limits = self.assign.output
        if _excess(_measure(self.path / "job", limits.result_files), limits):
            raise SnapshotImpossible("the job's files are more, or larger, than a result may be")
        with archive.new_zip(target) as writer:
            _fill(writer, _until(stop, archive.walk(self.path / "job")), self.logs())

    def logs(self) -> tuple[CapturedLog, ...]:
        """Return the job's captured output, as far as it is."""
        limit = self.assign.output.log_bytes
        return tuple(CapturedLog(self.path / name, limit) for name in _LOG_NAMES)

    def report(self) -> Finished:
        """Return the report that :meth:`finish` wrote. Raises :class:`JobLost` if it is damaged."""
        try:
            message = codec.decode((self.path / "finished.json").read_text(encoding="utf-8"))
            digest = _sha256_of(self.path / "result.zip")
        except (OSError, messages.ProtocolError) as error:
            raise JobLost(f"the record of the result can't be read: {error}") from None
        # the archive itself was not synced: the machine may have gone down with a part of it
        if not isinstance(message, Finished) or message.result_sha256 != digest:
            raise JobLost("the result archive is damaged")
        return message

    async def read_result(self, offset: int) -> bytes:
        """Return some chunks of the archive."""
        if self._little_archive is not None:
            return self._little_archive[offset:]
        return await asyncio.to_thread(self._read_archive, offset)

    def _read_archive(self, offset: int) -> bytes:
        with open(self.path / "result.zip", "rb") as archive:
            return os.pread(archive.fileno(), READ_BYTES, offset)


def inherited_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what jobs may see of the agent's environment."""
    return {
        name: value
        for name, value in own.items()
        if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)
    }


def _check_names(assign: Assign) -> None:
    names = [file.name for file in assign.files]
    for name in names:
        if problem := jobs.file_name_problem(name):
            raise JobInvalid(f"the file name {name!r} {problem}")
    if len(set(names)) != len(names):
        raise JobInvalid("two input files have the same name")
    if jobs.RUN_SCRIPT not in names:
        raise JobInvalid(f"there is no {jobs.RUN_SCRIPT}")


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


# --- processes --------------------------------------------------------------------


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(descriptor, on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def _end_of(identity: _ProcessIdentity) -> None:
    """Wait for the end of a process that need not be ours (pidfd_open(2))."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    try:
        # asked after the descriptor is there: from then on the pid can't be taken over
        if _start_time(identity.pid) == identity.start:
            await _readable(descriptor)
    finally:
        os.close(descriptor)


def _start_time(pid: int) -> int | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22 of proc(5)


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _processes_with(mark: bytes) -> list[int]:
    """Return the processes whose environment has the entry ``mark``, zombies left out."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


# --- captured output --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """The middle of a log that is left out: from ``start``, ``length`` bytes."""

    start: int
    length: int


class CapturedLog:
    """One output stream of a job: a file that the job itself appends to, with no pipe between.

    Of more than ``limit`` bytes only the start and the end are kept, half each. What lies
    between is given back to the disk while the file still grows (:meth:`trim`); the offsets of
    the rest stay as the job wrote them. The path is within reach of the job, so what is there
    now need not be what was made.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path = path
        self.limit = limit
        self._trimmed = 0  # up to where the middle has been given back

    def size(self) -> int:
        """Return how many bytes the job wrote; 0 if there is no such file (any more)."""
        status = self.status()
        return 0 if status is None else status.st_size

    def gap(self) -> Gap | None:
        """Return what is left out of the file as it is now, None while it is within the limit."""
        left_out = self.size() - self.limit
        return Gap(self.limit // 2, left_out) if left_out > 0 else None

    def trim(self) -> None:
        """Give the disk space of the gap back; a file system that can't do that keeps it."""
        gap = self.gap()
        if gap is None or gap.start + gap.length < self._trimmed + _TRIM_BYTES:
            return
        with suppress(OSError), self._open(os.O_WRONLY) as file:
            _punch_hole(file.fileno(), gap.start, gap.length)
            self._trimmed = gap.start + gap.length

    def content(self) -> Iterator[bytes]:
        """Yield what is kept; a line in the place of the gap says how much is missing."""
        with self._open(os.O_RDONLY) as file:
            size = os.fstat(file.fileno()).st_size
            left_out = size - self.limit
            if left_out <= 0:
                yield from archive.read_pieces(file, size)
                return
            yield from archive.read_pieces(file, self.limit // 2)
            yield b"\n[... %d bytes left out ...]\n" % left_out
            file.seek(left_out, os.SEEK_CUR)
            yield from archive.read_pieces(file, self.limit - self.limit // 2)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to ``size`` bytes from ``offset`` on; nothing if they can't be had."""
        with suppress(OSError), self._open(os.O_RDONLY) as file:
            return os.pread(file.fileno(), size, offset)
        return b""

    def status(self) -> os.stat_result | None:
        """Return the state of the file, None if there is none or if it is no file any more."""
        with suppress(OSError):
            status = self.path.lstat()
            return status if stat.S_ISREG(status.st_mode) else None
        return None

    def _open(self, access: int) -> IO[bytes]:
        # the job may have put a link or a fifo there, which would block
        flags = access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        mode = "rb" if access == os.O_RDONLY else "wb"
        return os.fdopen(os.open(self.path, flags), mode, buffering=0)


def _punch_hole(descriptor: int, start: int, length: int) -> None:
    """Make a hole in a file, whose size does not change (fallocate(2))."""
    # looked up at each use, which is rare: an agent that never needs it does not load ctypes
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate64
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, length) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


# --- what the job left ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Contents:
    """How many files and directories there are, and how many bytes they hold, uncompressed."""

    files: int
    size: int


def _measure(top: Path, limit: int) -> _Contents:
    """Count what is below ``top``, up to one more than ``limit`` files."""
    files = size = 0
    for entry in archive.walk(top):
        files += 1
        size += _size_of(entry)
        if files > limit:
            break
    return _Contents(files, size)


def _size_of(entry: archive.Entry) -> int:
    return entry.status.st_size if stat.S_ISREG(entry.status.st_mode) else 0


class _NotLittle(Exception):
    """There is more than may be handled at once."""


class _Tally:
    """Counts what passes by, as long as it is little."""

    def __init__(self, bytes_left: int) -> None:
        self._bytes_left = bytes_left
        self._files = self._size = 0

    def contents(self) -> _Contents:
        """Return what has passed by."""
        return _Contents(self._files, self._size)

    def count(self, entries: Iterable[archive.Entry]) -> Iterator[archive.Entry]:
        """Yield the entries. Raises :class:`_NotLittle` in the place of one that is too much."""
        self._check()
        for entry in entries:
            self._files += 1
            self._size += _size_of(entry)
            self._check()
            yield entry

    def _check(self) -> None:
        if self._files > _FEW_FILES or self._size > self._bytes_left:
            raise _NotLittle


def _excess(contents: _Contents, limits: OutputLimits) -> str | None:
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


def _until(stop: threading.Event, entries: Iterator[archive.Entry]) -> Iterator[archive.Entry]:
    for entry in entries:
        if stop.is_set():
            raise SnapshotImpossible("it is not wanted any more")
        yield entry


def _fill(
    writer: ZipWriter, entries: Iterable[archive.Entry], logs: Sequence[CapturedLog]
) -> str | None:
    """Write the files and the logs of a job; says what had to be left out."""
    skipped = 0
    taken: set[str] = set()
    for entry in entries:
        skipped += not archive.add_entry(writer, entry)
        taken |= {entry.archive_name} & _LOG_NAMES.keys()
    for captured in logs:
        status, name = captured.status(), captured.path.name
        if status is not None:
            writer.add(_LOG_NAMES[name] if name in taken else name, status, captured.content())
    return f"{skipped} files or directories could not be put into the result" if skipped else None


# --- files ------------------------------------------------------------------------


async def _promptly(size: int, function: Callable[..., None], *arguments: object) -> None:
    """Call a function that handles ``size`` bytes of files: here if little, else in a thread."""
    if size <= _LITTLE_BYTES:
        function(*arguments)
    else:
        await asyncio.to_thread(function, *arguments)


def _sha256_of(path: Path) -> str:
    with open(path, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


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


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
    unfinished.rename(path)


def _remove_tree(top: Path) -> None:
    """Remove a directory with all that a job may have left in it; no error if there is none."""
    with suppress(FileNotFoundError):
        while not _remove_empty(top):
            _remove_contents(top)


def _remove_empty(directory: Path) -> bool:
    """Remove a directory, unless there is something in it."""
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # POSIX allows either
            raise
        return False
    return True


def _remove_contents(top: Path) -> None:
    """Remove all that a job may have left in a directory.

    Directories are moved up to the top before they are emptied, so that the depth of the tree
    does not matter (shutil.rmtree recurses).
    """
    directory = archive.open_directory(str(top), None)
    numbers = itertools.count()
    try:
        while _remove_some(directory, numbers):
            pass
    finally:
        os.close(directory)


def _remove_some(directory: int, numbers: Iterator[int]) -> bool:
    """Remove what is in the directory now; returns whether there may be more by now."""
    has_moved = False
    for names in archive.portions_of_names(directory):
        for name in names:
            if not _unlink(name, directory):
                has_moved |= _empty_into(name, directory, numbers)
                os.rmdir(name, dir_fd=directory)
    return has_moved


def _try_to_remove(path: Path) -> None:
    """Remove a left-over; what resists must not keep the agent from starting."""
    try:
        _remove_tree(path)
    except OSError:
        log.exception("event=remove_failed path=%s", path)


def _empty_into(name: str, top: int, numbers: Iterator[int]) -> bool:
    """Unlink the files of a directory in ``top`` and move its directories to ``top``, if any."""
    has_moved = False
    directory = archive.open_directory(name, top)
    try:
        for child in itertools.chain.from_iterable(archive.portions_of_names(directory)):
            if _unlink(child, directory):
                continue
            # a directory that changes its parent must be writable itself
            os.chmod(child, 0o700, dir_fd=directory)
            os.rename(child, _free_name(top, numbers), src_dir_fd=directory, dst_dir_fd=top)
            has_moved = True
    finally:
        os.close(directory)
    return has_moved


def _free_name(directory: int, numbers: Iterator[int]) -> str:
    while True:
        name = f"removed-{next(numbers)}"
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return name


def _unlink(name: str, directory: int) -> bool:
    """Remove what is not a directory; returns False if it is one."""
    try:
        try:
            os.unlink(name, dir_fd=directory)
        except PermissionError:
            os.fchmod(directory, 0o700)
            os.unlink(name, dir_fd=directory)
    except IsADirectoryError:
        return False
    return True
