"""The scheduling policy against a slow and obvious model of the design's rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from config import ServiceLimits
from events import Transition
from fleet.placement import Capacity, Placement
from jobs import ACTIVE_STATES, Demand, JobState, Resources
from records import UserQueue
from scheduler import Counts, Decision, FairQueue

pytestmark = pytest.mark.quick

_LIMITS = {"dock": ServiceLimits(runs_per_user=2, max_runs=3), "fold": ServiceLimits(1, 5)}
_SERVICES = sorted(_LIMITS)
_QUEUES = [UserQueue(service, user) for service in _SERVICES for user in range(1, 5)]


_PLENTY = Resources(1000, 2**50, 1000)


def offering(*services: str) -> Placement:
    """One agent that offers these services and has room without end."""
    placement = Placement()
    placement.put("a", Capacity(frozenset(services), _PLENTY, _PLENTY, 1000, 0.0))
    return placement


ANYTHING = offering(*_SERVICES)
_PLACEMENTS = {frozenset(names): offering(*names) for names in ((), ("dock",), ("fold",))}


@dataclass
class _Job:
    id: int
    queue: UserQueue
    priority: int
    state: JobState = JobState.QUEUED


class FairQueueModel(RuleBasedStateMachine):
    """A store as a plain list, decisions that take their time, and the policy beside it.

    A decision may be carried out late, after others, after its job was killed, or never,
    as when the disk is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.policy = FairQueue(_LIMITS)
        self.jobs: list[_Job] = []
        self.under_way: list[Decision] = []
        self.overtaken_by: dict[UserQueue, set[UserQueue]] = {}

    # --- what happens to jobs

    @rule(queue=st.sampled_from(_QUEUES), priority=st.integers(-1, 1))
    def upload(self, queue: UserQueue, priority: int) -> None:
        job = _Job(len(self.jobs), queue, priority)
        self.jobs.append(job)
        self._tell(job, None)

    @rule(data=st.data())
    def kill_in_queue(self, data: st.DataObject) -> None:
        if waiting := self._in(JobState.QUEUED):
            self._move(data.draw(st.sampled_from(waiting)), JobState.KILLED)

    @rule(data=st.data(), again=st.booleans())
    def go_on(self, data: st.DataObject, again: bool) -> None:
        if active := self._in(*ACTIVE_STATES):
            job = data.draw(st.sampled_from(active))
            after = {JobState.PROCESSING: JobState.SUBMITTED, JobState.SUBMITTED: JobState.RUNNING}
            self._move(job, JobState.QUEUED if again else after.get(job.state, JobState.COMPLETED))

    # --- decisions

    @rule(offered=st.none() | st.sampled_from(sorted(_PLACEMENTS, key=sorted)))
    def decide(self, offered: frozenset[str] | None) -> None:
        names = frozenset(_SERVICES) if offered is None else offered
        placement = ANYTHING if offered is None else _PLACEMENTS[offered]
        eligible = [queue for queue in _QUEUES if queue.service in names and self._may_run(queue)]
        decision = self.policy.next_for(placement)
        if decision is None:
            assert not eligible, "work was left lying although it could run"
            return
        assert decision.queue in eligible
        assert decision.offers == {Demand(): "a"}
        self._note_turn(decision.queue)
        self.under_way.append(decision)

    @rule(queue=st.sampled_from(_QUEUES))
    def decide_ahead(self, queue: UserQueue) -> None:
        """For a job that may come into the queue later, or never."""
        others = [other for other in _QUEUES if other.service == queue.service]
        is_slot_free = self._is_service_below_its_limit(queue.service)
        has_quota = self._active(queue) < _LIMITS[queue.service].runs_per_user
        may_start = is_slot_free and has_quota and not any(map(self._may_run, others))
        decision = self.policy.decide_ahead(queue, Demand(), ANYTHING)
        assert (decision is not None) == may_start
        if decision is not None:
            self.under_way.append(decision)

    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        if not self.under_way:
            return
        decision = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(decision)
        waiting = [job for job in self._in(JobState.QUEUED) if job.queue == decision.queue]
        if waiting:
            first = min(waiting, key=lambda job: (-job.priority, job.id))
            self._move(first, JobState.PROCESSING)
            self.policy.carried_out(decision, Demand())
        else:
            self.policy.take_back(decision)

    @rule(data=st.data())
    def fail_to_carry_out(self, data: st.DataObject) -> None:
        if self.under_way:
            decision = data.draw(st.sampled_from(self.under_way))
            self.under_way.remove(decision)
            self.policy.take_back(decision)

    @rule()
    def restart(self) -> None:
        self.policy = FairQueue(_LIMITS)
        self.under_way = []
        self.overtaken_by = {}
        for queue in _QUEUES:
            self.policy.count_queued(queue, Demand(), self._count(queue, JobState.QUEUED))
            for _ in range(self._count(queue, *ACTIVE_STATES)):
                self.policy.count_active(queue)

    # --- what holds

    @invariant()
    def quotas_hold(self) -> None:
        active = Counter({queue: self._active(queue) for queue in _QUEUES})
        for name, limits in _LIMITS.items():
            counts = [count for queue, count in active.items() if queue.service == name]
            assert sum(counts) <= limits.max_runs
            assert max(counts) <= limits.runs_per_user

    @invariant()
    def counts_are_those_of_the_store(self) -> None:
        for queue in _QUEUES:
            waiting = self._count(queue, JobState.QUEUED) - self._under_way(queue)
            assert self.policy.counts_of_queue(queue) == Counts(
                max(waiting, 0), self._active(queue)
            )
        for name in _SERVICES:
            counted = self.policy.counts_of_service(name)
            queues = [queue for queue in _QUEUES if queue.service == name]
            assert counted.active == sum(map(self._active, queues))

    @invariant()
    def forget_overtaking_of_queues_that_could_not_run(self) -> None:
        for queue in _QUEUES:
            if self._may_run_for_its_user(queue):
                self.overtaken_by.setdefault(queue, set())
            else:
                self.overtaken_by.pop(queue, None)

    def _note_turn(self, queue: UserQueue) -> None:
        """Users take turns: none goes twice while another of the service could have gone."""
        for other, overtakers in self.overtaken_by.items():
            if other.service == queue.service and other != queue:
                assert queue not in overtakers, f"{queue} went twice before {other}"
                overtakers.add(queue)
        self.overtaken_by[queue] = set()

    def _move(self, job: _Job, after: JobState) -> None:
        before, job.state = job.state, after
        self._tell(job, before)

    def _tell(self, job: _Job, before: JobState | None) -> None:
        user_id, service = job.queue.user_id, job.queue.service
        self.policy.follow(Transition(0, job.id, user_id, service, 0, 0.0, before, job.state, ""))

    def _in(self, *states: JobState) -> list[_Job]:
        return [job for job in self.jobs if job.state in states]

    def _count(self, queue: UserQueue, *states: JobState) -> int:
        return sum(job.queue == queue for job in self._in(*states))

    def _under_way(self, queue: UserQueue) -> int:
        return sum(decision.queue == queue for decision in self.under_way)

    def _active(self, queue: UserQueue) -> int:
        return self._count(queue, *ACTIVE_STATES) + self._under_way(queue)

    def _may_run(self, queue: UserQueue) -> bool:
        is_slot_free = self._is_service_below_its_limit(queue.service)
        return self._may_run_for_its_user(queue) and is_slot_free

    def _is_service_below_its_limit(self, service: str) -> bool:
        running = sum(self._active(queue) for queue in _QUEUES if queue.service == service)
        return running < _LIMITS[service].max_runs

    def _may_run_for_its_user(self, queue: UserQueue) -> bool:
        waiting = self._count(queue, JobState.QUEUED) - self._under_way(queue)
        return waiting > 0 and self._active(queue) < _LIMITS[queue.service].runs_per_user


