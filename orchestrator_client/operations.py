"""The calls of the API, each written once, as coroutines that both clients drive."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from urllib.parse import quote

from orchestrator_client.errors import BadRequest, Conflict
from orchestrator_client.records import (
    BulkAnswer,
    JobFile,
    JobInfo,
    JobState,
    bulk_answer,
    job_info,
)
from orchestrator_client.retries import Sender
from orchestrator_client.transport import Request

_PAGE_JOBS = 1000
_IDS_IN_A_REQUEST = 500  # with some 8 KB of a request line, the usual limit of servers
# the end of a job's processes is waited for before the answer comes
_TERMINATE_SECONDS = 120.0
_MANY_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs are meant; what is None or empty does not matter.

    ``tags`` are all of them demanded, ``states`` any of them; ``since`` is the earliest creation.
    """

    user_id: int | None = None
    service: str | None = None
    states: Sequence[str] = ()
    agent: str | None = None
    since: datetime | str | None = None
    text: str | None = None
    tags: Mapping[str, str] | None = None
    ids: Sequence[int] = ()

    def query(self) -> tuple[tuple[str, str], ...]:
        """Return it as the parameters of a URL."""
        pairs: list[tuple[str, str]] = []
        if self.user_id is not None:
            pairs.append(("user_id", str(self.user_id)))
        if self.service is not None:
            pairs.append(("service", self.service))
        pairs += [("status", state) for state in self.states]
        if self.agent is not None:
            pairs.append(("agent", self.agent))
        if self.since is not None:
            pairs.append(("since", _time_text(self.since)))
        if self.text is not None:
            pairs.append(("text", self.text))
        pairs += [("tag", f"{key}:{value}") for key, value in (self.tags or {}).items()]
        pairs += [("id", str(job_id)) for job_id in self.ids]
        return tuple(pairs)


def new_key() -> str:
    """Return an Idempotency-Key that no other request has."""
    return os.urandom(16).hex()


def _time_text(time: datetime | str) -> str:
    if isinstance(time, str):
        return time
    if time.tzinfo is None:
        raise BadRequest("since: a time needs its zone, as in datetime.now(UTC)")
    return time.isoformat()


# --- one job ----------------------------------------------------------------------


async def show(sender: Sender, job_id: int) -> JobInfo:
    """Return all about a job."""
    return job_info(await sender.json(Request("GET", f"/jobs/{job_id}")))


async def history(sender: Sender, job_id: int) -> list[dict[str, Any]]:
    """Return the changes of a job's state, oldest first."""
    body = await sender.json(Request("GET", f"/jobs/{job_id}/history"))
    return list(body["history"])


async def terminate(sender: Sender, job_id: int) -> None:
    """End a job. Raises :class:`Conflict` if it has ended already."""
    request = Request("POST", f"/terminate/{job_id}", silence=_TERMINATE_SECONDS)
    try:
        await sender.json(request)
    except Conflict as error:
        # the try before, whose answer got lost, may have been the one that ended it
        if not error.after_retry or (await show(sender, job_id)).state is not JobState.KILLED:
            raise


async def rerun(sender: Sender, job_id: int, idempotency_key: str | None = None) -> int:
    """Submit a job once more and return the id of the new one."""
    headers = {"Idempotency-Key": idempotency_key or new_key()}
    request = Request("POST", f"/jobs/{job_id}/rerun", headers=headers)
    return int((await sender.json(request))["id"])


async def delete(sender: Sender, job_id: int) -> None:
    """Free the bytes of a job that has ended. Raises :class:`Conflict` for any other."""
    try:
        await sender.json(Request("DELETE", f"/jobs/{job_id}"))
    except Conflict as error:
        if not error.after_retry or (await show(sender, job_id)).state is not JobState.CLEANED:
            raise


async def list_files(sender: Sender, job_id: int) -> AsyncGenerator[JobFile, None]:
    """Yield the files of a job: its result, or its input before there is one."""
    query: tuple[tuple[str, str], ...] = ()
    while True:
        body = await sender.json(Request("GET", f"/jobs/{job_id}/files", query))
        for file in body["files"]:
            yield JobFile(str(file["path"]), str(file["type"]), int(file["size"]))
        if body["next_cursor"] is None:
            return
        query = (("cursor", body["next_cursor"]),)


