"""What the store takes and gives, and what it refuses: frozen records and errors."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from jobs import DEFAULT_RESOURCES, Demand, FileSpec, JobState, Resources, Usage
from wire.frames import Stream

# --- errors -----------------------------------------------------------------------


class StoreError(Exception):
    """The store can't do what was asked; the message is for the person who runs it."""


class StoreRefused(StoreError):
    """This file can't be opened: in use, of a newer version, or not ours."""


class StoreFull(StoreError):
    """No space left for the database to grow."""


class StoreUnavailable(StoreError):
    """The file can't be read or written at the moment (I/O error, permission)."""


class StoreBroken(StoreUnavailable):
    """A sync failed: nobody knows what is on the disk. The store ends, and so must its server."""


class StoreDamaged(StoreError):
    """What is stored is not what was stored: a disk, or another program, has changed it."""


class Superseded(StoreError):
    """The attempt is not the current one of its job, or the job has ended without it."""


class IllegalTransition(StoreError):
    """A change of state that the transition table does not allow."""


class KeyReused(StoreError):
    """The idempotency key stands for another request of this user."""


class QueueFull(StoreError):
    """The user has as many queued jobs as allowed."""


class NotEnded(StoreError):
    """The job is to run or runs, so its files can't be deleted."""


class InputGone(StoreError):
    """The job's input is no longer stored."""


class ResultMismatch(StoreError):
    """A result is not what the agent announced, or no whole archive, or its report no end."""


# --- jobs -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What a user sees of a job."""

    id: int
    state: JobState
    message: str


@dataclass(frozen=True, slots=True)
class UserQueue:
    """The queued jobs of one user for one service: highest priority first, then lowest id."""

    service: str
    user_id: int


@dataclass(frozen=True, slots=True)
class JobIdentity:
    """Which job it is, and the queue in which it waits or waited."""

    id: int
    user_id: int
    service: str

    @property
    def queue(self) -> UserQueue:
        """Where it waits."""
        return UserQueue(self.service, self.user_id)


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a submitter asks for, beside the files.

    ``priority`` orders the jobs of the user, the highest first. ``timeout`` in seconds, None
    for the service's limit alone. ``tags`` are pairs of key and value, each key once. ``cpus``,
    ``memory`` in bytes and ``gpus`` are None for what the service says; ``resources`` are all
    three, once that is known. ``idempotency_key`` names the request, so that it can be repeated
    without a second job.
    """

    user_id: int
    service: str
    name: str = ""
    priority: int = 0
    timeout: int | None = None
    tags: tuple[tuple[str, str], ...] = ()
    idempotency_key: str | None = None
    cpus: int | None = None
    memory: int | None = None
    gpus: int | None = None
    resources: Resources = DEFAULT_RESOURCES


@dataclass(frozen=True, slots=True)
class Submission:
    """The job that a request brought about, now or (``is_repeated``) when it came before."""

    job: JobIdentity
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class ActiveJob:
    """A job that an agent holds: the agent, the attempt and how far it is."""

    job: JobIdentity
    attempt_id: int
    number: int
    agent_id: str
    agent_name: str
    state: JobState
    demand: Demand


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One input file of a job and the blob that holds its bytes."""

    spec: FileSpec
    blob_id: int


class Loss(enum.Enum):
    """How an attempt was lost, which decides how much it counts against the allowed number."""

    AGENT_AWAY = "the agent is gone; a job that it had whole may have started"
    REPORTED = "the agent tried and could not go on"
    BY_SERVICE = "the agent tried and could not, for what the service's settings ask for"

    @property
    def early_states(self) -> frozenset[JobState]:
        """The states in which the job's process has surely not started."""
        if self is Loss.AGENT_AWAY:
            return frozenset({JobState.PROCESSING})
        return frozenset({JobState.PROCESSING, JobState.SUBMITTED})


