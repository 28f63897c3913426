"""Whether an agent can be trusted with jobs: judged by those that it lost. Pure.

Most losses count against the agent as a whole. One that is for what a service's settings ask for
counts against that service there, and the agent goes on with the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

MAX_LOSSES = 3
"""How many attempts an agent may lose in a row before it is set aside."""

_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 300.0


@dataclass(slots=True)
class Health:
    """What an agent lost, of all or of one service, since it last showed that it is well.

    After a loss it gets nothing for a while, twice as long each time; what it loses meanwhile
    counts with it. With :data:`MAX_LOSSES` in a row it is set aside: it gets one job on trial
    after each pause. A result that it delivers makes it as good as new, and so does a job that
    it begins if it never lost one that it had started.
    """

    losses: int = 0
    reason: str = ""
    trial_at: float = 0.0
    lost_started: bool = False

    def lose(self, reason: str, now: float, *, was_started: bool) -> float:
        """It lost an attempt; returns for how many seconds it gets nothing."""
        self.reason = reason
        self.lost_started |= was_started
        if now >= self.trial_at:
            self.losses += 1
            doubled = _FIRST_PAUSE_SECONDS * 2.0 ** min(self.losses - 1, 16)
            self.trial_at = now + min(doubled, _LONGEST_PAUSE_SECONDS)
        return self.trial_at - now

    def begin(self) -> bool:
        """It began a job; returns whether that makes it well again."""
        return self.losses > 0 and not self.lost_started and self.recover()

    def recover(self) -> bool:
        """It delivered a result; returns whether that makes it well again."""
        was_ill = self.losses > 0
        self.losses, self.reason, self.lost_started = 0, "", False
        return was_ill

    def allowed(self, slots: int, busy: int, now: float) -> int:
        """Return how many more jobs it may get, of ``slots`` of which some are busy."""
        if self.losses and now < self.trial_at:
            return 0
        return (slots if self.losses < MAX_LOSSES else min(slots, 1)) - busy

    def allows_another(self, busy: int, now: float) -> bool:
        """Say whether it may get one more job than those that it has."""
        return self.allowed(busy + 1, busy, now) > 0

    def set_aside(self) -> str | None:
        """Say why it gets no more than a job on trial now and then; None if it is not so."""
        return self.reason if self.losses >= MAX_LOSSES else None


@dataclass(slots=True)
class Trust:
    """What is to be made of an agent: ``own`` as a whole, and of ``services`` in doubt there."""

    own: Health = field(default_factory=Health)
    services: dict[str, Health] = field(default_factory=dict)

    def doubt(self, service: str) -> Health:
        """Return the health of a service there, which is about to get worse."""
        return self.services.setdefault(service, Health())

    def begin(self, service: str) -> bool:
        """It began a job of a service; returns whether that makes anything well again."""
        return self._judge(service, Health.begin)

    def recover(self, service: str) -> bool:
        """It delivered a result; returns whether that makes anything well again."""
        return self._judge(service, Health.recover)

    def begin_anew(self) -> None:
        """It may be another agent by now: forget all."""
        self.own.recover()
        self.services.clear()

    def is_in_doubt(self) -> bool:
        """Say whether anything was lost that is not made good yet."""
        return self.own.losses > 0 or bool(self.services)

    def _judge(self, service: str, judge: Callable[[Health], bool]) -> bool:
        is_well_again = judge(self.own)
        if (of_service := self.services.get(service)) is not None and judge(of_service):
            del self.services[service]
            return True
        return is_well_again
