"""What is said of a job when it is submitted, and its way to the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator_client.operations import new_key
from orchestrator_client.retries import Sender
from orchestrator_client.transport import Request
from orchestrator_client.uploads import FileLike, Form, Progress, sources_of

# the last byte is followed by a commit, which may wait for a slow disk
_UPLOAD_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Submission:
    """All that is said of a job when it is submitted.

    ``timeout`` is in seconds, ``memory`` in bytes or like ``8G``. ``parameters`` are uploaded as
    ``parameters.json``. ``idempotency_key`` names the request, so that sending it again within 24
    hours makes no second job; one is made up if it is None.
    """

    service: str
    files: Sequence[FileLike]
    user_id: int | None = None
    name: str | None = None
    priority: int | None = None
    timeout: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    cpus: int | None = None
    memory: int | str | None = None
    gpus: int | None = None
    parameters: Mapping[str, object] = field(default_factory=dict)
    idempotency_key: str | None = None


async def submit(
    sender: Sender, submission: Submission, user_id: int, progress: Progress | None = None
) -> int:
    """Upload a job and return its id; it is made once, however often the upload breaks."""
    files = list(submission.files)
    if submission.parameters:
        files.append(("parameters.json", _json_text(submission.parameters)))
    sources = await sender.transport.run(lambda: sources_of(files))
    form = Form(_fields(submission, user_id), sources, progress)
    headers = {"Idempotency-Key": submission.idempotency_key or new_key()}
    request = Request("POST", "/upload", (), headers, form, _UPLOAD_SECONDS)
    return int((await sender.json(request))["id"])


def _fields(submission: Submission, user_id: int) -> list[tuple[str, str]]:
    fields = [("user_id", str(user_id)), ("service", submission.service)]
    for name in ("name", "priority", "timeout", "cpus", "memory", "gpus"):
        value = getattr(submission, name)
        if value is not None:
            fields.append((name, str(value)))
    fields += [("tag", f"{key}:{value}") for key, value in submission.tags.items()]
    return fields


def _json_text(parameters: Mapping[str, object]) -> bytes:
    return (json.dumps(dict(parameters), indent=2, ensure_ascii=False) + "\n").encode()