def file_path(job_id: int, path: str) -> str:
    """Return where one file of a job is."""
    return f"/jobs/{job_id}/files/{quote(path, errors='surrogateescape')}"


# --- many jobs --------------------------------------------------------------------


async def find(
    sender: Sender, wanted: JobFilter, limit: int | None = None
) -> AsyncGenerator[JobInfo, None]:
    """Yield the jobs that a filter lets through, newest first, at most ``limit``."""
    for part in _in_requests(wanted):
        query = part.query()
        ids = set(part.ids)
        cursor: tuple[tuple[str, str], ...] = ()
        while limit is None or limit > 0:
            size = _PAGE_JOBS if limit is None else min(limit, _PAGE_JOBS)
            pairs = (*query, ("limit", str(size)), *cursor)
            body = await sender.json(Request("GET", "/jobs", pairs))
            for job in body["jobs"]:
                if not ids or job["id"] in ids:  # a server that knows no such filter sends all
                    yield job_info(job)
            if limit is not None:
                limit -= len(body["jobs"])
            if body["next_cursor"] is None:
                break
            cursor = (("cursor", body["next_cursor"]),)


def _in_requests(wanted: JobFilter) -> Iterable[JobFilter]:
    """Split a filter with many ids: a request has room for some; the highest ids first."""
    if not wanted.ids:
        yield wanted
        return
    ids = sorted(set(wanted.ids), reverse=True)
    for start in range(0, len(ids), _IDS_IN_A_REQUEST):
        yield replace(wanted, ids=ids[start : start + _IDS_IN_A_REQUEST])


async def counts(sender: Sender, wanted: JobFilter) -> dict[str, int]:
    """Return how many jobs of a filter are in each state."""
    found: dict[str, int] = {}
    for part in _in_requests(wanted):
        body = await sender.json(Request("GET", "/jobs/counts", part.query()))
        for state, count in body["states"].items():
            found[state] = found.get(state, 0) + int(count)
    return found


async def terminate_many(sender: Sender, wanted: JobFilter) -> BulkAnswer:
    """End all jobs of a filter that have not ended."""
    return await _for_many(sender, "terminate", wanted)


async def delete_many(sender: Sender, wanted: JobFilter) -> BulkAnswer:
    """Free the bytes of all jobs of a filter that have ended."""
    return await _for_many(sender, "delete", wanted)


async def rerun_many(sender: Sender, wanted: JobFilter) -> BulkAnswer:
    """Submit all jobs of a filter once more."""
    return await _for_many(sender, "rerun", wanted)


async def _for_many(sender: Sender, action: str, wanted: JobFilter) -> BulkAnswer:
    answers = []
    for part in _in_requests(wanted):
        request = Request(
            "POST",
            f"/jobs/{action}",
            part.query(),
            silence=_MANY_SECONDS,
            is_repeatable=action != "rerun",
        )
        answers.append(bulk_answer(await sender.json(request)))
    return BulkAnswer(
        sum(answer.matched for answer in answers),
        sum(answer.done for answer in answers),
        sum(answer.skipped for answer in answers),
        tuple(job_id for answer in answers for job_id in answer.jobs),
    )


# --- the server -------------------------------------------------------------------


async def agents(sender: Sender) -> list[dict[str, Any]]:
    """Return the agents, as the API describes them."""
    return list((await sender.json(Request("GET", "/agents")))["agents"])


async def drain(sender: Sender, name: str) -> dict[str, Any]:
    """Give an agent nothing new."""
    return await sender.json(Request("POST", f"/agents/{quote(name, safe='')}/drain"))


async def resume(sender: Sender, name: str) -> dict[str, Any]:
    """Give a drained agent jobs again."""
    return await sender.json(Request("POST", f"/agents/{quote(name, safe='')}/resume"))


async def services(sender: Sender) -> list[dict[str, Any]]:
    """Return the services, as the API describes them."""
    return list((await sender.json(Request("GET", "/services")))["services"])


async def health(sender: Sender) -> dict[str, Any]:
    """Return the server's health. Raises :class:`ServerError` if it is not healthy."""
    return await sender.json(Request("GET", "/health"))
