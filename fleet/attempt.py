"""An attempt that an agent holds, as far as the server knows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from jobs import Demand, JobState
from records import ActiveJob, JobIdentity


@dataclass(eq=False, slots=True)
class Attempt:
    """How far an attempt is; ``ended`` is set once it counts no more, or its result is stored.

    ``is_begun``: its process was started, or a cluster has taken it.
    """

    job: JobIdentity
    id: int
    number: int
    demand: Demand
    state: JobState = JobState.PROCESSING
    waiting_reason: str | None = None  # why it does not run yet, as its agent says
    is_begun: bool = False
    may_have_result: bool = True  # some bytes of it may be stored already
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    def of(cls, active: ActiveJob) -> Attempt:
        """Make it from what the store says."""
        return cls(active.job, active.attempt_id, active.number, active.demand, active.state)
