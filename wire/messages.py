"""What agent and server say to each other: the messages, as frozen dataclasses.

A field with a default is younger than the protocol's version: a peer may not know it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeAlias

from jobs import (
    DEFAULT_ISOLATION,
    DEFAULT_RESOURCES,
    FileSpec,
    Isolation,
    IsolationKind,
    IsolationOffer,
    JobState,
    Resources,
    Usage,
)

PROTOCOL_VERSION = 2


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


class AttemptPhase(enum.StrEnum):
    """How far an attempt has come on the agent's side."""

    RECEIVING = "receiving"
    ACCEPTED = "accepted"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt that a connecting agent still holds; ``input_offset`` is what it has on disk.

    ``incarnation`` is the one of the :class:`Welcome` after which the attempt was assigned;
    empty for an attempt of an agent that did not know incarnations.
    """

    job_id: int
    attempt_id: int
    phase: AttemptPhase
    input_offset: int
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class KeptAttempt:
    """The server wants this attempt to go on, and has its result and output up to the offsets.

    ``incarnation`` is what the agent said of it: ids alone may be given out twice.
    """

    attempt_id: int
    result_offset: int
    stdout_offset: int
    stderr_offset: int
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class Hello:
    """Agent's first message. ``services`` is None when it offers all of the server's.

    ``slots`` is 0 for an agent that drains: it only finishes what it holds.

    ``agent_id`` outlives the process, ``instance`` does not: the same instance may
    replace its own half-dead connection at once, another one must wait its turn.

    ``secret`` is made by the agent together with its id (at least 32 characters) and kept beside
    it. The server remembers it from the first contact on, so that knowing an id does not make an
    agent; None for an agent that does not know of secrets.

    ``resources`` is all that the agent has, in use or free; what is free follows from what it
    holds. An agent that was told a number of slots and no number of cores has at least as many
    cores as slots. None, from an agent that does not know resources: a core for each slot.

    ``isolation`` is what it makes of each kind, ``default_isolation`` what ``auto`` means there.
    """

    protocol: int
    agent_id: str
    instance: str
    name: str
    version: str
    slots: int
    services: tuple[str, ...] | None
    attempts: tuple[HeldAttempt, ...]
    secret: str | None = None
    resources: Resources | None = None
    isolation: tuple[IsolationOffer, ...] = ()
    default_isolation: IsolationKind = IsolationKind.NONE


@dataclass(frozen=True, slots=True)
class Welcome:
    """Server's answer to :class:`Hello`: what to keep, and the channel's rhythm in seconds.

    Attempts of the agent that are not in ``keep`` are superseded: kill and remove them.
    ``incarnation`` names the life of the database in which what is assigned from now on has its
    id. Each start of a server has another one, so a database that was restored or copied never
    means the same attempt by the same id and incarnation.
    """

    protocol: int
    version: str
    heartbeat_seconds: float
    keep: tuple[KeptAttempt, ...]
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class ServiceIsolation:
    """What one service asks for."""

    service: str
    isolation: Isolation


@dataclass(frozen=True, slots=True)
class Services:
    """Server asks, after its :class:`Welcome` and whenever it changes: can you give this?

    Services that ask for nothing special are not among them. The answers bear the ``number``.
    """

    number: int
    services: tuple[ServiceIsolation, ...]


@dataclass(frozen=True, slots=True)
class ServiceChecked:
    """Agent's answer for one service of :class:`Services`; ``problem`` None: it can give that."""

    number: int
    service: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Refused:
    """The server will not talk to this agent; ``retry`` says whether trying later can help."""

    reason: str
    retry: bool


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The sender lives. ``load`` is the 1-minute load average of an agent's machine.

    ``problem`` says what keeps an agent from starting any job at all, None if nothing does. A
    server that ``asks`` wants one of the agent's at once; else an agent sends it when it is time.
    """

    load: float | None = None
    problem: str | None = None
    asks: bool = False


@dataclass(frozen=True, slots=True)
class Drain:
    """Agent takes nothing new from now on; what it holds it finishes."""


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """How much a job may leave: bytes and number of its files, bytes of each of its two logs."""

    result_bytes: int
    result_files: int
    log_bytes: int


@dataclass(frozen=True, slots=True)
class Assign:
    """Server gives an attempt; the bytes of ``files`` follow as its INPUT transfer, in order."""

    job_id: int
    attempt_id: int
    number: int
    user_id: int
    service: str
    timeout_seconds: int | None
    grace_seconds: float
    output: OutputLimits
    files: tuple[FileSpec, ...]
    resources: Resources = DEFAULT_RESOURCES
    isolation: Isolation = DEFAULT_ISOLATION
    slurm_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Accepted:
    """Agent has all input on disk, checked."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """An accepted job does not run yet, for the reason that is given; the last one counts.

    ``is_handed_on``: a cluster has taken it, and runs it when its turn comes. So the agent does
    what it is there for, however long that takes.
    """

    attempt_id: int
    reason: str
    is_handed_on: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """The job's process runs."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The job ended; its archive of ``result_size`` bytes follows as the RESULT transfer."""

    attempt_id: int
    state: JobState
    exit_code: int | None
    message: str
    result_size: int
    result_sha256: str
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """Agent says that the job, as uploaded, can never run."""

    attempt_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Agent no longer has the attempt, or can't go on with it; another may try.

    ``by_service``: for what the service's settings ask for there. That says nothing against the
    agent, which may go on with jobs of other services.
    """

    attempt_id: int
    reason: str
    by_service: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """Server has the result durably; the agent may forget the attempt."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Server wants the job ended; the agent reports what is left of it as finished."""

    attempt_id: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Server no longer wants this attempt (superseded): kill it and remove it."""

    attempt_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Server wants a ZIP of the attempt's files as they are now; answers bear the request's id."""

    request_id: int
    attempt_id: int


@dataclass(frozen=True, slots=True)
class SnapshotReady:
    """Agent has made the ZIP; its ``size`` bytes follow as the SNAPSHOT transfer."""

    request_id: int
    size: int


@dataclass(frozen=True, slots=True)
class SnapshotRefused:
    """Agent can't give the ZIP."""

    request_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class SnapshotDone:
    """Server wants no more of the ZIP; the agent may remove it."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """Receiver has everything of ``transfer`` below ``offset`` safe; opens the window."""

    transfer: int
    offset: int


Message: TypeAlias = (
    Hello
    | Welcome
    | Services
    | ServiceChecked
    | Refused
    | Heartbeat
    | Drain
    | Assign
    | Accepted
    | Waiting
    | Started
    | Finished
    | Rejected
    | Lost
    | Stored
    | Kill
    | Drop
    | Snapshot
    | SnapshotReady
    | SnapshotRefused
    | SnapshotDone
    | Acknowledge
)

AttemptReport: TypeAlias = Accepted | Started | Finished | Rejected | Lost
"""What an agent says about one attempt."""
