"""One job on this machine: directory, process tree, output, exit code, result archive.

Everything that must be known after a restart of the agent lies in the attempt's
directory; the files there say how far the attempt is:

    attempt.json   the Assign message         (the attempt is held)
    job/           the working directory      (being filled, then the job's own)
    accepted       the input is whole
    process        pid, start time and boot of the supervisor   (the job was started)
    kill           the agent wants it ended
    exit           how the job ended
    result.zip     the archive
    finished.json  the Finished message       (the archive is whole)

The functions block on files; callers that must not wait use a thread.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import itertools
import json
import logging
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import protocol
from protocol import Assign, AttemptPhase, Finished, JobState

log = logging.getLogger("orchestrator.runner")

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_DIRECTORY_VARIABLE = "ORCHESTRATOR_JOB_DIRECTORY"
_COPY_BYTES = 1024 * 1024
_SAMPLE_BYTES = 64 * 1024
_KILL_PAUSE_SECONDS = 0.01
_LONGEST_MEMBER_NAME = 65535  # bytes; the ZIP format has 16 bits for it
_REMOVED_SUFFIX = ".removed"

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
    boot: str


class JobDirectory:
    """One attempt on this machine."""

    def __init__(self, path: Path, assign: Assign) -> None:
        self.path = path
        self.assign = assign
        self._input_offset = 0
        self._child: subprocess.Popen[bytes] | None = None

    # --- making and finding

    @classmethod
    def create(cls, root: Path, assign: Assign) -> JobDirectory:
        """Make the directory of a new attempt. Raises :class:`JobInvalid` for unsafe names."""
        _check_names(assign)
        path = root / str(assign.attempt_id)
        _remove_tree(path)  # of an agent that died before it had written attempt.json
        path.mkdir(parents=True, mode=0o700)
        (path / "job").mkdir()
        _write_atomically(path / "attempt.json", protocol.encode(assign))
        return cls(path, assign)

    @classmethod
    def find_all(cls, root: Path) -> list[JobDirectory]:
        """Return the attempts under ``root``; removes what is too incomplete to be one."""
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        found: list[JobDirectory] = []
        for path in sorted(root.iterdir()):
            if path.name.endswith(_REMOVED_SUFFIX):
                _try_to_remove(path)
                continue
            try:
                message = protocol.decode((path / "attempt.json").read_text(encoding="utf-8"))
            except (OSError, protocol.ProtocolError) as error:
                log.warning("event=directory_removed path=%s error=%r", path, str(error))
                _try_to_remove(path)
                continue
            if isinstance(message, Assign):
                directory = cls(path, message)
                directory._input_offset = directory._measure_input()
                found.append(directory)
        return found

    def phase(self) -> AttemptPhase:
        """Tell from the files how far the attempt is."""
        if (self.path / "finished.json").exists():
            return AttemptPhase.FINISHED
        if (self.path / "process").exists():
            return AttemptPhase.RUNNING
        if (self.path / "accepted").exists():
            return AttemptPhase.ACCEPTED
        return AttemptPhase.RECEIVING

    def remove(self) -> None:
        """Remove everything."""
        # renamed first: half a directory must not be taken for an attempt after a crash
        doomed = self.path.with_name(self.path.name + _REMOVED_SUFFIX)
        with suppress(FileNotFoundError):
            self.path.rename(doomed)
        _remove_tree(doomed)

    # --- input

    @property
    def input_size(self) -> int:
        """How many bytes all input files have together."""
        return sum(file.size for file in self.assign.files)

    @property
    def input_offset(self) -> int:
        """How many bytes of the input, taken as one stream, are here."""
        return self._input_offset

    def write_input(self, data: bytes) -> None:
        """Append to the input stream, which fills the files in their order."""
        start = 0
        for file in self.assign.files:
            end = start + file.size
            while data and start <= self._input_offset < end:
                part = data[: end - self._input_offset]
                with open(self.path / "job" / file.name, "ab") as target:
                    target.write(part)
                self._input_offset += len(part)
                data = data[len(part) :]
            start = end
        if data:
            raise protocol.ProtocolError(f"attempt {self.assign.attempt_id}: too much input")

    def accept_input(self) -> None:
        """Check the whole input and mark it as accepted. Raises :class:`JobLost` if it is wrong."""
        for file in self.assign.files:
            path = self.path / "job" / file.name
            if file.size == 0:
                path.touch()
            with open(path, "rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
            if digest != file.sha256:
                raise JobLost(f"the input file {file.name!r} arrived damaged")
        (self.path / "accepted").touch()

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

    async def start(self) -> None:
        """Start the job under its supervisor; returns when ``run.sh`` runs.

        Does nothing if it was started before: of several supervisors of a directory only
        the first one runs the job.
        """
        receiving, sending = os.pipe()
        try:
            self._child = await asyncio.to_thread(self._spawn_supervisor, sending)
        finally:
            os.close(sending)
        with open(receiving, "rb", buffering=0) as pipe:
            await _readable(pipe.fileno())
            if pipe.read(1) == b"1":
                return
        await _readable_pid(self._child.pid)
        if not (self.path / "process").exists():
            raise JobLost(f"the supervisor did not start: {self._supervisor_errors()}")

    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended.

        Works for a job that another agent process started. Raises :class:`JobLost` if it
        vanished without an exit record (the machine went down, or its supervisor was killed).
        """
        identity = self._identity()
        if identity.boot == _boot_id():
            await _end_of(identity)
        if self._child is not None:
            await asyncio.to_thread(self._child.wait)
            self._child = None
        record = self._exit_record()
        if record is not None and identity.boot != _boot_id():
            return record
        await self._kill_leftovers()
        if record is not None:
            return record
        if identity.boot != _boot_id():
            raise JobLost("the machine was restarted while the job ran")
        raise JobLost(f"the job's supervisor was killed {self._supervisor_errors()}".strip())

    async def kill(self) -> Exit:
        """End the job's whole process tree, whatever its state; returns when it is gone.

        Says how the job ended, which may have been by itself, just before.
        """
        # The mark first: a supervisor that has not made its claim yet sees it after that.
        (self.path / "kill").touch()
        if (self.path / "process").exists():
            self._signal_supervisor()
        with suppress(JobLost):
            return await self.wait()
        return Exit(ExitKind.KILLED)

    def is_to_be_killed(self) -> bool:
        """Whether :meth:`kill` was begun, perhaps by an earlier process of the agent."""
        return (self.path / "kill").exists()

    def _signal_supervisor(self) -> None:
        identity = self._identity()
        if identity.boot != _boot_id():
            return
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(identity.pid)
            try:
                if _start_time(identity.pid) == identity.start:
                    signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            finally:
                os.close(descriptor)

    def _spawn_supervisor(self, ready: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(self.path)]
        command += [str(self.assign.timeout_seconds or 0), str(self.assign.grace_seconds)]
        command.append(str(ready))
        with open(self.path / "supervisor.log", "ab") as errors:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=(ready,),
                env=self._environment(os.environ),
                start_new_session=True,
            )

    def _environment(self, own: Mapping[str, str]) -> dict[str, str]:
        passed = {
            name: value
            for name, value in own.items()
            if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)
        }
        passed["ORCHESTRATOR_JOB_ID"] = str(self.assign.job_id)
        passed["ORCHESTRATOR_ATTEMPT"] = str(self.assign.number)
        passed["ORCHESTRATOR_USER_ID"] = str(self.assign.user_id)
        passed["ORCHESTRATOR_SERVICE"] = self.assign.service
        passed[_DIRECTORY_VARIABLE] = str(self.path / "job")
        return passed

    def _identity(self) -> _ProcessIdentity:
        try:
            record = json.loads((self.path / "process").read_text(encoding="ascii"))
            return _ProcessIdentity(record["pid"], record["start"], record["boot"])
        except (OSError, ValueError, KeyError) as error:
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

    def finish(self, ended: Exit) -> Finished:
        """Archive what the job left, and write down the message that reports it."""
        archive = self.path / "result.zip"
        unfinished = self.path / "result.zip.new"
        skipped = _write_archive(unfinished, self.path)
        with open(unfinished, "rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        unfinished.rename(archive)
        state, message = _outcome(ended, self.assign)
        if skipped:
            message = "; ".join(part for part in (message, skipped) if part)
        report = Finished(
            attempt_id=self.assign.attempt_id,
            state=state,
            exit_code=ended.code if ended.kind is ExitKind.EXITED else None,
            message=message,
            result_size=archive.stat().st_size,
            result_sha256=digest,
        )
        _write_atomically(self.path / "finished.json", protocol.encode(report))
        return report

    def report(self) -> Finished:
        """Return the report that :meth:`finish` wrote. Raises :class:`JobLost` if it is damaged."""
        try:
            message = protocol.decode((self.path / "finished.json").read_text(encoding="utf-8"))
            size = (self.path / "result.zip").stat().st_size
        except (OSError, protocol.ProtocolError) as error:
            raise JobLost(f"the record of the result can't be read: {error}") from None
        if not isinstance(message, Finished) or message.result_size != size:
            raise JobLost("the result archive is damaged")
        return message

    def read_result(self, offset: int) -> bytes:
        """Return one chunk of the archive."""
        with open(self.path / "result.zip", "rb") as archive:
            return os.pread(archive.fileno(), protocol.CHUNK_BYTES, offset)


def _check_names(assign: Assign) -> None:
    names = [file.name for file in assign.files]
    for name in names:
        if problem := protocol.file_name_problem(name):
            raise JobInvalid(f"the file name {name!r} {problem}")
    if len(set(names)) != len(names):
        raise JobInvalid("two input files have the same name")
    if protocol.RUN_SCRIPT not in names:
        raise JobInvalid(f"there is no {protocol.RUN_SCRIPT}")


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


async def _readable_pid(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        await _readable(descriptor)
    finally:
        os.close(descriptor)


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


# --- archive ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file below the job's directory: open directory, name in it, name in the archive."""

    directory: int
    name: str
    archive_name: str
    status: os.stat_result


def _write_archive(target: Path, attempt: Path) -> str:
    """Write the result; returns a sentence about what had to be left out, or nothing."""
    skipped = 0
    with zipfile.ZipFile(target, "w", allowZip64=True) as archive:
        for entry in _walk(attempt / "job"):
            skipped += not _add(archive, entry)
        names = set(archive.NameToInfo)
        for name, other in _LOG_NAMES.items():
            _add_log(archive, attempt / name, other if name in names else name)
    return f"{skipped} files or directories could not be put into the result" if skipped else ""


def _walk(top: Path) -> Iterator[_Entry]:
    """Yield everything below ``top``, parents first, without following links.

    By one directory descriptor that goes down and, by way of "..", up again: neither the
    length of a path nor the depth of a tree matters. An entry's descriptor is valid until the
    next entry is asked for.
    """
    try:
        directory = _open_directory(str(top), None)
    except FileNotFoundError:
        return  # the job removed its own directory
    levels = [("", iter(sorted(os.listdir(directory))))]
    try:
        while levels:
            prefix, names = levels[-1]
            name = next(names, None)
            if name is None:
                levels.pop()
                directory = _replace(directory, "..") if levels else directory
                continue
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            archive_name = prefix + _printable(name)
            if stat.S_ISDIR(status.st_mode):
                archive_name += "/"
            yield _Entry(directory, name, archive_name, status)
            if stat.S_ISDIR(status.st_mode):
                directory = _replace(directory, name)
                levels.append((archive_name, iter(sorted(os.listdir(directory)))))
    finally:
        os.close(directory)


def _replace(directory: int, name: str) -> int:
    other = _open_directory(name, directory)
    os.close(directory)
    return other


def _open_directory(name: str, parent: int | None) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(name, flags, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)  # it is ours, only its mode forbids
        return os.open(name, flags, dir_fd=parent)


def _printable(name: str) -> str:
    """Return a name that ZIP can hold: bytes that are not UTF-8 are shown as ``\\xNN``."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def _add(archive: zipfile.ZipFile, entry: _Entry) -> bool:
    """Add a file, directory or link; skips sockets, fifos and devices. False if it can't be."""
    mode = entry.status.st_mode
    if len(entry.archive_name.encode()) > _LONGEST_MEMBER_NAME:
        return False
    info = _zip_info(entry.archive_name, entry.status)
    if stat.S_ISDIR(mode):
        info.external_attr |= 0x10  # the MS-DOS directory bit, which some programs look for
        archive.writestr(info, b"")
    elif stat.S_ISLNK(mode):
        archive.writestr(info, os.fsencode(os.readlink(entry.name, dir_fd=entry.directory)))
    elif stat.S_ISREG(mode):
        try:
            source = _open_for_reading(entry)
        except PermissionError:
            return False
        with source:
            _copy_into(archive, info, source)
    return True


def _add_log(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    with suppress(FileNotFoundError), open(path, "rb") as source:
        _copy_into(archive, _zip_info(name, os.fstat(source.fileno())), source)


def _open_for_reading(entry: _Entry) -> IO[bytes]:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.fdopen(os.open(entry.name, flags, dir_fd=entry.directory), "rb")
    except PermissionError:
        # it is ours, only its mode forbids; the archive keeps that mode
        os.chmod(entry.name, entry.status.st_mode | stat.S_IRUSR, dir_fd=entry.directory)
        return os.fdopen(os.open(entry.name, flags, dir_fd=entry.directory), "rb")


def _zip_info(name: str, status: os.stat_result) -> zipfile.ZipInfo:
    moment = min(max(status.st_mtime, 315619200), 4354732800)  # ZIP knows 1980 to 2107
    info = zipfile.ZipInfo(name, time.localtime(moment)[:6])
    info.create_system = 3  # Unix: the high half of external_attr is the mode
    info.external_attr = (status.st_mode & 0xFFFF) << 16
    info.file_size = status.st_size
    if 0 <= status.st_mtime < 2**31:
        # Info-ZIP's extended timestamp: seconds in UTC, where ZIP has two-second local time
        info.extra = struct.pack("<HHBl", 0x5455, 5, 1, int(status.st_mtime))
    return info


def _copy_into(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: IO[bytes]) -> None:
    start = source.read(_SAMPLE_BYTES)
    if len(zlib.compress(start, 1)) < 0.9 * len(start):
        info.compress_type = zipfile.ZIP_DEFLATED
        # ZipFile's own level is not used for a ZipInfo that is passed in (bpo-21417)
        info._compresslevel = 1  # type: ignore[attr-defined]
    with archive.open(info, "w", force_zip64=info.file_size >= 2**31) as target:
        target.write(start)
        shutil.copyfileobj(source, target, _COPY_BYTES)


# --- files ------------------------------------------------------------------------


def _write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.new")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)


def _remove_tree(top: Path) -> None:
    """Remove a directory with all that a job may have left in it; no error if there is none.

    Directories are moved up to the top before they are emptied, so that the depth of the tree
    does not matter (shutil.rmtree recurses).
    """
    try:
        directory = _open_directory(str(top), None)
    except FileNotFoundError:
        return
    numbers = itertools.count()
    try:
        while names := os.listdir(directory):
            for name in names:
                if not _unlink(name, directory):
                    _empty_into(name, directory, numbers)
                    os.rmdir(name, dir_fd=directory)
    finally:
        os.close(directory)
    top.rmdir()


def _try_to_remove(path: Path) -> None:
    """Remove a left-over; what resists must not keep the agent from starting."""
    try:
        _remove_tree(path)
    except OSError:
        log.exception("event=remove_failed path=%s", path)


def _empty_into(name: str, top: int, numbers: Iterator[int]) -> None:
    """Unlink the files of a directory in ``top`` and move its directories to ``top``."""
    directory = _open_directory(name, top)
    try:
        for child in os.listdir(directory):
            if _unlink(child, directory):
                continue
            # a directory that changes its parent must be writable itself
            os.chmod(child, 0o700, dir_fd=directory)
            os.rename(child, _free_name(top, numbers), src_dir_fd=directory, dst_dir_fd=top)
    finally:
        os.close(directory)


def _free_name(directory: int, numbers: Iterator[int]) -> str:
    while True:
        name = f"removed-{next(numbers)}"
        try:
            os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return name


def _unlink(name: str, directory: int) -> bool:
    """Remove what is not a directory; returns False if it is one."""
    if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
        return False
    try:
        os.unlink(name, dir_fd=directory)
    except PermissionError:
        os.fchmod(directory, 0o700)
        os.unlink(name, dir_fd=directory)
    return True
