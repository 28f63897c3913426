"""Which agent gets a job: where all that it needs is free, and of those the least loaded. Pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from jobs import Demand, Resources


@dataclass(frozen=True, slots=True)
class Capacity:
    """What an agent has for jobs. ``services`` None: all; ``load``: the share that is in use."""

    services: frozenset[str] | None
    total: Resources
    free: Resources
    free_slots: int
    load: float

    def offers(self, service: str) -> bool:
        """Say whether jobs of the service may run there."""
        return self.services is None or service in self.services


class Placement:
    """The agents that may get jobs, and those of them that are kept free for a large one.

    An agent with a free slot is in the list of each service that it names, or in that of agents
    that offer all (under None), each sorted by load. Answers are kept until an agent changes, so
    that a question costs O(1) as a rule, and O(agents) where what is asked for fits in few.
    """

    def __init__(self) -> None:
        self._agents: dict[str, Capacity] = {}
        self._lists: dict[str | None, list[tuple[float, str]]] = {}
        self._kept_free: dict[str, tuple[str, Demand]] = {}  # by agent id
        self._answers: dict[tuple[str, Demand], str | None] = {}
        self._holders: dict[tuple[str, Demand], frozenset[str]] = {}

    def put(self, agent_id: str, capacity: Capacity) -> None:
        """An agent may get jobs, or has other things free than before."""
        before = self._agents.get(agent_id)
        if before == capacity:
            return
        self._unlist(agent_id)
        self._agents[agent_id] = capacity
        self._answers.clear()
        if before is None or (before.total, before.services) != (capacity.total, capacity.services):
            self._forget_holders()
        if capacity.free_slots > 0:
            for name in _names(capacity):
                insort(self._lists.setdefault(name, []), (capacity.load, agent_id))

    def discard(self, agent_id: str) -> None:
        """An agent gets nothing: it is away, or drained."""
        if agent_id in self._agents:
            self._unlist(agent_id)
            del self._agents[agent_id]
            self._answers.clear()
            self._forget_holders()

    def find(self, service: str, demand: Demand) -> str | None:
        """Return the agent that should take a job now, None if none can."""
        key = service, demand
        if key not in self._answers:
            self._answers[key] = self._find(service, demand)
        return self._answers[key]

    def could_hold(self, service: str, demand: Demand) -> frozenset[str]:
        """Return the agents that a job may wait for: all of it fits where nothing else runs.

        Without those to be avoided, unless there are no others.
        """
        key = service, demand
        if key not in self._holders:
            able = {
                agent_id
                for agent_id, capacity in self._agents.items()
                if capacity.offers(service) and demand.resources.fits(capacity.total)
            }
            self._holders[key] = frozenset(able.difference(demand.avoided) or able)
        return self._holders[key]

    def keep_free(self, service: str, demand: Demand) -> str | None:
        """Give an agent nothing else until a job with this demand fits there; returns its id.

        Returns None if all that could hold it are kept free for others.
        """
        able = self.could_hold(service, demand) - self._kept_free.keys()
        if not able:
            return None
        agent_id = min(able, key=lambda agent_id: (self._agents[agent_id].load, agent_id))
        self._kept_free[agent_id] = service, demand
        self._answers.clear()
        return agent_id

    def is_kept_free_for(self, service: str, demand: Demand) -> bool:
        """Say whether an agent is kept free for a job with this demand."""
        return (service, demand) in self._kept_free.values()

    def release(self, service: str, demand: Demand) -> None:
        """Keep no agent free for this any longer."""
        for agent_id, kept_for in list(self._kept_free.items()):
            if kept_for == (service, demand):
                del self._kept_free[agent_id]
                self._answers.clear()

    def _find(self, service: str, demand: Demand) -> str | None:
        able = self.could_hold(service, demand)
        for agent_id in self._by_load(service):
            if self._kept_free.get(agent_id, (service, demand)) != (service, demand):
                continue
            if agent_id in able and demand.resources.fits(self._agents[agent_id].free):
                return agent_id
        return None

    def _by_load(self, service: str) -> Iterator[str]:
        """Yield the agents with a free slot that offer a service, the least loaded first."""
        for_it, for_all = self._lists.get(service, []), self._lists.get(None, [])
        at, at_all = 0, 0
        while at < len(for_it) or at_all < len(for_all):
            if at_all == len(for_all) or (at < len(for_it) and for_it[at] < for_all[at_all]):
                yield for_it[at][1]
                at += 1
            else:
                yield for_all[at_all][1]
                at_all += 1

    def _unlist(self, agent_id: str) -> None:
        capacity = self._agents.get(agent_id)
        if capacity is None or capacity.free_slots <= 0:
            return
        for name in _names(capacity):
            agents = self._lists[name]
            del agents[bisect_left(agents, (capacity.load, agent_id))]
            if not agents:
                del self._lists[name]

    def _forget_holders(self) -> None:
        """Other agents can hold things than before: an agent that can't is kept free no longer."""
        self._holders.clear()
        for agent_id, kept_for in list(self._kept_free.items()):
            if agent_id not in self.could_hold(*kept_for):
                del self._kept_free[agent_id]


def _names(capacity: Capacity) -> frozenset[str | None]:
    return frozenset([None]) if capacity.services is None else frozenset(capacity.services)
