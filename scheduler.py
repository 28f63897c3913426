"""The scheduling policy: whose turn it is, and that large jobs get one. Pure, without I/O."""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from config import ServiceLimits
from events import Transition
from fleet.placement import Placement
from jobs import ACTIVE_STATES, Demand, JobState
from records import UserQueue

MAX_OVERTAKES = 8
"""How many jobs may be started past one that does not fit, on agents that could hold it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs wait, and how many are active; one that is being given out is active."""

    waiting: int = 0
    active: int = 0


@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """The next job of a queue that demands one of these things goes to the agent beside it."""

    queue: UserQueue
    offers: Mapping[Demand, str]


@dataclass(slots=True)
class _Tally:
    waiting: int = 0
    active: int = 0

    def counts(self) -> Counts:
        return Counts(max(self.waiting, 0), self.active)


@dataclass(slots=True)
class _User:
    """A user's queue for one service: what its jobs demand, and the decisions under way."""

    tally: _Tally = field(default_factory=_Tally)
    queued: Counter[Demand] = field(default_factory=Counter)
    under_way: Counter[Demand] = field(default_factory=Counter)
    kept_for: Demand | None = None

    def has_available(self, demand: Demand) -> bool:
        """Whether there is surely a job with this demand that no decision takes."""
        return self.queued[demand] > self.under_way[demand]

    def demands(self) -> Iterable[Demand]:
        return self.queued.keys() | self.under_way.keys()

    def is_idle(self) -> bool:
        is_counted = self.tally.waiting or self.tally.active or self.kept_for is not None
        return not (is_counted or self.queued or self.under_way)


@dataclass(slots=True)
class _Service:
    limits: ServiceLimits | None  # None: not (or no longer) configured, so its jobs wait
    places: Iterator[int]
    total: _Tally = field(default_factory=_Tally)
    users: dict[int, _User] = field(default_factory=dict)
    queued: Counter[Demand] = field(default_factory=Counter)
    reserved: int = 0  # jobs for which agents are kept free
    # for each demand the users of whom such a job could run, in the order of their turns
    turns: dict[Demand, OrderedDict[int, int]] = field(default_factory=dict)

    def has_room(self) -> bool:
        """Whether one more job of the service may be active, beside those that are reserved."""
        used = self.total.active + self.reserved
        return self.limits is not None and used < self.limits.max_runs

    def has_room_for_reserved(self) -> bool:
        """Whether one of those that are reserved may be active."""
        return self.limits is not None and self.total.active < self.limits.max_runs

    def is_below_quota(self, active: int) -> bool:
        """Whether a user of whom so many jobs are active may have one more."""
        return self.limits is not None and active < self.limits.runs_per_user

    def change(
        self, user_id: int, waiting: int, active: int, demands: Iterable[Demand] = ()
    ) -> None:
        """Add to the tally of a user's queue, and keep its places in the rotation in step.

        ``demands`` are those of which more or fewer jobs are available than before.
        """
        user = self.users.setdefault(user_id, _User())
        was_below_quota = self.is_below_quota(user.tally.active)
        for tally in (user.tally, self.total):
            tally.waiting += waiting
            tally.active += active
        if self.is_below_quota(user.tally.active) is not was_below_quota:
            demands = user.demands()
        for demand in demands:
            self._update_turn(user_id, user, demand)
        if user.is_idle():
            del self.users[user_id]

    def change_queued(
        self, user_id: int, demand: Demand, change: int, *, decided: bool = False
    ) -> None:
        """The store has more or fewer queued jobs of a user with this demand.

        ``decided``: it is the job that a decision took.
        """
        user = self.users.setdefault(user_id, _User())
        if decided:
            user.under_way[demand] -= 1
            if not user.under_way[demand]:
                del user.under_way[demand]
        for queued in (user.queued, self.queued):
            queued[demand] += change
            if not queued[demand]:
                del queued[demand]
        self._update_turn(user_id, user, demand)

    def begin_decision(self, user_id: int, demands: Iterable[Demand]) -> None:
        """A job with one of the demands is given out; the user's next turn is the last one."""
        user = self.users.setdefault(user_id, _User())
        for demand in demands:
            user.under_way[demand] += 1
        for demand in user.queued:
            turns = self.turns.get(demand)
            if turns is not None and user_id in turns:
                turns[user_id] = next(self.places)
                turns.move_to_end(user_id)
        self.change(user_id, -1, +1, demands)

    def end_decision(
        self, user_id: int, demands: Iterable[Demand], waiting: int, active: int
    ) -> None:
        """No decision takes jobs with these demands any longer."""
        user = self.users.setdefault(user_id, _User())
        for demand in demands:
            user.under_way[demand] -= 1
            if user.under_way[demand] <= 0:
                del user.under_way[demand]
        self.change(user_id, waiting, active, demands)

    def update(self, user_id: int) -> None:
        """Give a user the places in the rotation that are due."""
        user = self.users[user_id]
        for demand in user.demands():
            self._update_turn(user_id, user, demand)
        if user.is_idle():
            del self.users[user_id]

    def _update_turn(self, user_id: int, user: _User, demand: Demand) -> None:
        may_run = (
            user.has_available(demand)
            and self.is_below_quota(user.tally.active)
            and user.kept_for in (None, demand)
        )
        if may_run:
            turns = self.turns.setdefault(demand, OrderedDict())
            if user_id not in turns:
                turns[user_id] = next(self.places)
        elif (present := self.turns.get(demand)) is not None:
            present.pop(user_id, None)
            if not present:
                del self.turns[demand]


