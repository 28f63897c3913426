"""What a job is: its states and transitions, its files, what it needs and may reach."""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

RUN_SCRIPT = "run.sh"
"""The file that every job has and that the agent starts with bash."""


class JobState(enum.StrEnum):
    """The public name of every state a job can be in."""

    QUEUED = "Queued"
    PROCESSING = "Processing"
    SUBMITTED = "Submitted"
    RUNNING = "Running"
    COMPLETED = "Completed"
    FAILED = "Failed"
    INVALID = "Invalid"
    KILLED = "Killed"
    CLEANED = "Cleaned"


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.PROCESSING, JobState.INVALID, JobState.KILLED}),
    # Failed, here and below: the last allowed attempt was lost
    JobState.PROCESSING: frozenset(
        {
            JobState.SUBMITTED,
            JobState.QUEUED,
            JobState.INVALID,
            JobState.FAILED,
            JobState.KILLED,
        }
    ),
    JobState.SUBMITTED: frozenset(
        {JobState.RUNNING, JobState.QUEUED, JobState.FAILED, JobState.KILLED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.COMPLETED, JobState.FAILED, JobState.QUEUED, JobState.KILLED}
    ),
    JobState.COMPLETED: frozenset({JobState.CLEANED}),
    JobState.FAILED: frozenset({JobState.CLEANED}),
    JobState.INVALID: frozenset({JobState.CLEANED}),
    JobState.KILLED: frozenset({JobState.CLEANED}),
    JobState.CLEANED: frozenset(),
}
"""The one table of allowed transitions; whoever changes a state asks it."""

ACTIVE_STATES = (JobState.PROCESSING, JobState.SUBMITTED, JobState.RUNNING)
"""States in which an agent holds the job, in the order in which they are passed."""

FINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.INVALID, JobState.KILLED})
"""States that end a job; only retention (to Cleaned) follows."""


@dataclass(frozen=True, slots=True)
class Step:
    """A state that a job comes to, why, and when (Unix time)."""

    state: JobState
    reason: str
    at: float


def steps_beyond(state: JobState, steps: Iterable[Step]) -> list[Step]:
    """Return those of some steps to active states that take a job on from this one.

    A step to where it is by then, or behind that, is left out: it was said again.
    """
    taken: list[Step] = []
    for step in steps:
        if ACTIVE_STATES.index(step.state) > ACTIVE_STATES.index(state):
            taken.append(step)
            state = step.state
    return taken


def has_ended(state: JobState) -> bool:
    """Say whether no attempt of a job in this state is or will be under way."""
    return state is not JobState.QUEUED and state not in ACTIVE_STATES


# --- file names -------------------------------------------------------------------

MAX_PATH_BYTES = 4096
MAX_PATHS_BYTES = 4 * 1024 * 1024
"""How long all names of a job may be together: the list must fit into one message to the agent."""

_MAX_NAME_BYTES = 255
_MAX_DEPTH = 64
_MAX_DIRECTORIES = 10_000


def file_name_problem(name: str) -> str | None:
    """Say why ``name`` may not be the name of an uploaded file, or None if it may.

    A name is a relative path below the job's directory: segments of at most 255 bytes in UTF-8
    (NAME_MAX of the usual file systems), none of them empty, ``.`` or ``..``, without
    backslashes, control characters or lone surrogates, and at most 4,096 bytes in all.
    """
    if not name:
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    if "\\" in name:
        return "contains a backslash; directories are separated by /"
    if name.startswith("/"):
        return "is not relative"
    try:
        segments = name.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if any(segment in (b".", b"..") for segment in segments):
        return "has . or .. as a directory"
    if not all(segments):
        return "names no file, or a directory without a name"
    if any(len(segment) > _MAX_NAME_BYTES for segment in segments):
        return f"is longer than {_MAX_NAME_BYTES} bytes between two /"
    if len(segments) > _MAX_DEPTH:
        return f"lies more than {_MAX_DEPTH - 1} directories deep"
    if len(name.encode("utf-8")) > MAX_PATH_BYTES:
        return f"is longer than {MAX_PATH_BYTES} bytes"
    return None


