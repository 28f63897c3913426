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
_LINES = [UserQueue(service, user) for service in _SERVICES for user in range(1, 5)]


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
    line: UserQueue
    priority: int
    state: JobState = JobState.QUEUED


class FairQueueModel(RuleBasedStateMachine):
    """A store as a plain list, decisions that take their time, and the policy beside it.

    A decision may be carried out late, after others, after its job was killed, or never,
    as when the disk is full.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(_LIMITS)
        self.jobs: list[_Job] = []
        self.under_way: list[Decision] = []
        self.overtaken_by: dict[UserQueue, set[UserQueue]] = {}

    # --- what happens to jobs

    @rule(line=st.sampled_from(_LINES), priority=st.integers(-1, 1))
    def upload(self, line: UserQueue, priority: int) -> None:
        job = _Job(len(self.jobs), line, priority)
        self.jobs.append(job)
        self._tell(job, None)

    @rule(data=st.data())
    def kill_in_line(self, data: st.DataObject) -> None:
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
        eligible = [line for line in _LINES if line.service in names and self._may_run(line)]
        decision = self.queue.next_for(placement)
        if decision is None:
            assert not eligible, "work was left lying although it could run"
            return
        assert decision.queue in eligible
        assert decision.offers == {Demand(): "a"}
        self._note_turn(decision.queue)
        self.under_way.append(decision)

    @rule(line=st.sampled_from(_LINES))
    def decide_ahead(self, line: UserQueue) -> None:
        """For a job that may come into the line later, or never."""
        others = [other for other in _LINES if other.service == line.service]
        is_slot_free = self._is_service_below_its_limit(line.service)
        has_quota = self._active(line) < _LIMITS[line.service].runs_per_user
        may_start = is_slot_free and has_quota and not any(map(self._may_run, others))
        decision = self.queue.decide_ahead(line, Demand(), ANYTHING)
        assert (decision is not None) == may_start
        if decision is not None:
            self.under_way.append(decision)

    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        if not self.under_way:
            return
        decision = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(decision)
        waiting = [job for job in self._in(JobState.QUEUED) if job.line == decision.queue]
        if waiting:
            first = min(waiting, key=lambda job: (-job.priority, job.id))
            self._move(first, JobState.PROCESSING)
            self.queue.carried_out(decision, Demand())
        else:
            self.queue.take_back(decision)

    @rule(data=st.data())
    def fail_to_carry_out(self, data: st.DataObject) -> None:
        if self.under_way:
            decision = data.draw(st.sampled_from(self.under_way))
            self.under_way.remove(decision)
            self.queue.take_back(decision)

    @rule()
    def restart(self) -> None:
        self.queue = FairQueue(_LIMITS)
        self.under_way = []
        self.overtaken_by = {}
        for line in _LINES:
            self.queue.count_queued(line, Demand(), self._count(line, JobState.QUEUED))
            for _ in range(self._count(line, *ACTIVE_STATES)):
                self.queue.count_active(line)

    # --- what holds

    @invariant()
    def quotas_hold(self) -> None:
        active = Counter({line: self._active(line) for line in _LINES})
        for name, limits in _LIMITS.items():
            counts = [count for line, count in active.items() if line.service == name]
            assert sum(counts) <= limits.max_runs
            assert max(counts) <= limits.runs_per_user

    @invariant()
    def counts_are_those_of_the_store(self) -> None:
        for line in _LINES:
            waiting = self._count(line, JobState.QUEUED) - self._under_way(line)
            assert self.queue.counts_of_queue(line) == Counts(max(waiting, 0), self._active(line))
        for name in _SERVICES:
            counted = self.queue.counts_of_service(name)
            lines = [line for line in _LINES if line.service == name]
            assert counted.active == sum(map(self._active, lines))

    @invariant()
    def forget_overtaking_of_lines_that_could_not_run(self) -> None:
        for line in _LINES:
            if self._may_run_for_its_user(line):
                self.overtaken_by.setdefault(line, set())
            else:
                self.overtaken_by.pop(line, None)

    def _note_turn(self, line: UserQueue) -> None:
        """Users take turns: none goes twice while another of the service could have gone."""
        for other, overtakers in self.overtaken_by.items():
            if other.service == line.service and other != line:
                assert line not in overtakers, f"{line} went twice before {other}"
                overtakers.add(line)
        self.overtaken_by[line] = set()

    def _move(self, job: _Job, after: JobState) -> None:
        before, job.state = job.state, after
        self._tell(job, before)

    def _tell(self, job: _Job, before: JobState | None) -> None:
        user_id, service = job.line.user_id, job.line.service
        self.queue.follow(Transition(0, job.id, user_id, service, 0, 0.0, before, job.state, ""))

    def _in(self, *states: JobState) -> list[_Job]:
        return [job for job in self.jobs if job.state in states]

    def _count(self, line: UserQueue, *states: JobState) -> int:
        return sum(job.line == line for job in self._in(*states))

    def _under_way(self, line: UserQueue) -> int:
        return sum(decision.queue == line for decision in self.under_way)

    def _active(self, line: UserQueue) -> int:
        return self._count(line, *ACTIVE_STATES) + self._under_way(line)

    def _may_run(self, line: UserQueue) -> bool:
        is_slot_free = self._is_service_below_its_limit(line.service)
        return self._may_run_for_its_user(line) and is_slot_free

    def _is_service_below_its_limit(self, service: str) -> bool:
        running = sum(self._active(line) for line in _LINES if line.service == service)
        return running < _LIMITS[service].max_runs

    def _may_run_for_its_user(self, line: UserQueue) -> bool:
        waiting = self._count(line, JobState.QUEUED) - self._under_way(line)
        return waiting > 0 and self._active(line) < _LIMITS[line.service].runs_per_user


TestFairQueueModel = FairQueueModel.TestCase
TestFairQueueModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def _take(queue: FairQueue, number: int) -> list[UserQueue]:
    """Take jobs that run at once and end at once."""
    taken = []
    for _ in range(number):
        decision = queue.next_for(ANYTHING)
        assert decision is not None
        line = decision.queue
        for before, after in (
            (JobState.QUEUED, JobState.PROCESSING),
            (JobState.PROCESSING, JobState.FAILED),
        ):
            queue.follow(Transition(0, 0, line.user_id, line.service, 1, 0.0, before, after, ""))
        taken.append(line)
    return taken


def _next(queue: FairQueue, placement: Placement = ANYTHING) -> UserQueue | None:
    decision = queue.next_for(placement)
    return None if decision is None else decision.queue


def test_users_take_turns_however_much_one_of_them_queued() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=5, max_runs=10)})
    queue.count_queued(UserQueue("dock", 1), Demand(), 1_000_000)
    queue.count_queued(UserQueue("dock", 2), Demand(), 3)
    assert [line.user_id for line in _take(queue, 8)] == [1, 2, 1, 2, 1, 2, 1, 1]


def test_services_take_turns() -> None:
    queue = FairQueue(_LIMITS)
    for service in _SERVICES:
        queue.count_queued(UserQueue(service, 1), Demand(), 3)
    assert [line.service for line in _take(queue, 6)] == ["dock", "fold"] * 3


def test_jobs_that_were_active_before_a_restart_count() -> None:
    queue = FairQueue(_LIMITS)
    line = UserQueue("fold", 7)
    queue.count_active(line)
    queue.count_queued(line, Demand(), 1)
    assert _next(queue) is None
    done = Transition(0, 0, 7, "fold", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, "")
    queue.follow(done)
    assert _next(queue) == line


def test_other_limits_apply_from_the_next_decision_on() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=1, max_runs=1)})
    line = UserQueue("dock", 1)
    queue.count_queued(line, Demand(), 4)
    assert _next(queue) == line
    assert _next(queue) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=2, max_runs=9)})
    assert _next(queue) == line
    assert _next(queue) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=1, max_runs=9)})
    queue.follow(Transition(0, 0, 1, "dock", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, ""))
    assert _next(queue) is None


def test_jobs_of_a_service_that_is_not_configured_wait_until_it_is() -> None:
    queue = FairQueue({})
    line = UserQueue("dock", 1)
    queue.count_queued(line, Demand(), 3)
    assert _next(queue) is None
    queue.set_limits({"dock": ServiceLimits()})
    assert _next(queue) == line
    queue.set_limits({})
    assert _next(queue) is None
    queue.take_back(Decision(line, {Demand(): "a"}))
    assert _next(queue) is None
    assert queue.counts_of_service("dock") == Counts(waiting=3, active=0)


def test_a_service_that_no_free_agent_offers_is_passed_over_and_keeps_its_turn() -> None:
    queue = FairQueue(_LIMITS)
    for service in _SERVICES:
        queue.count_queued(UserQueue(service, 1), Demand(), 2)
    assert _next(queue, offering("fold")) == UserQueue("fold", 1)
    assert _next(queue, offering("fold")) is None  # its quota
    assert _next(queue) == UserQueue("dock", 1)