class FairQueue:
    """Whose turn it is: users of a service take turns, and so do services.

    Knows how many jobs wait in each queue and what they demand, not which: the store gives out
    the first (highest priority, then lowest id) of those that demand what is on offer, in the
    transaction that makes the attempt. So neither memory nor a decision depends on how many jobs
    wait, and a job that was killed or queued again needs no search here.

    A decision is under way from :meth:`next_for` or :meth:`decide_ahead` until
    :meth:`carried_out` or :meth:`take_back`. For every queue, at any moment:

    - ``waiting`` is the number of its jobs that the store has as Queued, less the decisions whose
      job is not Processing yet. (It is -1 while the only job is killed under a decision, or did
      not come yet.)
    - ``active`` is the number that the store has with an agent, plus the decisions under way.
    - For each demand the user has a place in the service's rotation exactly if a job with it
      could run, were there room: one is queued that no decision may take, and ``active`` is below
      the quota, which is 0 while the service is not configured. The place is kept until the
      user's turn; after it, or after it was lost, the user starts again at the end.

    A job that fits nowhere now is overtaken by others. After :data:`MAX_OVERTAKES` of them on
    agents that could hold it, one of these is kept free, and its user's next job is this one.

    This holds because every committed transition is followed, in the order of the commits,
    whatever brought it about. A decision costs O(services * demands), all else O(demands).
    """

    def __init__(self, limits: Mapping[str, ServiceLimits]) -> None:
        self._limits = limits
        self._services: OrderedDict[str, _Service] = OrderedDict()
        self._places = itertools.count()
        self._blocked: list[tuple[str, Demand]] = []
        self._overtakes: Counter[tuple[str, Demand]] = Counter()
        self._kept_for: dict[tuple[str, Demand], int] = {}  # for whom an agent is kept free

    def count_queued(self, queue: UserQueue, demand: Demand, jobs: int) -> None:
        """Count jobs that were queued before the first transition that is followed."""
        service = self._service(queue.service)
        service.change_queued(queue.user_id, demand, jobs)
        service.change(queue.user_id, waiting=jobs, active=0)

    def count_active(self, queue: UserQueue) -> None:
        """Count a job that was active before the first transition that is followed."""
        self._service(queue.service).change(queue.user_id, waiting=0, active=1)

    def set_limits(self, limits: Mapping[str, ServiceLimits]) -> None:
        """Apply other limits from the next decision on; what is active stays active."""
        self._limits = limits
        for name, service in self._services.items():
            service.limits = limits.get(name)
            for user_id in list(service.users):
                service.update(user_id)

    def follow(self, transition: Transition) -> None:
        """Take note of a committed transition."""
        before, after = transition.before, transition.after
        queued = (after is JobState.QUEUED) - (before is JobState.QUEUED)
        user_id, demand = transition.user_id, transition.demand
        is_given_out = before is JobState.QUEUED and after is JobState.PROCESSING
        if queued:
            service = self._service(transition.service)
            service.change_queued(user_id, demand, queued, decided=is_given_out)
        if is_given_out:
            return  # counted when it was decided
        active = (after in ACTIVE_STATES) - (before in ACTIVE_STATES)
        if queued or active:
            self._service(transition.service).change(user_id, queued, active)

    def next_for(self, placement: Placement) -> Decision | None:
        """Decide which queue gives the next job, and where it goes; None if no job may run now."""
        self._drop_vain_reservations(placement)
        while True:
            found = self._reserved_that_fits(placement) or self._first_that_fits(placement)
            if not self._keep_agents_free(placement):
                return None if found is None else self._decide(*found, placement)

    def decide_ahead(
        self, queue: UserQueue, demand: Demand, placement: Placement
    ) -> Decision | None:
        """Decide that a job which is about to come into a queue is given out at once, if it may.

        It may if nobody waits whose turn would come first. To be called when :meth:`next_for`
        has just found nothing. A decision like the others.
        """
        service = self._service(queue.service)
        user = service.users.get(queue.user_id, _User())
        if service.turns.get(demand) or not service.has_room():
            return None
        if not service.is_below_quota(user.tally.active) or user.kept_for not in (None, demand):
            return None
        agent_id = placement.find(queue.service, demand)
        if agent_id is None:
            return None
        return self._decide(queue, {demand: agent_id}, placement)

    def carried_out(self, decision: Decision, demand: Demand) -> None:
        """The job of a decision, which has this demand, is given out."""
        queue = decision.queue
        others = decision.offers.keys() - {demand}  # this one's transition was followed
        self._service(queue.service).end_decision(queue.user_id, others, waiting=0, active=0)

    def take_back(self, decision: Decision) -> None:
        """A decision could not be carried out, or its job was killed meanwhile or never came."""
        user_id, service = decision.queue.user_id, self._service(decision.queue.service)
        service.end_decision(user_id, decision.offers, waiting=+1, active=-1)

    def services(self) -> list[str]:
        """Return the services that have, or had, jobs."""
        return list(self._services)

    def counts_of_service(self, name: str) -> Counts:
        """Return the counts over all queues of a service."""
        service = self._services.get(name)
        return Counts() if service is None else service.total.counts()

    def counts_of_queue(self, queue: UserQueue) -> Counts:
        """Return the counts of one queue."""
        service = self._services.get(queue.service)
        user = None if service is None else service.users.get(queue.user_id)
        return Counts() if user is None else user.tally.counts()

    def _service(self, name: str) -> _Service:
        service = self._services.get(name)
        if service is None:
            # a job of a service that is no longer configured is not lost: it waits
            service = _Service(self._limits.get(name), self._places)
            self._services[name] = service
        return service

    # --- deciding

    def _first_that_fits(
        self, placement: Placement
    ) -> tuple[UserQueue, Mapping[Demand, str]] | None:
        """Find whose turn it is, with an agent for each demand of theirs; see what is blocked."""
        found: tuple[UserQueue, Mapping[Demand, str]] | None = None
        self._blocked.clear()
        for name, service in self._services.items():
            if not service.has_room():
                continue
            fitting: dict[Demand, str] = {}
            for demand in service.turns:
                if agent_id := placement.find(name, demand):
                    fitting[demand] = agent_id
                elif placement.could_hold(name, demand):
                    self._blocked.append((name, demand))
            if fitting and found is None:
                firsts = (next(iter(service.turns[demand].items())) for demand in fitting)
                user_id = min(firsts, key=lambda first: first[1])[0]
                offers = {d: agent for d, agent in fitting.items() if user_id in service.turns[d]}
                found = UserQueue(name, user_id), offers
        return found

    def _decide(
        self, queue: UserQueue, offers: Mapping[Demand, str], placement: Placement
    ) -> Decision:
        for name, demand in self._blocked:
            if not placement.could_hold(name, demand).isdisjoint(offers.values()):
                self._overtakes[name, demand] += 1
        for demand in offers:
            self._release(queue.service, demand, placement)
            self._overtakes.pop((queue.service, demand), None)
        self._services.move_to_end(queue.service)
        self._service(queue.service).begin_decision(queue.user_id, offers)
        return Decision(queue, offers)

    # --- large jobs

    def _reserved_that_fits(
        self, placement: Placement
    ) -> tuple[UserQueue, Mapping[Demand, str]] | None:
        for (name, demand), user_id in self._kept_for.items():
            service = self._service(name)
            if not service.has_room_for_reserved() or user_id not in service.turns.get(demand, ()):
                continue
            if agent_id := placement.find(name, demand):
                return UserQueue(name, user_id), {demand: agent_id}
        return None

    def _keep_agents_free(self, placement: Placement) -> bool:
        """Keep an agent free for what was overtaken too often; returns whether one more is."""
        for name, demand in self._blocked:
            key = name, demand
            if self._overtakes[key] < MAX_OVERTAKES or key in self._kept_for:
                continue
            service = self._service(name)
            user_id = next(iter(service.turns[demand]))
            if service.users[user_id].kept_for is not None:
                continue
            if placement.keep_free(name, demand) is not None:
                self._kept_for[key] = user_id
                service.users[user_id].kept_for = demand
                service.reserved += 1
                service.update(user_id)
                return True
        return False

    def _drop_vain_reservations(self, placement: Placement) -> None:
        """Keep nothing free for jobs that are gone, on agents that are."""
        for (name, demand), user_id in list(self._kept_for.items()):
            user = self._service(name).users.get(user_id)
            is_wanted = user is not None and user.has_available(demand)
            if not is_wanted or not placement.is_kept_free_for(name, demand):
                self._release(name, demand, placement)
        for name, demand in list(self._overtakes):
            if not self._service(name).queued[demand]:
                del self._overtakes[name, demand]

    def _release(self, name: str, demand: Demand, placement: Placement) -> None:
        user_id = self._kept_for.pop((name, demand), None)
        if user_id is None:
            return
        placement.release(name, demand)
        service = self._service(name)
        service.reserved -= 1
        if (user := service.users.get(user_id)) is not None:
            user.kept_for = None
            service.update(user_id)
