"""Submit many jobs, a bounded number at a time, and hear of each when it has ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing

from orchestrator_client.errors import BadRequest
from orchestrator_client.events import follow_events
from orchestrator_client.operations import show
from orchestrator_client.records import JobInfo
from orchestrator_client.retries import Sender
from orchestrator_client.submissions import Submission, submit
from orchestrator_client.waiting import tells_an_end


async def run_all(
    sender: Sender, submissions: Iterable[Submission], user_id: int, in_flight: int
) -> AsyncGenerator[tuple[int, JobInfo], None]:
    """Submit jobs, at most ``in_flight`` at a time not ended; yield (index, job) as they end.

    When the caller stops early, the jobs that were submitted go on.
    """
    waiting = enumerate(submissions)
    pending: dict[int, int] = {}
    query = (("user_id", str(user_id)),)
    async with aclosing(follow_events(sender, query, None)) as events:
        await _wait_for_position(events)
        while await _fill(sender, waiting, pending, user_id, in_flight):
            async for event in events:
                if event.data.get("id") in pending and tells_an_end(event):
                    job_id = int(event.data["id"])
                    yield pending.pop(job_id), await show(sender, job_id)
                    break


async def _wait_for_position(events: AsyncGenerator[object, None]) -> None:
    """Let the stream begin, so that it tells of every job that is submitted from now on."""
    async for _ in events:
        return


async def _fill(
    sender: Sender,
    waiting: Iterator[tuple[int, Submission]],
    pending: dict[int, int],
    user_id: int,
    in_flight: int,
) -> bool:
    """Submit as many as may be in flight; returns False if none is and none is left."""
    while len(pending) < in_flight:
        following = next(waiting, None)
        if following is None:
            break
        index, submission = following
        owner = user_id if submission.user_id is None else submission.user_id
        if owner != user_id:
            raise BadRequest("the jobs of one map() must be of one user")
        pending[await submit(sender, submission, user_id)] = index
    return bool(pending)
