"""Wait for jobs to end: for one, or for many over one connection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from orchestrator_client.errors import Conflict, JobFailed, WaitTimeout
from orchestrator_client.events import POSITION, follow_events
from orchestrator_client.operations import JobFilter, find, show
from orchestrator_client.records import Event, JobInfo, JobState
from orchestrator_client.retries import Sender, read_json
from orchestrator_client.transport import ConnectionBroken, Request

# proxies cut what is silent for a minute
_WAIT_SECONDS = 50.0
_MARGIN_SECONDS = 20.0
_PAUSE_SECONDS = 0.2


async def wait_for_end(sender: Sender, job_id: int, seconds: float | None) -> JobInfo:
    """Return a job once it has ended, however. Raises :class:`WaitTimeout` after ``seconds``."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = _WAIT_SECONDS if deadline is None else deadline - time.monotonic()
        wait = max(0.0, min(left, _WAIT_SECONDS))
        started = time.monotonic()
        if (await _state_within(sender, job_id, wait)).has_ended:
            return await show(sender, job_id)
        if deadline is not None and time.monotonic() >= deadline:
            raise WaitTimeout(f"job {job_id} has not ended within {seconds:g} s; it goes on")
        if time.monotonic() - started < min(wait, _PAUSE_SECONDS):
            await sender.transport.sleep(_PAUSE_SECONDS)  # the server stops, and does not wait


async def _state_within(sender: Sender, job_id: int, seconds: float) -> JobState:
    """Ask for a job's state, for its end if that comes within ``seconds``."""
    request = Request(
        "GET",
        f"/download/{job_id}",
        (("wait", f"{seconds:.3f}"),),
        {"Range": "bytes=0-0"},  # of a result one byte is enough to know
        silence=seconds + _MARGIN_SECONDS,
    )
    async with sender.answer(request) as answer:
        with contextlib.suppress(ConnectionBroken):
            if answer.header("Content-Type") != "application/zip":
                return JobState((await read_json(answer, sender.url))["status"])
            await answer.read(1)
            return JobState.COMPLETED
    return (await show(sender, job_id)).state


async def wait_for_all(
    sender: Sender,
    job_ids: Iterable[int],
    user_id: int | None = None,
    seconds: float | None = None,
) -> AsyncGenerator[JobInfo, None]:
    """Yield jobs as they end, over one connection, however many they are.

    ``user_id`` says whose they are, if they are all of one user. Ids without a job are left out.
    Raises :class:`WaitTimeout` if not all have ended after ``seconds``.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    pending = set(job_ids)
    if not pending:
        return
    query = () if user_id is None else (("user_id", str(user_id)),)
    async with aclosing(follow_events(sender, query, None, deadline)) as events:
        is_looked_up = False
        async for event in events:
            if event.kind == POSITION and not is_looked_up:
                # what ended before the stream began
                is_looked_up = True
                found = {job.id: job async for job in find(sender, JobFilter(ids=sorted(pending)))}
                pending &= found.keys()
                for job in found.values():
                    if job.state.has_ended:
                        pending.discard(job.id)
                        yield await show(sender, job.id)
            elif event.data.get("id") in pending and tells_an_end(event):
                pending.discard(event.data["id"])
                yield await show(sender, event.data["id"])
            if is_looked_up and not pending:
                return
    raise WaitTimeout(f"{len(pending)} jobs have not ended within {seconds:g} s; they go on")


def tells_an_end(event: Event) -> bool:
    """Whether an event tells that a job has ended."""
    return event.kind == "job" and JobState(event.data["status"]).has_ended


def check_success(job: JobInfo) -> JobInfo:
    """Return a job that ended as ``Completed``; raises :class:`JobFailed` for any other."""
    if job.is_successful:
        return job
    raise _failure(job)


def check_result(job: JobInfo) -> None:
    """Raise :class:`JobFailed` or :class:`Conflict` if an ended job has no result to fetch."""
    check_success(job)
    if job.state is JobState.CLEANED:
        raise Conflict(f"the files of job {job.id} have been removed")


def _failure(job: JobInfo) -> JobFailed:
    outcome = job.outcome or job.state
    reason = f": {job.message}" if job.message else ""
    text = f"job {job.id} {_WORDS.get(outcome, outcome)}{reason}"
    return JobFailed(text, job.id, outcome, job.exit_code)


_WORDS = {
    JobState.FAILED: "failed",
    JobState.INVALID: "could not be run",
    JobState.KILLED: "was killed",
    JobState.CLEANED: "has ended, and its files are removed",
}
