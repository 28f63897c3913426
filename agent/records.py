"""What an agent keeps of an attempt on its disk: two records with a format of their own.

The wire may change from one version to the next, the records must not: an agent is upgraded while
its jobs run, and finds them by what the version before has written. So every field is written and
read here by its name. Whoever changes a format raises its number and reads the one before, too.

Format 0, of agents before this module, had messages of the wire in these files, the first line of
``attempt.json`` being the boot.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from jobs import FileSpec, Isolation, IsolationKind, JobState, Resources, Usage
from wire.messages import Assign, Finished, OutputLimits

_FORMAT = 1


class Unreadable(Exception):
    """A record has no format that this version knows; the message says what is wrong."""


class Incomplete(Unreadable):
    """A record was not written to its end."""


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """What an attempt is: the order, when the machine was started, whose id it has, what runs it.

    ``executor`` is empty in records of agents that had but one.
    """

    assign: Assign
    boot: str
    incarnation: str
    executor: str


def encode_attempt(record: AttemptRecord) -> str:
    """Return the text of ``attempt.json``."""
    assign = record.assign
    output, resources, isolation = assign.output, assign.resources, assign.isolation
    return _encode(
        executor=record.executor,
        boot=record.boot,
        incarnation=record.incarnation,
        job_id=assign.job_id,
        attempt_id=assign.attempt_id,
        number=assign.number,
        user_id=assign.user_id,
        service=assign.service,
        timeout_seconds=assign.timeout_seconds,
        grace_seconds=assign.grace_seconds,
        output={
            "result_bytes": output.result_bytes,
            "result_files": output.result_files,
            "log_bytes": output.log_bytes,
        },
        files=[[file.name, file.size, file.sha256] for file in assign.files],
        resources={
            "cpus": resources.cpus,
            "memory": resources.memory,
            "gpus": resources.gpus,
        },
        isolation={
            "kind": isolation.kind,
            "network": isolation.network,
            "readable": isolation.readable,
            "writable": isolation.writable,
            "image": isolation.image,
            "wrapper": isolation.wrapper,
        },
        slurm_options=assign.slurm_options,
    )


def decode_attempt(text: str) -> AttemptRecord:
    """Read ``attempt.json``. Raises :class:`Unreadable`, or :class:`Incomplete`."""
    if not text.startswith("{"):
        boot, _, text = text.partition("\n")
        fields = _decode(text)
        incarnation = executor = ""
        files = [(file["name"], file["size"], file["sha256"]) for file in _list(fields)]
    else:
        fields = _decode(text)
        _check_format(fields)
        boot, incarnation = str(fields.get("boot")), str(fields.get("incarnation"))
        executor = str(fields.get("executor", ""))
        files = [(name, size, sha256) for name, size, sha256 in _list(fields)]
    try:
        return AttemptRecord(_assign_of(fields, files), boot, incarnation, executor)
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"a field is wrong or missing: {error!r}") from None


def encode_report(report: Finished) -> str:
    """Return the text of ``finished.json``."""
    return _encode(
        attempt_id=report.attempt_id,
        state=str(report.state),
        exit_code=report.exit_code,
        message=report.message,
        result_size=report.result_size,
        result_sha256=report.result_sha256,
        usage=None if report.usage is None else asdict(report.usage),
    )


def decode_report(text: str) -> Finished:
    """Read ``finished.json``. Raises :class:`Unreadable`."""
    fields = _decode(text)
    if "type" not in fields:
        _check_format(fields)
    try:
        return Finished(
            attempt_id=fields["attempt_id"],
            state=JobState(fields["state"]),
            exit_code=fields["exit_code"],
            message=fields["message"],
            result_size=fields["result_size"],
            result_sha256=fields["result_sha256"],
            usage=Usage(**usage) if (usage := fields.get("usage")) else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"a field is wrong or missing: {error!r}") from None


def _encode(**fields: object) -> str:
    return json.dumps({"format": _FORMAT, **fields}, separators=(",", ":"))


def _decode(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise Incomplete("it ends in the middle, or is no JSON at all") from None
    if not isinstance(fields, dict):
        raise Unreadable("it is not an object")
    return fields


def _check_format(fields: dict[str, Any]) -> None:
    if fields.get("format") != _FORMAT:
        raise Unreadable(f"its format is {fields.get('format')!r}, not {_FORMAT}")


def _list(fields: dict[str, Any]) -> list[Any]:
    files = fields.get("files")
    if not isinstance(files, list):
        raise Unreadable("it has no list of files")
    return files


def _assign_of(fields: dict[str, Any], files: list[tuple[str, int, str]]) -> Assign:
    output, isolation = fields["output"], fields.get("isolation", {})
    return Assign(
        job_id=fields["job_id"],
        attempt_id=fields["attempt_id"],
        number=fields["number"],
        user_id=fields["user_id"],
        service=fields["service"],
        timeout_seconds=fields["timeout_seconds"],
        grace_seconds=fields["grace_seconds"],
        output=OutputLimits(output["result_bytes"], output["result_files"], output["log_bytes"]),
        files=tuple(FileSpec(*file) for file in files),
        resources=Resources(**fields.get("resources", {})),
        isolation=Isolation(
            kind=IsolationKind(isolation.get("kind", IsolationKind.AUTO)),
            network=isolation.get("network", True),
            readable=tuple(isolation.get("readable", ())),
            writable=tuple(isolation.get("writable", ())),
            image=isolation.get("image"),
            wrapper=tuple(isolation.get("wrapper", ())),
        ),
        slurm_options=tuple(fields.get("slurm_options", ())),
    )