def file_names_problem(names: Collection[str]) -> str | None:
    """Say why names, each good by itself, can't be those of the files of one job; None if they can.

    No file may also be a directory, no two may differ in their Unicode normalisation only (some
    file systems take them for one), and there are bounds on bytes and directories of all.
    """
    if sum(len(name.encode("utf-8")) for name in names) > MAX_PATHS_BYTES:
        return f"the names of all files are longer than {MAX_PATHS_BYTES} bytes together"
    before: list[str] = []
    directories = 0
    # in this order a file comes right before what lies below it, and twins are neighbours
    for segments in sorted(unicodedata.normalize("NFC", name).split("/") for name in names):
        if segments == before:
            return f"the name {'/'.join(segments)!r:.200} is given more than once"
        if segments[: len(before)] == before and before:
            return f"the name {'/'.join(before)!r:.200} is a file and a directory"
        directories += len(segments) - 1 - _shared(before[:-1], segments[:-1])
        before = segments
    if directories > _MAX_DIRECTORIES:
        return f"there are more than {_MAX_DIRECTORIES} directories; send an archive"
    return None


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many segments two paths have in common from the start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def directories_of(names: Iterable[str]) -> list[str]:
    """Return the directories that these files need, parents first."""
    needed: set[str] = set()
    for name in names:
        parent = name.rpartition("/")[0]
        while parent and parent not in needed:
            needed.add(parent)
            parent = parent.rpartition("/")[0]
    return sorted(needed)


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One input file of a job: relative path, length in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


# --- resources --------------------------------------------------------------------

MAX_CPUS = 65_536
MAX_GPUS = 1_024
MAX_MEMORY_BYTES = 2**50
MIN_MEMORY_BYTES = 2**20

_MEMORY = re.compile(r"([0-9]{1,20})([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = ("", "K", "M", "G", "T")


@dataclass(frozen=True, order=True, slots=True)
class Resources:
    """What a job needs, or what an agent has: cores, bytes of memory, GPUs.

    ``memory`` is 0 where nothing is said of it: a job without a limit, an agent that does
    not know how much it has.
    """

    cpus: int = 1
    memory: int = 0
    gpus: int = 0

    def fits(self, room: Resources) -> bool:
        """Say whether all of it fits into ``room``."""
        return self.cpus <= room.cpus and self.memory <= room.memory and self.gpus <= room.gpus

    def at_least(self, other: Resources) -> Resources:
        """Return what has room for each of the two, one at a time."""
        return Resources(
            max(self.cpus, other.cpus), max(self.memory, other.memory), max(self.gpus, other.gpus)
        )

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.memory + other.memory, self.gpus + other.gpus)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.cpus - other.cpus, self.memory - other.memory, self.gpus - other.gpus)


DEFAULT_RESOURCES = Resources()
"""What a job gets that asks for nothing, of a service that says nothing."""


