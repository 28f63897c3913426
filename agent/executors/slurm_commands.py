"""Slurm's own commands, and what they say, parsed where it comes in.

Written for Slurm 22.05 and what its successors have kept; sources: sbatch(1), squeue(1),
scontrol(1), sacct(1), scancel(1), and the answers of a running 22.05. What matters here:

- A command that can't reach slurmctld says so after some ten seconds, with exit code 1.
- sbatch that fails has not always failed: its answer may be lost, and the job be there.
- squeue forgets jobs a while after their end (``MinJobAge``, 300 s), and slurmctld with it.
- ``--export=NIL`` is the name of a variable for a Slurm before 23.11; then, as with ``NONE``, the
  node starts a login shell of the user for its environment. So sbatch runs here with a small
  environment of its own, and ``--export=ALL``.
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

_COMMAND_SECONDS = 120.0  # Slurm's own patience ends sooner: 10 to 20 s as a rule
_SUBMIT_SECONDS = 300.0  # sbatch is not ended while it may still submit
_MAX_MESSAGE = 300  # characters of what a command says

_PASSED = frozenset(["PATH", "HOME", "USER", "LOGNAME", "TZ", "SLURM_CONF"])
_PASSED_PREFIXES = ("SBATCH_",)
_NEVER_PASSED = frozenset(["SBATCH_EXPORT", "SBATCH_CLUSTERS", "SBATCH_ARRAY_INX", "SBATCH_WAIT"])
"""sbatch(1), input environment variables: these would change what an answer means."""

_SEPARATOR = "|"  # our job names have none; a reason may have anything, and stands last
_SQUEUE_FORMAT = _SEPARATOR.join(("%i", "%T", "%j", "%N", "%r"))
_JOB_ID = re.compile(r"[0-9]+")
_FIELD = re.compile(r"(?:^| )(JobName|JobState|Reason|NodeList)=(\S*)")

_NOT_REACHED = (
    "unable to contact slurm controller",
    "socket timed out",
    "zero bytes were transmitted",
    "connection refused",
    "connection reset",
    "connection timed out",
    "communication connection failure",
    "communications",
    "unexpected message received",
    "header lengths are longer",
    "invalid authentication credential",
    "protocol authentication error",
    "munge",
    "resource temporarily unavailable",
    "slurm backup controller in standby mode",
    "slurmctld is in standby",
    "configuration source",  # "Could not establish a configuration source"
)
"""Words of slurm_strerror(3) and of the client library that say: nothing was decided."""

_LATER = (
    "temporarily unable to accept job",
    "job violates accounting/qos policy",
    "maxsubmitjob",
    "job submit limit",
    "too many jobs",
    "unable to accept job",
)
"""Refusals that end by themselves, when other jobs have ended."""

_TOO_MUCH = (
    "requested node configuration is not available",
    "memory specification can not be satisfied",
    "more processors requested than permitted",
    "requested time limit is invalid",
    "requested gres option unsupported",
    "invalid generic resource",
    "cpu count per node can not be satisfied",
)
"""Refusals of what the job asks for, whoever asks."""


class SlurmSilent(Exception):
    """Slurm gave no answer that says anything; the message says how."""


class Refusal(enum.Enum):
    """What Slurm refuses when it refuses a job."""

    MORE_FOR_NOW = enum.auto()
    WHAT_THE_JOB_ASKS = enum.auto()
    HOW_WE_ASK = enum.auto()


class SubmissionRefused(Exception):
    """sbatch was told no; the message is Slurm's own."""

    def __init__(self, message: str, refusal: Refusal) -> None:
        super().__init__(message)
        self.refusal = refusal


class Standing(enum.Enum):
    """What a job state of Slurm means for us."""

    WAITS = enum.auto()
    RUNS = enum.auto()
    ENDED = enum.auto()
    UNKNOWN = enum.auto()


_STANDINGS = {
    **dict.fromkeys(
        ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD"), Standing.WAITS
    ),
    **dict.fromkeys(("RESV_DEL_HOLD", "SPECIAL_EXIT"), Standing.WAITS),
    **dict.fromkeys(("RUNNING", "COMPLETING", "RESIZING", "SIGNALING"), Standing.RUNS),
    **dict.fromkeys(("STAGE_OUT", "STOPPED", "SUSPENDED"), Standing.RUNS),
    **dict.fromkeys(("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE"), Standing.ENDED),
    **dict.fromkeys(("FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"), Standing.ENDED),
    **dict.fromkeys(("REVOKED", "TIMEOUT"), Standing.ENDED),
}
"""squeue(1), JOB STATE CODES. A word that is not here is of another Slurm, and unknown."""