TestFairQueueModel = FairQueueModel.TestCase
TestFairQueueModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def _take(policy: FairQueue, number: int) -> list[UserQueue]:
    """Take jobs that run at once and end at once."""
    taken = []
    for _ in range(number):
        decision = policy.next_for(ANYTHING)
        assert decision is not None
        queue = decision.queue
        for before, after in (
            (JobState.QUEUED, JobState.PROCESSING),
            (JobState.PROCESSING, JobState.FAILED),
        ):
            policy.follow(Transition(0, 0, queue.user_id, queue.service, 1, 0.0, before, after, ""))
        taken.append(queue)
    return taken


def _next(policy: FairQueue, placement: Placement = ANYTHING) -> UserQueue | None:
    decision = policy.next_for(placement)
    return None if decision is None else decision.queue


def test_users_take_turns_however_much_one_of_them_queued() -> None:
    policy = FairQueue({"dock": ServiceLimits(runs_per_user=5, max_runs=10)})
    policy.count_queued(UserQueue("dock", 1), Demand(), 1_000_000)
    policy.count_queued(UserQueue("dock", 2), Demand(), 3)
    assert [queue.user_id for queue in _take(policy, 8)] == [1, 2, 1, 2, 1, 2, 1, 1]


def test_services_take_turns() -> None:
    policy = FairQueue(_LIMITS)
    for service in _SERVICES:
        policy.count_queued(UserQueue(service, 1), Demand(), 3)
    assert [queue.service for queue in _take(policy, 6)] == ["dock", "fold"] * 3


def test_jobs_that_were_active_before_a_restart_count() -> None:
    policy = FairQueue(_LIMITS)
    queue = UserQueue("fold", 7)
    policy.count_active(queue)
    policy.count_queued(queue, Demand(), 1)
    assert _next(policy) is None
    done = Transition(0, 0, 7, "fold", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, "")
    policy.follow(done)
    assert _next(policy) == queue


def test_other_limits_apply_from_the_next_decision_on() -> None:
    policy = FairQueue({"dock": ServiceLimits(runs_per_user=1, max_runs=1)})
    queue = UserQueue("dock", 1)
    policy.count_queued(queue, Demand(), 4)
    assert _next(policy) == queue
    assert _next(policy) is None
    policy.set_limits({"dock": ServiceLimits(runs_per_user=2, max_runs=9)})
    assert _next(policy) == queue
    assert _next(policy) is None
    policy.set_limits({"dock": ServiceLimits(runs_per_user=1, max_runs=9)})
    policy.follow(Transition(0, 0, 1, "dock", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, ""))
    assert _next(policy) is None


def test_jobs_of_a_service_that_is_not_configured_wait_until_it_is() -> None:
    policy = FairQueue({})
    queue = UserQueue("dock", 1)
    policy.count_queued(queue, Demand(), 3)
    assert _next(policy) is None
    policy.set_limits({"dock": ServiceLimits()})
    assert _next(policy) == queue
    policy.set_limits({})
    assert _next(policy) is None
    policy.take_back(Decision(queue, {Demand(): "a"}))
    assert _next(policy) is None
    assert policy.counts_of_service("dock") == Counts(waiting=3, active=0)


def test_a_service_that_no_free_agent_offers_is_ignored_and_keeps_its_turn() -> None:
    policy = FairQueue(_LIMITS)
    for service in _SERVICES:
        policy.count_queued(UserQueue(service, 1), Demand(), 2)
    assert _next(policy, offering("fold")) == UserQueue("fold", 1)
    assert _next(policy, offering("fold")) is None  # its quota
    assert _next(policy) == UserQueue("dock", 1)
