"""Little results a moment after their commit, in memory: who waited for the end gets them at once.

To read a result that was written a moment ago is a hop to another thread, for bytes that were
here already.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from events import Transition
from jobs import JobState
from records import StoredResult

_MOST_RESULTS = 64  # of LITTLE_BYTES each: 4 MiB


@dataclass(frozen=True, slots=True)
class ResultStored:
    """Announced with the commit that ends a job: its result, with the content."""

    job_id: int
    result: StoredResult


class LatestResults:
    """The little results that were committed last, until retention removes them."""

    def __init__(self) -> None:
        self._known: dict[int, StoredResult] = {}

    def settle(self, events: Iterable[object]) -> None:
        """Take in what a commit brought about."""
        for event in events:
            if isinstance(event, ResultStored):
                if len(self._known) >= _MOST_RESULTS:
                    del self._known[next(iter(self._known))]
                self._known[event.job_id] = event.result
            elif isinstance(event, Transition) and event.after is JobState.CLEANED:
                self._known.pop(event.job_id, None)

    def get(self, job_id: int) -> StoredResult | None:
        """Return a job's result if it is one of these."""
        return self._known.get(job_id)