def standing_of(state: str) -> Standing:
    """Say what a word for a job's state means; ``CANCELLED by 0`` is of sacct."""
    word = state.split(maxsplit=1)[0] if state.split() else ""
    return _STANDINGS.get(word, Standing.UNKNOWN)


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job as Slurm tells of it. ``state`` is Slurm's word, ``reason`` what it says with it."""

    id: int
    state: str
    name: str
    node: str
    reason: str

    @property
    def standing(self) -> Standing:
        """What the state means for us."""
        return standing_of(self.state)


@dataclass(frozen=True, slots=True)
class SlurmRecord:
    """What Slurm knows of one job when it is asked for it by its number.

    ``state`` None: it does not know the job, and says so in so many words.
    """

    state: str | None
    reason: str = ""
    may_have_run: bool = True

    @property
    def has_ended(self) -> bool:
        """Whether that is the end of it: Slurm forgets only jobs that have ended."""
        return self.state is None or standing_of(self.state) is Standing.ENDED


@dataclass(frozen=True, slots=True)
class _Done:
    code: int
    output: str
    errors: str

    def message(self) -> str:
        """Return what the command said, on one line, without the name before it."""
        lines = [line.strip() for line in (self.errors or self.output).splitlines()]
        text = "; ".join(re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in lines if line)
        return text[:_MAX_MESSAGE] or f"exit code {self.code}"


