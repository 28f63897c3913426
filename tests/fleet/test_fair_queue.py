"""The scheduling policy against a slow and obvious model of the design's rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from config import ServiceLimits
from events import Transition
from jobs import ACTIVE_STATES, JobState
from records import UserQueue
from scheduler import Counts, FairQueue, FreeSlots

pytestmark = pytest.mark.quick

_LIMITS = {"dock": ServiceLimits(runs_per_user=2, max_runs=3), "fold": ServiceLimits(1, 5)}
_SERVICES = sorted(_LIMITS)
_LINES = [UserQueue(service, user) for service in _SERVICES for user in range(1, 5)]


def anything(service: str) -> bool:
    """Agents that offer all services."""
    return True


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
        self.under_way: list[UserQueue] = []
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

    @rule(offered=st.none() | st.frozensets(st.sampled_from(_SERVICES)))
    def decide(self, offered: frozenset[str] | None) -> None:
        is_offered: Callable[[str], bool] = anything if offered is None else offered.__contains__
        eligible = [line for line in _LINES if is_offered(line.service) and self._may_run(line)]
        line = self.queue.next_for(is_offered)
        if line is None:
            assert not eligible, "work was left lying although it could run"
            return
        assert line in eligible
        self._note_turn(line)
        self.under_way.append(line)

    @rule(line=st.sampled_from(_LINES))
    def decide_ahead(self, line: UserQueue) -> None:
        """For a job that may come into the line later, or never."""
        others = [other for other in _LINES if other.service == line.service]
        is_slot_free = self._is_service_below_its_limit(line.service)
        has_quota = self._active(line) < _LIMITS[line.service].runs_per_user
        may_start = is_slot_free and has_quota and not any(map(self._may_run, others))
        assert self.queue.decide_ahead(line, anything) == may_start
        if may_start:
            self.under_way.append(line)

    @rule(data=st.data())
    def carry_out(self, data: st.DataObject) -> None:
        if not self.under_way:
            return
        line = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(line)
        waiting = [job for job in self._in(JobState.QUEUED) if job.line == line]
        if waiting:
            first = min(waiting, key=lambda job: (-job.priority, job.id))
            self._move(first, JobState.PROCESSING)
        else:
            self.queue.take_back(line)

    @rule(data=st.data())
    def fail_to_carry_out(self, data: st.DataObject) -> None:
        if self.under_way:
            line = data.draw(st.sampled_from(self.under_way))
            self.under_way.remove(line)
            self.queue.take_back(line)

    @rule()
    def restart(self) -> None:
        self.queue = FairQueue(_LIMITS)
        self.under_way = []
        self.overtaken_by = {}
        for line in _LINES:
            self.queue.count(line, self._count(line, JobState.QUEUED), active=0)
            self.queue.count(line, 0, active=self._count(line, *ACTIVE_STATES))

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
            waiting = self._count(line, JobState.QUEUED) - self.under_way.count(line)
            assert self.queue.counts_of_line(line) == Counts(max(waiting, 0), self._active(line))
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

    def _active(self, line: UserQueue) -> int:
        return self._count(line, *ACTIVE_STATES) + self.under_way.count(line)

    def _may_run(self, line: UserQueue) -> bool:
        is_slot_free = self._is_service_below_its_limit(line.service)
        return self._may_run_for_its_user(line) and is_slot_free

    def _is_service_below_its_limit(self, service: str) -> bool:
        running = sum(self._active(line) for line in _LINES if line.service == service)
        return running < _LIMITS[service].max_runs

    def _may_run_for_its_user(self, line: UserQueue) -> bool:
        waiting = self._count(line, JobState.QUEUED) - self.under_way.count(line)
        return waiting > 0 and self._active(line) < _LIMITS[line.service].runs_per_user


TestFairQueueModel = FairQueueModel.TestCase
TestFairQueueModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def _take(queue: FairQueue, number: int) -> list[UserQueue]:
    """Take jobs that run at once and end at once."""
    taken = []
    for _ in range(number):
        line = queue.next_for(anything)
        assert line is not None
        for before, after in (
            (JobState.QUEUED, JobState.PROCESSING),
            (JobState.PROCESSING, JobState.FAILED),
        ):
            queue.follow(Transition(0, 0, line.user_id, line.service, 1, 0.0, before, after, ""))
        taken.append(line)
    return taken


def test_users_take_turns_however_much_one_of_them_queued() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=5, max_runs=10)})
    queue.count(UserQueue("dock", 1), waiting=1_000_000, active=0)
    queue.count(UserQueue("dock", 2), waiting=3, active=0)
    assert [line.user_id for line in _take(queue, 8)] == [1, 2, 1, 2, 1, 2, 1, 1]


def test_services_take_turns() -> None:
    queue = FairQueue(_LIMITS)
    for service in _SERVICES:
        queue.count(UserQueue(service, 1), waiting=3, active=0)
    assert [line.service for line in _take(queue, 6)] == ["dock", "fold"] * 3


def test_jobs_that_were_active_before_a_restart_count() -> None:
    queue = FairQueue(_LIMITS)
    line = UserQueue("fold", 7)
    queue.count(line, waiting=0, active=1)
    queue.count(line, waiting=1, active=0)
    assert queue.next_for(anything) is None
    done = Transition(0, 0, 7, "fold", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, "")
    queue.follow(done)
    assert queue.next_for(anything) == line


def test_other_limits_apply_from_the_next_decision_on() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=1, max_runs=1)})
    line = UserQueue("dock", 1)
    queue.count(line, waiting=4, active=0)
    assert queue.next_for(anything) == line
    assert queue.next_for(anything) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=2, max_runs=9)})
    assert queue.next_for(anything) == line
    assert queue.next_for(anything) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=1, max_runs=9)})
    queue.follow(Transition(0, 0, 1, "dock", 1, 0.0, JobState.RUNNING, JobState.COMPLETED, ""))
    assert queue.next_for(anything) is None


def test_jobs_of_a_service_that_is_not_configured_wait_until_it_is() -> None:
    queue = FairQueue({})
    line = UserQueue("dock", 1)
    queue.count(line, waiting=3, active=0)
    assert queue.next_for(anything) is None
    queue.set_limits({"dock": ServiceLimits()})
    assert queue.next_for(anything) == line
    queue.set_limits({})
    assert queue.next_for(anything) is None
    queue.take_back(line)
    assert queue.next_for(anything) is None
    assert queue.counts_of_service("dock") == Counts(waiting=3, active=0)


def test_a_service_that_no_free_agent_offers_is_passed_over_and_keeps_its_turn() -> None:
    queue = FairQueue(_LIMITS)
    for service in _SERVICES:
        queue.count(UserQueue(service, 1), waiting=2, active=0)
    assert queue.next_for("fold".__eq__) == UserQueue("fold", 1)
    assert queue.next_for("fold".__eq__) is None  # its quota
    assert queue.next_for(anything) == UserQueue("dock", 1)


class FreeSlotsModel(RuleBasedStateMachine):
    """Agents come, go and change their load; the answer is that of a search through all."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = FreeSlots()
        self.agents: dict[str, tuple[float, frozenset[str] | None]] = {}

    @rule(
        agent_id=st.sampled_from("abcdef"),
        load=st.sampled_from([0.0, 0.25, 0.5]),
        services=st.none() | st.frozensets(st.sampled_from(_SERVICES)),
    )
    def put(self, agent_id: str, load: float, services: frozenset[str] | None) -> None:
        self.slots.put(agent_id, load, services)
        self.agents[agent_id] = load, services

    @rule(agent_id=st.sampled_from("abcdef"))
    def discard(self, agent_id: str) -> None:
        self.slots.discard(agent_id)
        self.agents.pop(agent_id, None)

    @invariant()
    def the_least_loaded_that_offers_it_is_found(self) -> None:
        for service in _SERVICES:
            fitting = {
                agent_id: load
                for agent_id, (load, services) in self.agents.items()
                if services is None or service in services
            }
            assert self.slots.offer(service) == bool(fitting)
            if fitting:
                chosen = self.slots.least_loaded(service)
                assert fitting[chosen] == min(fitting.values())


TestFreeSlotsModel = FreeSlotsModel.TestCase
TestFreeSlotsModel.settings = settings(max_examples=60, deadline=None)
