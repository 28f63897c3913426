"""What crosses the wire: job states and their transitions, messages, one codec.

Text frames carry one JSON object with a ``type`` and the fields of the message of
that name. Binary frames carry a 16-byte header (transfer, offset) and the bytes.
Everything that is read from a peer is parsed here, once, into frozen dataclasses;
what does not fit raises :class:`ProtocolError` and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import struct
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

PROTOCOL_VERSION = 1

CHUNK_BYTES = 256 * 1024
"""Bytes in every binary frame but the last of its transfer, and in every stored chunk."""

READ_BYTES = 4 * CHUNK_BYTES
"""Bytes that the sender of a long transfer reads at a time: a thread's turn for some frames."""

WINDOW_BYTES = 4 * 1024 * 1024
"""How far a sender may run ahead of the last offset that its receiver acknowledged."""

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""The longest text frame that is read; ten thousand files with the longest names fit into it."""

RUN_SCRIPT = "run.sh"
"""The file that every job has and that the agent starts with bash."""


class ProtocolError(Exception):
    """The peer sent something that the protocol does not allow."""


# --- job states -------------------------------------------------------------------


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


def has_ended(state: JobState) -> bool:
    """Say whether no attempt of a job in this state is or will be under way."""
    return state is not JobState.QUEUED and state not in ACTIVE_STATES


# --- file names -------------------------------------------------------------------

_MAX_NAME_BYTES = 255


def file_name_problem(name: str) -> str | None:
    """Say why ``name`` may not be the name of an uploaded file, or None if it may.

    A job's input is one flat directory, so a name is one path component: not empty,
    not ``.`` or ``..``, without separators, control characters or lone surrogates,
    and at most 255 bytes in UTF-8 (NAME_MAX of the usual file systems).
    """
    if not name:
        return "is empty"
    if name in (".", ".."):
        return "is a directory"
    if "/" in name or "\\" in name:
        return "contains a path separator"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return "contains a control character"
    try:
        encoded = name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if len(encoded) > _MAX_NAME_BYTES:
        return f"is longer than {_MAX_NAME_BYTES} bytes"
    return None


# --- messages ---------------------------------------------------------------------


class AttemptPhase(enum.StrEnum):
    """How far an attempt has come on the agent's side."""

    RECEIVING = "receiving"
    ACCEPTED = "accepted"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class FileSpec:
    """One input file of a job: plain name, length in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HeldAttempt:
    """An attempt that a connecting agent still holds; ``input_offset`` is what it has on disk."""

    job_id: int
    attempt_id: int
    phase: AttemptPhase
    input_offset: int


@dataclass(frozen=True, slots=True)
class KeptAttempt:
    """The server wants this attempt to go on, and has its result and output up to the offsets."""

    attempt_id: int
    result_offset: int
    stdout_offset: int
    stderr_offset: int


@dataclass(frozen=True, slots=True)
class Hello:
    """Agent's first message. ``services`` is None when it offers all of the server's.

    ``slots`` is 0 for an agent that drains: it only finishes what it holds.

    ``agent_id`` outlives the process, ``instance`` does not: the same instance may
    replace its own half-dead connection at once, another one must wait its turn.
    """

    protocol: int
    agent_id: str
    instance: str
    name: str
    version: str
    slots: int
    services: tuple[str, ...] | None
    attempts: tuple[HeldAttempt, ...]


@dataclass(frozen=True, slots=True)
class Welcome:
    """Server's answer to :class:`Hello`: what to keep, and the channel's rhythm in seconds.

    Attempts of the agent that are not in ``keep`` are superseded: kill and remove them.
    """

    protocol: int
    version: str
    lease_seconds: float
    heartbeat_seconds: float
    keep: tuple[KeptAttempt, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """The server will not talk to this agent; ``retry`` says whether trying later can help."""

    reason: str
    retry: bool


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The sender lives. ``load`` is the 1-minute load average of an agent's machine."""

    load: float | None = None


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


@dataclass(frozen=True, slots=True)
class Accepted:
    """Agent has all input on disk, checked."""

    attempt_id: int


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


@dataclass(frozen=True, slots=True)
class Rejected:
    """Agent says that the job, as uploaded, can never run."""

    attempt_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Agent no longer has the attempt, or can't go on with it; another may try."""

    attempt_id: int
    reason: str


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
    """Server does not want this attempt any more (superseded): kill it and remove it."""

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
    | Refused
    | Heartbeat
    | Drain
    | Assign
    | Accepted
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


@dataclass(frozen=True, slots=True)
class UnknownMessage:
    """A message type of a newer peer; to be logged and passed over."""

    type: str


# --- text frames ------------------------------------------------------------------

_LARGEST_INTEGER = 2**63 - 1
_SMALLEST_INTEGER = -(2**63)

Parser: TypeAlias = Callable[[object], Any]


def encode(message: Message) -> str:
    """Return the text frame for ``message``."""
    fields = dataclasses.asdict(message)
    fields["type"] = type(message).__name__.lower()
    return json.dumps(fields, separators=(",", ":"))