class SlurmCommands:
    """sbatch, squeue, scontrol, sacct and scancel of this machine."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """``environment``: ours; the commands get the part of it that is meant for them."""
        self._environment = command_environment(environment)
        self._user = str(os.getuid())
        self._has_accounting = True

    def missing_command(self) -> str | None:
        """Name a command that is needed and is not on the path, if there is one."""
        path = self._environment.get("PATH")
        needed = ("sbatch", "squeue", "scontrol", "scancel")
        return next((name for name in needed if shutil.which(name, path=path) is None), None)

    async def submit(self, script: str, options: Sequence[str]) -> int:
        """Submit a batch script; returns the job's number.

        Raises :class:`SubmissionRefused`, or :class:`SlurmSilent` if the job may be there all the
        same: then :meth:`jobs` tells.
        """
        done = await self._run(
            "sbatch", "--parsable", "--export=ALL", *options, stdin=script, seconds=_SUBMIT_SECONDS
        )
        if done.code == 0:
            first = done.output.strip().splitlines()[-1:] or [""]
            number = first[0].partition(";")[0]  # "4711;cluster"
            if _JOB_ID.fullmatch(number):
                return int(number)
            raise SlurmSilent(f"sbatch said {first[0][:_MAX_MESSAGE]!r} instead of a number")
        message = done.message()
        if _says_any(message, _NOT_REACHED):
            raise SlurmSilent(message)
        raise SubmissionRefused(message, _refusal_in(message))

    async def jobs(self) -> tuple[SlurmJob, ...]:
        """Return all our user's jobs that Slurm remembers. Raises :class:`SlurmSilent`.

        A job that is missing may have ended, or be one that this slurmctld does not show.
        """
        done = await self._run(
            "squeue",
            *("--noheader", "--states=all", f"--user={self._user}"),
            f"--format={_SQUEUE_FORMAT}",
        )
        if done.code != 0:
            raise SlurmSilent(done.message())
        return tuple(job for line in done.output.splitlines() if (job := _parse_job(line)))

    async def record(self, job_id: int, name: str) -> SlurmRecord:
        """Ask for one job by its number, in the accounts too if slurmctld has forgotten it.

        A job of another name is another job: a slurmctld that lost its last state gives numbers
        out again. Raises :class:`SlurmSilent` if nobody can say.
        """
        done = await self._run("scontrol", "--oneliner", "show", "job", str(job_id))
        if done.code == 0:
            fields = dict(_FIELD.findall(done.output))
            if fields.get("JobName", name) != name:
                return SlurmRecord(None)
            if "JobState" in fields:
                has_node = fields.get("NodeList") not in (None, "", "(null)")
                return SlurmRecord(fields["JobState"], fields.get("Reason", ""), has_node)
            raise SlurmSilent(f"scontrol said {done.output[:_MAX_MESSAGE]!r}")
        if "invalid job id" not in done.message().lower():
            raise SlurmSilent(done.message())
        return await self._account(job_id, name) or SlurmRecord(None)

    async def _account(self, job_id: int, name: str) -> SlurmRecord | None:
        """Ask sacct, which is not everywhere. What it calls running may have ended long ago."""
        if not self._has_accounting:
            return None
        try:
            done = await self._run(
                "sacct",
                *("--noheader", "--parsable2", "--allocations", "--duplicates"),
                *(f"--jobs={job_id}", f"--name={name}", "--format=State"),
            )
        except SlurmSilent:
            return None
        if done.code != 0:
            self._has_accounting = "accounting storage is disabled" not in done.message().lower()
            return None
        states = done.output.split("\n")
        ended = [state for state in states if standing_of(state) is Standing.ENDED]
        return SlurmRecord(ended[-1]) if ended else None

    async def cancel_named(self, name: str) -> None:
        """Ask Slurm to end our jobs of a name. No error if there is none, or it has ended.

        Raises :class:`SlurmSilent`.
        """
        await self._scancel(f"--name={name}", f"--user={self._user}")

    async def withdraw(self, job_id: int, name: str) -> None:
        """Take back a job, unless it has started. Raises :class:`SlurmSilent`."""
        await self._scancel("--state=PENDING", f"--name={name}", str(job_id))

    async def terminate_batch(self, name: str) -> None:
        """Send SIGTERM to the batch scripts of a name alone. Raises :class:`SlurmSilent`."""
        await self._scancel("--batch", "--signal=TERM", f"--name={name}", f"--user={self._user}")

    async def _scancel(self, *arguments: str) -> None:
        done = await self._run("scancel", "--quiet", *arguments)
        # of a job that has ended, or is about to, it may complain: squeue tells what is so
        if done.code != 0 and _says_any(done.message(), _NOT_REACHED):
            raise SlurmSilent(done.message())

    async def _run(self, *words: str, stdin: str = "", seconds: float = _COMMAND_SECONDS) -> _Done:
        # a file and no pipe: a command that fails at once would leave us writing to nobody
        with tempfile.TemporaryFile() as source:
            source.write(stdin.encode())
            source.seek(0)
            try:
                process = await asyncio.create_subprocess_exec(
                    *words,
                    env=self._environment,
                    stdin=source,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.PIPE,
                    # Ctrl-C in a terminal is for the agent
                    start_new_session=True,
                )
            except OSError as error:
                raise SlurmSilent(f"{words[0]}: {error.strerror}") from None
        try:
            async with asyncio.timeout(seconds):
                output, errors = await process.communicate()
        except TimeoutError:
            raise SlurmSilent(f"{words[0]} gave no answer in {seconds:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        assert process.returncode is not None
        return _Done(
            process.returncode, output.decode(errors="replace"), errors.decode(errors="replace")
        )


def command_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what Slurm's commands may see of our environment; a batch job inherits it."""
    passed = {
        name: value
        for name, value in own.items()
        if (name in _PASSED or name.startswith(_PASSED_PREFIXES)) and name not in _NEVER_PASSED
    }
    return {**passed, "LC_ALL": "C"}


def _parse_job(line: str) -> SlurmJob | None:
    """Parse a line of squeue; None for what is no job of ours, as an element of an array."""
    fields = line.split(_SEPARATOR, 4)
    if len(fields) != 5 or not _JOB_ID.fullmatch(fields[0].strip()):
        return None
    number, state, name, node, reason = fields
    return SlurmJob(int(number), state.strip(), name, node.strip(), reason.strip())


def _refusal_in(message: str) -> Refusal:
    if _says_any(message, _LATER):
        return Refusal.MORE_FOR_NOW
    return Refusal.WHAT_THE_JOB_ASKS if _says_any(message, _TOO_MUCH) else Refusal.HOW_WE_ASK


def _says_any(message: str, words: Sequence[str]) -> bool:
    folded = message.lower()
    return any(word in folded for word in words)