@dataclass(frozen=True, order=True, slots=True)
class Demand:
    """What a queued job demands of the agent that gets it.

    ``avoided`` are the ids, in order, of agents that lost the job before: it goes there only if
    no other could ever run it.
    """

    resources: Resources = DEFAULT_RESOURCES
    avoided: tuple[str, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # made once: the scheduler looks demands up again and again
        object.__setattr__(self, "_hash", hash((self.resources, self.avoided)))

    def __hash__(self) -> int:
        return self._hash


NO_RESOURCES = Resources(0, 0, 0)


@dataclass(frozen=True, slots=True)
class Usage:
    """What an attempt used: CPU time, the most memory at a time (bytes), time from start to end.

    None is what is not known.
    """

    cpu_seconds: float | None
    peak_memory: int | None
    wall_seconds: float | None


def parse_count(text: str, low: int, high: int) -> int:
    """Read a number of cores or GPUs; raises :class:`ValueError` with a sentence for users."""
    if not re.fullmatch(r"[0-9]{1,20}", text) or not low <= int(text) <= high:
        raise ValueError(f"must be a whole number from {low} to {high}")
    return int(text)


def parse_memory(text: str) -> int:
    """Read an amount of memory: bytes, or with a unit of 1,024 such as ``512M`` or ``8G``.

    Raises :class:`ValueError` with a sentence that fits users.
    """
    match = _MEMORY.fullmatch(text.strip())
    if match is None:
        raise ValueError("must be a number of bytes, or one with a unit, such as 512M or 8G")
    size = int(match[1]) << 10 * _UNITS.index(match[2].upper())
    if not MIN_MEMORY_BYTES <= size <= MAX_MEMORY_BYTES:
        raise ValueError("must be from 1M to 1024T")
    return size


def memory_text(size: int) -> str:
    """Write an amount of memory for a reader, such as ``8 GB``; units are of 1,024 bytes."""
    amount, unit = float(size), 0
    while amount >= 1024 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    return f"{amount:.1f}".removesuffix(".0") + f" {_UNITS[unit]}B"


# --- isolation --------------------------------------------------------------------


class IsolationKind(enum.StrEnum):
    """How jobs are kept from what is not theirs; ``auto`` is the agent's choice."""

    AUTO = "auto"
    NONE = "none"
    LANDLOCK = "landlock"
    BUBBLEWRAP = "bubblewrap"
    PODMAN = "podman"
    WRAPPER = "wrapper"


@dataclass(frozen=True, slots=True)
class Isolation:
    """What the jobs of a service may reach. Paths are those of the agent's machine.

    ``network`` False takes the network away. ``readable`` and ``writable`` are granted beyond
    what every job has. ``image`` is for podman, ``wrapper`` the start of a command line.
    """

    kind: IsolationKind = IsolationKind.AUTO
    network: bool = True
    readable: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    image: str | None = None
    wrapper: tuple[str, ...] = ()

    def is_default(self) -> bool:
        """Whether nothing was asked for, so that every agent can give it."""
        return self == DEFAULT_ISOLATION

    def needs_asking(self) -> bool:
        """Whether it depends on an agent's machine if this can be given."""
        return not self.is_default() and self != Isolation(IsolationKind.NONE)

    def problem(self) -> str | None:
        """Say why these settings contradict each other, or None if they do not."""
        kind, none = self.kind, IsolationKind.NONE
        if self.image and kind is not IsolationKind.PODMAN:
            return f'image needs isolation = "podman", not "{kind}"'
        if self.wrapper and kind is not IsolationKind.WRAPPER:
            return f'wrapper needs isolation = "wrapper", not "{kind}"'
        if kind is IsolationKind.PODMAN and not self.image:
            return 'isolation = "podman" needs an image'
        if kind is IsolationKind.WRAPPER and not self.wrapper:
            return 'isolation = "wrapper" needs a wrapper'
        if kind is none and (self.readable or self.writable):
            return 'readable and writable mean nothing with isolation = "none"'
        if kind in (none, IsolationKind.WRAPPER) and not self.network:
            return f'network = false can\'t be given with isolation = "{kind}"'
        if kind is IsolationKind.WRAPPER and (self.readable or self.writable):
            return "readable and writable must be said in the wrapper itself"
        return None


DEFAULT_ISOLATION = Isolation()
"""What jobs get of a service that says nothing."""


@dataclass(frozen=True, slots=True)
class IsolationOffer:
    """What one agent makes of one kind: whether it gives it, and in sentences what is amiss.

    ``notes`` say why it is not given or, if it is, what stays within the reach of jobs.
    """

    kind: IsolationKind
    is_given: bool
    notes: tuple[str, ...] = ()