def decode(text: str) -> Message | UnknownMessage:
    """Parse one text frame.

    Fields that this version does not know are passed over, as a newer peer may send
    them. Raises :class:`ProtocolError` for anything that is not a well-formed message.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ProtocolError("not an object with a type")
    parse = _MESSAGE_PARSERS.get(value["type"])
    if parse is None:
        return UnknownMessage(value["type"][:64])
    message: Message = parse(value)
    return message


def _parse_integer(value: object) -> int:
    if type(value) is not int or not _SMALLEST_INTEGER <= value <= _LARGEST_INTEGER:
        raise ProtocolError(f"not a 64-bit integer: {value!r:.80}")
    return value


def _parse_number(value: object) -> float:
    if type(value) not in (int, float):
        raise ProtocolError(f"not a number: {value!r:.80}")
    number = float(typing.cast(float, value))
    if not abs(number) < 1e12:  # also refuses NaN and infinity
        raise ProtocolError(f"number out of range: {number}")
    return number


def _parse_text(value: object) -> str:
    if not isinstance(value, str):
        raise ProtocolError(f"not a string: {value!r:.80}")
    return value


def _parse_boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError(f"not a boolean: {value!r:.80}")
    return value


_SCALAR_PARSERS: Mapping[type, Parser] = {
    int: _parse_integer,
    float: _parse_number,
    str: _parse_text,
    bool: _parse_boolean,
}


def _parser(annotation: Any) -> Parser:
    """Build the function that checks and converts a value of this type."""
    if isinstance(annotation, type) and annotation in _SCALAR_PARSERS:
        return _SCALAR_PARSERS[annotation]
    if typing.get_origin(annotation) is types.UnionType:
        return _optional_parser(annotation)
    if typing.get_origin(annotation) is tuple:
        return _tuple_parser(typing.get_args(annotation)[0])
    assert isinstance(annotation, type)
    if issubclass(annotation, enum.StrEnum):
        return _enum_parser(annotation)
    return _dataclass_parser(annotation)


def _optional_parser(annotation: Any) -> Parser:
    (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
    parse = _parser(inner)
    return lambda value: None if value is None else parse(value)


def _tuple_parser(element: Any) -> Parser:
    parse = _parser(element)

    def parse_list(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ProtocolError(f"not a list: {value!r:.80}")
        return tuple(parse(item) for item in value)

    return parse_list


def _enum_parser(cls: type[enum.StrEnum]) -> Parser:
    def parse_enum(value: object) -> enum.StrEnum:
        try:
            return cls(_parse_text(value))
        except ValueError:
            raise ProtocolError(f"not a {cls.__name__}: {value!r:.80}") from None

    return parse_enum


def _dataclass_parser(cls: type[Any]) -> Parser:
    hints = typing.get_type_hints(cls)
    parsers = {field.name: _parser(hints[field.name]) for field in dataclasses.fields(cls)}
    # one with a default is younger than the protocol's version: a peer may not know it
    required = {
        field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING
    }

    def parse_fields(value: object) -> Any:
        if not isinstance(value, dict):
            raise ProtocolError(f"not a {cls.__name__}: {value!r:.80}")
        missing = required - value.keys()
        if missing:
            raise ProtocolError(f"{cls.__name__} without {', '.join(sorted(missing))}")
        given = {name: parse(value[name]) for name, parse in parsers.items() if name in value}
        return cls(**given)

    return parse_fields


_MESSAGE_PARSERS: Mapping[str, Parser] = {
    cls.__name__.lower(): _dataclass_parser(cls) for cls in typing.get_args(Message)
}


# --- binary frames ----------------------------------------------------------------


class Stream(enum.IntEnum):
    """What of an attempt a transfer carries; the direction follows from it.

    A SNAPSHOT is named by its request, all others by the attempt.
    """

    INPUT = 0
    RESULT = 1
    STDOUT = 2
    STDERR = 3
    SNAPSHOT = 4
    STDOUT_LIVE = 5
    STDERR_LIVE = 6


LIVE_STREAMS: Mapping[Stream, Stream] = {
    Stream.STDOUT: Stream.STDOUT_LIVE,
    Stream.STDERR: Stream.STDERR_LIVE,
}
"""The two streams of a job's output, each with the one that carries the latest of it.

Offsets are those of what the process wrote; gaps are allowed. Of an output that is longer
than the limit STDOUT and STDERR carry the first half of the limit while the job runs, and the
last half at its end, before Finished. What the job writes between goes, as far as there is
room, with the live stream, and counts only until the end.
"""

OUTPUT_STREAMS = frozenset({*LIVE_STREAMS, *LIVE_STREAMS.values()})
"""All streams that carry output."""


_STREAM_BITS = 3
_HEADER = struct.Struct(">QQ")
MAX_FRAME_BYTES = _HEADER.size + CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class Frame:
    """A piece of a transfer: ``data`` stands at ``offset`` bytes from its start."""

    transfer: int
    offset: int
    data: bytes


def transfer_id(attempt_id: int, stream: Stream) -> int:
    """Name a transfer; derived, so that both ends know it without agreeing on it first."""
    return attempt_id << _STREAM_BITS | stream


def transfer_parts(transfer: int) -> tuple[int, Stream]:
    """Split a transfer's name into attempt id and stream.

    Raises :class:`ProtocolError` for a stream that this version does not know.
    """
    try:
        return transfer >> _STREAM_BITS, Stream(transfer & (1 << _STREAM_BITS) - 1)
    except ValueError:
        raise ProtocolError(f"unknown stream in transfer {transfer}") from None


def encode_frame(transfer: int, offset: int, data: bytes | memoryview) -> bytes:
    """Return the binary frame for one piece of a transfer."""
    return _HEADER.pack(transfer, offset) + data


def decode_frame(frame: bytes) -> Frame:
    """Parse one binary frame; raises :class:`ProtocolError` if it is not one."""
    if not _HEADER.size < len(frame) <= MAX_FRAME_BYTES:
        raise ProtocolError(f"binary frame of {len(frame)} bytes")
    transfer, offset = _HEADER.unpack_from(frame)
    return Frame(transfer, offset, frame[_HEADER.size :])
