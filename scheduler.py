"""The scheduling policy: whose turn it is, and which agent gets the job. Pure, without I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from config import ServiceLimits
from events import Transition
from jobs import ACTIVE_STATES, JobState
from records import UserQueue

# --- whose turn it is -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs wait, and how many are active; one that is being given out is active."""

    waiting: int = 0
    active: int = 0


@dataclass(slots=True)
class _Tally:
    waiting: int = 0
    active: int = 0

    def counts(self) -> Counts:
        return Counts(max(self.waiting, 0), self.active)


@dataclass(slots=True)
class _Service:
    limits: ServiceLimits | None  # None: not configured (any more), so its jobs wait
    total: _Tally = field(default_factory=_Tally)
    lines: dict[int, _Tally] = field(default_factory=dict)
    turns: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def may_run(self) -> bool:
        return bool(self.turns) and self.has_room()

    def has_room(self) -> bool:
        """Whether one more job of the service may be active."""
        return self.limits is not None and self.total.active < self.limits.max_runs

    def is_below_quota(self, active: int) -> bool:
        """Whether a user of whom so many jobs are active may have one more."""
        return self.limits is not None and active < self.limits.runs_per_user

    def change(self, user_id: int, waiting: int, active: int) -> None:
        """Add to the tally of a user's line, and keep its place in the rotation in step."""
        line = self.lines.setdefault(user_id, _Tally())
        for tally in (line, self.total):
            tally.waiting += waiting
            tally.active += active
        self.update_turn(user_id)
        if not line.waiting and not line.active:
            del self.lines[user_id]

    def update_turn(self, user_id: int) -> None:
        """Give the user a place in the rotation if a job of theirs could run, else none."""
        line = self.lines[user_id]
        if line.waiting > 0 and self.is_below_quota(line.active):
            self.turns.setdefault(user_id)
        else:
            self.turns.pop(user_id, None)


class FairQueue:
    """Whose turn it is: users of a service take turns, and so do services.

    Knows how many jobs wait in each line, not which: the store gives out the first of a
    line (highest priority, then lowest id) in the transaction that makes the attempt. So
    neither memory nor a decision depends on how many jobs wait, and a job that was
    killed or queued again needs no search here.

    A decision is under way from :meth:`next_for` or :meth:`decide_ahead` until its job's
    transition to Processing is committed, or until :meth:`take_back`. For every line, at any
    moment:

    - ``waiting`` is the number of its jobs that the store has as Queued, less the
      decisions under way. (It is -1 while the only job is killed under a decision, or did not
      come yet.)
    - ``active`` is the number that the store has with an agent, plus the decisions under way.
    - The line has a place in its service's rotation exactly if a job of it could run:
      ``waiting`` > 0 and ``active`` below the user's quota, which is 0 while the service is
      not configured. It keeps the place until its turn; after it, or after it lost the place,
      it starts again at the end.

    This holds because every committed transition is followed, in the order of the commits,
    whatever brought it about. A decision costs O(services), everything else O(1).
    """

    def __init__(self, limits: Mapping[str, ServiceLimits]) -> None:
        self._limits = limits
        self._services: OrderedDict[str, _Service] = OrderedDict()

    def count(self, line: UserQueue, waiting: int, active: int) -> None:
        """Count jobs that were there before the first transition that is followed."""
        self._service(line.service).change(line.user_id, waiting, active)

    def set_limits(self, limits: Mapping[str, ServiceLimits]) -> None:
        """Apply other limits from the next decision on; what is active stays active."""
        self._limits = limits
        for name, service in self._services.items():
            service.limits = limits.get(name)
            for user_id in service.lines:
                service.update_turn(user_id)

    def follow(self, transition: Transition) -> None:
        """Take note of a committed transition."""
        before, after = transition.before, transition.after
        if before is JobState.QUEUED and after is JobState.PROCESSING:
            return  # counted when it was decided
        waiting = (after is JobState.QUEUED) - (before is JobState.QUEUED)
        active = (after in ACTIVE_STATES) - (before in ACTIVE_STATES)
        if waiting or active:
            self._service(transition.service).change(transition.user_id, waiting, active)

    def next_for(self, is_offered: Callable[[str], bool]) -> UserQueue | None:
        """Decide which line gives the next job, of the services that ``is_offered`` allows.

        Returns None when no job may run now.
        """
        for name, service in self._services.items():
            if service.may_run() and is_offered(name):
                self._services.move_to_end(name)
                user_id, _ = service.turns.popitem(last=False)
                service.change(user_id, waiting=-1, active=+1)
                return UserQueue(name, user_id)
        return None

    def decide_ahead(self, line: UserQueue, is_offered: Callable[[str], bool]) -> bool:
        """Decide that a job which is about to come into a line is given out at once, if it may.

        It may if nobody waits whose turn would come first. A decision like the others.
        """
        service = self._service(line.service)
        if service.turns or not service.has_room() or not is_offered(line.service):
            return False
        if not service.is_below_quota(self.counts_of_line(line).active):
            return False
        service.change(line.user_id, waiting=-1, active=+1)
        return True

    def take_back(self, line: UserQueue) -> None:
        """A decision could not be carried out, or its job was killed meanwhile or never came."""
        self._service(line.service).change(line.user_id, waiting=+1, active=-1)

    def services(self) -> list[str]:
        """Return the services that have, or had, jobs."""
        return list(self._services)

    def counts_of_service(self, name: str) -> Counts:
        """Return the counts over all lines of a service."""
        service = self._services.get(name)
        return Counts() if service is None else service.total.counts()

    def counts_of_line(self, line: UserQueue) -> Counts:
        """Return the counts of one line."""
        service = self._services.get(line.service)
        tally = None if service is None else service.lines.get(line.user_id)
        return Counts() if tally is None else tally.counts()

    def _service(self, name: str) -> _Service:
        service = self._services.get(name)
        if service is None:
            # a job of a service that is not configured any more is not lost: it waits
            service = _Service(self._limits.get(name))
            self._services[name] = service
        return service


# --- which agent gets the job -----------------------------------------------------


class FreeSlots:
    """The agents that can take a job now; of those that offer a service, the least loaded.

    An agent is in the list of each service that it names, or in that of agents that offer
    all (under None), each sorted by load. A change of an agent costs a binary search in
    each of its lists; a question costs O(1), however many agents there are.
    """

    def __init__(self) -> None:
        self._lists: dict[str | None, list[tuple[float, str]]] = {}
        self._present: dict[str, tuple[float, frozenset[str | None]]] = {}

    def put(self, agent_id: str, load: float, services: frozenset[str] | None) -> None:
        """Note an agent with a free slot, or its new ``load``; ``services`` None: all."""
        self.discard(agent_id)
        names: frozenset[str | None] = frozenset([None]) if services is None else services
        self._present[agent_id] = load, names
        for name in names:
            insort(self._lists.setdefault(name, []), (load, agent_id))

    def discard(self, agent_id: str) -> None:
        """Forget an agent that has no free slot, or is gone."""
        load, names = self._present.pop(agent_id, (0.0, frozenset()))
        for name in names:
            agents = self._lists[name]
            del agents[bisect_left(agents, (load, agent_id))]
            if not agents:
                del self._lists[name]

    def offer(self, service: str) -> bool:
        """Say whether an agent could take a job of the service now."""
        return service in self._lists or None in self._lists

    def least_loaded(self, service: str) -> str:
        """Return the id of the agent that should take a job of a service that is on offer."""
        lists = (self._lists.get(service), self._lists.get(None))
        return min(agents[0] for agents in lists if agents)[1]
