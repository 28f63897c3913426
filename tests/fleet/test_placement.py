"""Which agent gets a job, and that large jobs get one: against slow and obvious models."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ServiceLimits
from events import Transition
from fleet.placement import Capacity, Placement
from jobs import NO_RESOURCES, Demand, JobState, Resources
from records import UserQueue
from scheduler import MAX_OVERTAKES, Decision, FairQueue

pytestmark = pytest.mark.quick

_SERVICES = ("dock", "fold")
_RESOURCES = st.builds(Resources, st.integers(1, 4), st.integers(0, 3), st.integers(0, 2))
_CAPACITIES = st.builds(
    lambda services, total, share, slots, load: Capacity(
        services,
        total,
        Resources(*(min(n, s) for n, s in zip(_parts(total), share, strict=True))),
        slots,
        load,
    ),
    st.none() | st.frozensets(st.sampled_from(_SERVICES)),
    _RESOURCES,
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 2)),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.25, 0.5]),
)


def _parts(resources: Resources) -> tuple[int, int, int]:
    return resources.cpus, resources.memory, resources.gpus


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.none() | _CAPACITIES), max_size=12),
    st.lists(st.builds(Demand, _RESOURCES, st.sampled_from([(), ("a",), ("a", "b")])), max_size=4),
)
def test_the_least_loaded_agent_where_all_of_it_fits_is_found(
    changes: list[tuple[str, Capacity | None]], demands: list[Demand]
) -> None:
    placement = Placement()
    agents: dict[str, Capacity] = {}
    for agent_id, capacity in changes:
        if capacity is None:
            placement.discard(agent_id)
            agents.pop(agent_id, None)
        else:
            placement.put(agent_id, capacity)
            agents[agent_id] = capacity
        for service, demand in itertools.product(_SERVICES, demands):
            able = {
                agent_id
                for agent_id, capacity in agents.items()
                if capacity.offers(service) and demand.resources.fits(capacity.total)
            }
            able = able.difference(demand.avoided) or able
            fitting = {
                agent_id: agents[agent_id].load
                for agent_id in able
                if agents[agent_id].free_slots and demand.resources.fits(agents[agent_id].free)
            }
            found = placement.find(service, demand)
            assert placement.could_hold(service, demand) == able
            if fitting:
                assert found is not None
                assert fitting[found] == min(fitting.values())
            else:
                assert found is None


# --- a fleet in miniature ---------------------------------------------------------


@dataclass
class _Job:
    id: int
    queue: UserQueue
    demand: Demand
    priority: int
    agent: str | None = None


@dataclass
class _Cluster:
    """Agents and a store as plain lists; decisions are carried out at once."""

    totals: dict[str, Resources]
    queue: FairQueue
    placement: Placement = field(default_factory=Placement)
    waiting: list[_Job] = field(default_factory=list)
    running: list[_Job] = field(default_factory=list)
    started: list[_Job] = field(default_factory=list)
    ids: itertools.count[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for name in self.totals:
            self._tell_placement(name)

    def free(self, name: str) -> Resources:
        used = (job.demand.resources for job in self.running if job.agent == name)
        return self.totals[name] - sum(used, NO_RESOURCES)

    def submit(
        self, user: int, resources: Resources, service: str = "dock", priority: int = 0
    ) -> _Job:
        job = _Job(next(self.ids), UserQueue(service, user), Demand(resources), priority)
        self.waiting.append(job)
        self._tell_queue(job, None, JobState.QUEUED)
        return job

    def schedule(self) -> None:
        while (decision := self.queue.next_for(self.placement)) is not None:
            self._carry_out(decision)

    def end(self, job: _Job) -> None:
        self.running.remove(job)
        self._tell_queue(job, JobState.RUNNING, JobState.COMPLETED)
        assert job.agent is not None
        self._tell_placement(job.agent)

    def _carry_out(self, decision: Decision) -> None:
        candidates = [
            job
            for job in self.waiting
            if job.queue == decision.queue and job.demand in decision.offers
        ]
        assert candidates, "a decision for a queue that has no such job"
        job = min(candidates, key=lambda job: (-job.priority, job.id))
        job.agent = decision.offers[job.demand]
        assert job.demand.resources.fits(self.free(job.agent)), "it does not fit there"
        self.waiting.remove(job)
        self.running.append(job)
        self.started.append(job)
        self._tell_queue(job, JobState.QUEUED, JobState.PROCESSING)
        self.queue.carried_out(decision, job.demand)
        self._tell_placement(job.agent)

    def _tell_placement(self, name: str) -> None:
        total, free = self.totals[name], self.free(name)
        self.placement.put(name, Capacity(None, total, free, 1000, 1 - free.cpus / total.cpus))

    def _tell_queue(self, job: _Job, before: JobState | None, after: JobState) -> None:
        self.queue.follow(
            Transition(
                *(0, job.id, job.queue.user_id, job.queue.service, 0, 0.0, before, after, ""),
                demand=job.demand,
            )
        )


@given(
    totals=st.lists(_RESOURCES, min_size=1, max_size=3),
    work=st.lists(
        st.tuples(st.integers(1, 3), _RESOURCES, st.sampled_from(_SERVICES), st.integers(-1, 1)),
        max_size=30,
    ),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=200)
def test_work_of_all_shapes_runs_within_quotas_and_nothing_that_fits_is_left(
    totals: list[Resources], work: list[tuple[int, Resources, str, int]], seed: int
) -> None:
    limits = {"dock": ServiceLimits(runs_per_user=2, max_runs=4), "fold": ServiceLimits(3, 3)}
    cluster = _Cluster({f"agent{n}": total for n, total in enumerate(totals)}, FairQueue(limits))
    dice = random.Random(seed)
    pending = list(work)
    while True:
        for user, resources, service, priority in pending[:3]:
            cluster.submit(user, resources, service, priority)
        del pending[:3]
        cluster.schedule()
        _check_limits(cluster, limits)
        if cluster.running:
            cluster.end(dice.choice(cluster.running))
        elif not pending:
            break
    for job in cluster.waiting:
        assert not any(job.demand.resources.fits(total) for total in totals), "it never ran"


def _check_limits(cluster: _Cluster, limits: dict[str, ServiceLimits]) -> None:
    of_queues = Counter(job.queue for job in cluster.running)
    of_services = Counter(job.queue.service for job in cluster.running)
    for queue, active in of_queues.items():
        assert active <= limits[queue.service].runs_per_user
    for service, active in of_services.items():
        assert active <= limits[service].max_runs


@given(
    slots=st.integers(2, 8),
    agents=st.integers(1, 3),
    same_user=st.booleans(),
    other_service=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_a_stream_of_small_jobs_does_not_starve_a_large_one(
    slots: int, agents: int, same_user: bool, other_service: bool, seed: int
) -> None:
    limits = {name: ServiceLimits(runs_per_user=1000, max_runs=1000) for name in _SERVICES}
    names = [f"agent{number}" for number in range(agents)]
    cluster = _Cluster({name: Resources(slots) for name in names}, FairQueue(limits))
    dice = random.Random(seed)
    small_service = "fold" if other_service else "dock"
    for _ in range(slots * agents + 1):
        cluster.submit(1, Resources(1), small_service)
    cluster.schedule()
    large = cluster.submit(1 if same_user else 2, Resources(slots))
    completions = 0
    while large not in cluster.started:
        cluster.submit(1, Resources(1), small_service)
        cluster.end(dice.choice(cluster.running))
        completions += 1
        cluster.schedule()
        # those that may overtake, then all that run on the agents
        assert completions <= 50 * (MAX_OVERTAKES + slots * agents), "it is starved"
    overtaken_by = cluster.started[slots * agents :].index(large)
    assert overtaken_by <= MAX_OVERTAKES + completions


def test_after_the_bound_nothing_more_is_started_where_a_large_job_waits() -> None:
    cluster = _Cluster(
        {"only": Resources(4)}, FairQueue({"dock": ServiceLimits(runs_per_user=99, max_runs=99)})
    )
    for _ in range(100):
        cluster.submit(1, Resources(1))
    cluster.schedule()
    large = cluster.submit(2, Resources(4))
    for _ in range(MAX_OVERTAKES):
        cluster.end(cluster.running[0])
        cluster.schedule()
        assert len(cluster.running) == 4, "small ones go on for a while"
    for left in (3, 2, 1):
        cluster.end(cluster.running[0])
        cluster.schedule()
        assert len(cluster.running) == left, "then the agent is kept free"
    cluster.end(cluster.running[0])
    cluster.schedule()
    assert cluster.running == [large]
    cluster.end(large)
    cluster.schedule()
    assert len(cluster.running) == 4, "and the others have it again"


def test_an_agent_is_no_longer_kept_free_for_a_job_that_was_killed_or_an_agent_that_left() -> None:
    cluster = _Cluster(
        {"small": Resources(2), "large": Resources(4)},
        FairQueue({"dock": ServiceLimits(runs_per_user=99, max_runs=99)}),
    )
    for _ in range(100):
        cluster.submit(1, Resources(1))
    cluster.schedule()
    job = cluster.submit(2, Resources(4))
    while len(cluster.running) == 6:
        on_large = next(job for job in cluster.running if job.agent == "large")
        cluster.end(on_large)
        cluster.schedule()
    cluster.waiting.remove(job)
    cluster._tell_queue(job, JobState.QUEUED, JobState.KILLED)
    cluster.schedule()
    assert len(cluster.running) == 6
    assert not cluster.placement.is_kept_free_for("dock", job.demand)


def test_the_jobs_of_a_user_go_by_priority_also_among_shapes() -> None:
    cluster = _Cluster(
        {"one": Resources(4), "two": Resources(2)},
        FairQueue({"dock": ServiceLimits(runs_per_user=1, max_runs=99)}),
    )
    low = cluster.submit(1, Resources(1), priority=0)
    high = cluster.submit(1, Resources(4), priority=5)
    middle = cluster.submit(1, Resources(2), priority=3)
    for expected in (high, middle, low):
        cluster.schedule()
        assert cluster.running == [expected]
        cluster.end(expected)


def test_a_job_goes_to_an_agent_that_lost_it_only_if_no_other_could_run_it() -> None:
    queue = FairQueue({"dock": ServiceLimits()})
    placement = Placement()
    busy = Capacity(None, Resources(4), Resources(0), 0, 1.0)
    idle = Capacity(None, Resources(4), Resources(4), 4, 0.0)
    placement.put("bad", idle)
    placement.put("good", busy)
    queue.count_queued(UserQueue("dock", 1), Demand(Resources(1), ("bad",)), 1)
    assert queue.next_for(placement) is None, "it waits for the good one"
    placement.discard("good")
    decision = queue.next_for(placement)
    assert decision is not None
    assert list(decision.offers.values()) == ["bad"]
