"""What users see of jobs, kept in memory: who polls asks for the same again and again.

A read of the database is a hop to another thread, which costs more than all the rest of a poll.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from events import Transition
from records import JobStatus

_MAX_JOBS = 10_000
_MAX_MESSAGE = 1000  # characters; with a longer one the status is read each time


class LatestStatuses:
    """The statuses of the jobs that changed or were asked for lately.

    What it gives is never older than what anybody was told before, by the feed, by the answer
    to a write, or by a statement that reads: the jobs of a transaction are in doubt from
    before its commit until it is published, and meanwhile the database is asked.
    """

    def __init__(self) -> None:
        self._known: dict[int, JobStatus] = {}
        self._in_doubt: frozenset[int] = frozenset()
        self._reads: dict[int, object] = {}

    def doubt(self, events: Iterable[object]) -> None:
        """Readers may see these from now on; called in the writer's thread.

        A commit that fails leaves its jobs in doubt until the next one, which does no harm.
        """
        self._in_doubt = frozenset(
            event.job_id for event in events if isinstance(event, Transition)
        )

    def take_in(self, events: Iterable[object]) -> None:
        """Take in what a commit brought about, in its order."""
        for event in events:
            if isinstance(event, Transition):
                self._reads.pop(event.job_id, None)  # what it finds may be from before
                self._remember(JobStatus(event.job_id, event.after, event.message))
        self._in_doubt = frozenset()

    async def get(
        self, job_id: int, read: Callable[[int], Awaitable[JobStatus | None]]
    ) -> JobStatus | None:
        """Return a job's status, by ``read`` if it is not known; None if there is no such job."""
        if job_id not in self._in_doubt and (known := self._known.get(job_id)) is not None:
            return known
        this_read = self._reads[job_id] = object()
        status: JobStatus | None = None
        try:
            status = await read(job_id)
        finally:
            if self._reads.get(job_id) is this_read:
                del self._reads[job_id]
                if status is not None:
                    self._remember(status)
        return status

    def _remember(self, status: JobStatus) -> None:
        self._known.pop(status.id, None)  # so that it becomes the last one
        if len(status.message) > _MAX_MESSAGE:
            return
        if len(self._known) >= _MAX_JOBS:
            del self._known[next(iter(self._known))]
        self._known[status.id] = status