@dataclass(frozen=True, slots=True)
class Assignment:
    """A new attempt: its job, its id, its number within the job (fencing token), its input.

    ``timeout`` in seconds, ``cpus``, ``memory`` in bytes and ``gpus`` are what the submitter asked
    for, None for what the service says. ``content`` are the bytes of all files, one after the
    other, if they are few.
    """

    job: JobIdentity
    attempt_id: int
    number: int
    timeout: int | None
    files: tuple[StoredFile, ...]
    content: bytes | None
    agent_id: str
    demand: Demand


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A whole result archive; ``size`` in bytes.

    ``content`` is all of it, if it is small and was read along.
    """

    blob_id: int
    size: int
    sha256: str
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class KnownAgent:
    """An agent that was here once."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class JobTimes:
    """When a job came, when its last attempt started (None: it never did), when it ended.

    And what that attempt used: CPU seconds, bytes of memory at its peak; None is not known.
    """

    service: str
    created_at: float
    started_at: float | None
    finished_at: float
    cpu_seconds: float | None = None
    peak_memory: int | None = None


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are asked for; None and empty mean any.

    ``states`` are alternatives, and so are ``ids``; all ``tags`` (key, value) must be there,
    ``agent`` is the name of one that had an attempt, ``since`` is the earliest creation in Unix
    seconds, ``text`` stands in the message, in upper or lower case (of ASCII letters).
    """

    user_id: int | None = None
    service: str | None = None
    states: frozenset[JobState] = frozenset()
    ids: frozenset[int] = frozenset()
    agent: str | None = None
    since: float | None = None
    text: str | None = None
    tags: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class JobSummary:
    """A job in a list. Times in Unix seconds; attempt and agent are the current or last ones.

    ``outcome`` is the state in which it ended, also after it was cleaned; None before its end.
    """

    id: int
    state: JobState
    message: str
    user_id: int
    service: str
    name: str
    priority: int
    timeout: int | None
    created_at: float
    changed_at: float
    started_at: float | None
    finished_at: float | None
    attempt_id: int | None
    outcome: JobState | None
    cpus: int | None
    memory: int | None
    gpus: int | None
    agent: str | None
    tags: tuple[tuple[str, str], ...]
    resources: Resources = DEFAULT_RESOURCES


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some of the jobs asked for, newest first; older ones may follow before ``next_before``."""

    jobs: tuple[JobSummary, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class JobIds:
    """Some of the jobs asked for, newest first; older ones may follow before ``next_before``."""

    ids: tuple[int, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt as told afterwards. Times in Unix seconds, None for what has not happened.

    ``outcome`` is the state to which the end of the attempt brought the job: Queued if it was
    lost.
    """

    id: int
    number: int
    agent: str
    exit_code: int | None
    assigned_at: float | None
    started_at: float | None
    ended_at: float | None
    outcome: JobState | None
    message: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class JobDetails:
    """All that is known of a job but its history."""

    summary: JobSummary
    attempts: tuple[AttemptRecord, ...]
    files: tuple[FileSpec, ...]
    result: StoredResult | None


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """Bytes that stand at ``start`` in what a process wrote to a stream."""

    stream: Stream
    start: int
    data: bytes

    def after(self, position: int) -> OutputPiece:
        """Return what of it lies at or after a position."""
        skipped = min(max(0, position - self.start), len(self.data))
        return OutputPiece(self.stream, self.start + skipped, self.data[skipped:])


@dataclass(frozen=True, slots=True)
class NewOutput:
    """Output to be added; of a stream with more than ``limit`` bytes the middle is not kept."""

    pieces: tuple[OutputPiece, ...]
    limit: int

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return sum(len(piece.data) for piece in self.pieces)


NO_OUTPUT = NewOutput((), 0)


@dataclass(frozen=True, slots=True)
class OutputSource:
    """A job as the source of output: state, present attempt (None: none) and its number."""

    state: JobState
    attempt_id: int | None
    attempt: int


# --- tokens -----------------------------------------------------------------------


class Role(enum.StrEnum):
    """What a token allows; each role includes those before it."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        """Whether this role allows what ``other`` does."""
        roles = list(Role)
        return roles.index(self) >= roles.index(other)


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of an API token: whose jobs it reaches (None: everybody's), and how far.

    ``created_at`` in Unix seconds. The secret itself is nowhere.
    """

    name: str
    role: Role
    user_id: int | None
    created_at: float


@dataclass(frozen=True, slots=True)
class KnownTokens:
    """All API tokens by the digests of their secrets, and whether there ever was one."""

    by_digest: Mapping[str, Token]
    were_made: bool


def digest_of(secret: str) -> str:
    """Return what is stored of a token's secret: its SHA-256, in hex.

    A slow, salted hash protects passwords, which can be guessed. Nobody guesses 256 random
    bits, so it would protect nothing here, and cost every request its time. Looking a digest
    up tells by its timing nothing of use: who asks can't choose the digest.
    """
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


# --- statistics -------------------------------------------------------------------


class StatisticsPeriod(enum.Enum):
    """A stretch of time up to now, by its name, with the number and the length of its steps."""

    HOUR = ("1h", 60, 60)
    DAY = ("24h", 96, 900)
    WEEK = ("7d", 168, 3600)

    def __init__(self, label: str, points: int, step_seconds: int) -> None:
        self.label = label
        self.points = points
        self.step_seconds = step_seconds


@dataclass(frozen=True, slots=True)
class StatisticsPoint:
    """What happened in one step that began at ``time`` (Unix seconds).

    ``wait_seconds`` is the mean from upload to start of the jobs that started in it,
    ``run_seconds`` the mean from start to stored result of those that ended; None for none.
    """

    time: int
    submitted: int = 0
    completed: int = 0
    failed: int = 0
    killed: int = 0
    invalid: int = 0
    wait_seconds: float | None = None
    run_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The disk that holds the database, in bytes; ``database`` is what the database takes."""

    free: int
    total: int
    database: int
