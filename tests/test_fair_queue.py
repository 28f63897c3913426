"""The scheduling policy against a slow and obvious model of the design's rules."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from config import ServiceLimits
from scheduler import FairQueue
from store import QueuedJob

_LIMITS = {"dock": ServiceLimits(runs_per_user=2, max_runs=3), "fold": ServiceLimits(1, 5)}
_SERVICES = sorted(_LIMITS)


class FairQueueModel(RuleBasedStateMachine):
    """Adds, takes and releases jobs at random, and checks each decision."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(_LIMITS)
        self.waiting: dict[int, QueuedJob] = {}
        self.active: dict[int, QueuedJob] = {}
        self.next_id = 1

    @rule(user=st.integers(1, 4), service=st.sampled_from(_SERVICES), priority=st.integers(-1, 1))
    def add(self, user: int, service: str, priority: int) -> None:
        job = QueuedJob(self.next_id, user, service, priority)
        self.next_id += 1
        self.waiting[job.id] = job
        self.queue.add(job)

    @rule(offered=st.none() | st.frozensets(st.sampled_from(_SERVICES)))
    def take(self, offered: frozenset[str] | None) -> None:
        eligible = [job for job in self.waiting.values() if self._may_run(job, offered)]
        job = self.queue.next_for(offered)
        if job is None:
            assert not eligible, "work was left lying although it could run"
            return
        assert job in eligible
        peers = [
            other
            for other in self.waiting.values()
            if (other.user_id, other.service) == (job.user_id, job.service)
        ]
        assert job == min(peers, key=lambda other: (-other.priority, other.id))
        self.active[job.id] = self.waiting.pop(job.id)

    @rule(data=st.data(), again=st.booleans())
    def release(self, data: st.DataObject, again: bool) -> None:
        if not self.active:
            return
        job = self.active.pop(data.draw(st.sampled_from(sorted(self.active))))
        self.queue.release(job)
        if again:
            self.waiting[job.id] = job
            self.queue.add(job)

    @rule(data=st.data(), present=st.booleans())
    def remove(self, data: st.DataObject, present: bool) -> None:
        jobs = self.waiting if present else self.active
        if not jobs:
            return
        job = jobs[data.draw(st.sampled_from(sorted(jobs)))]
        assert self.queue.remove(job) is present
        self.waiting.pop(job.id, None)

    @invariant()
    def quotas_hold(self) -> None:
        services = Counter(job.service for job in self.active.values())
        users = Counter((job.service, job.user_id) for job in self.active.values())
        assert all(count <= _LIMITS[name].max_runs for name, count in services.items())
        assert all(count <= _LIMITS[name].runs_per_user for (name, _), count in users.items())

    def _may_run(self, job: QueuedJob, offered: frozenset[str] | None) -> bool:
        if offered is not None and job.service not in offered:
            return False
        limits = _LIMITS[job.service]
        running = [other for other in self.active.values() if other.service == job.service]
        own = [other for other in running if other.user_id == job.user_id]
        return len(running) < limits.max_runs and len(own) < limits.runs_per_user


TestFairQueueModel = FairQueueModel.TestCase
TestFairQueueModel.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def _take_all(queue: FairQueue) -> list[QueuedJob]:
    taken = []
    while (job := queue.next_for(None)) is not None:
        taken.append(job)
        queue.release(job)
    return taken


def test_users_take_turns_however_much_one_of_them_queued() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=5, max_runs=10)})
    for number in range(100):
        queue.add(QueuedJob(number, 1, "dock"))
    for number in range(100, 103):
        queue.add(QueuedJob(number, 2, "dock"))
    assert [job.user_id for job in _take_all(queue)[:6]] == [1, 2, 1, 2, 1, 2]


def test_services_take_turns() -> None:
    queue = FairQueue(_LIMITS)
    for number in range(6):
        queue.add(QueuedJob(number, 1, "dock" if number < 3 else "fold"))
    taken = [job.service for job in _take_all(queue)]
    assert taken[:4] in (["dock", "fold"] * 2, ["fold", "dock"] * 2)


def test_a_job_that_was_queued_again_keeps_its_place() -> None:
    queue = FairQueue(_LIMITS)
    jobs = [QueuedJob(number, 1, "fold") for number in range(3)]
    for job in jobs:
        queue.add(job)
    first = queue.next_for(None)
    assert first == jobs[0]
    queue.release(first)
    queue.add(first)
    assert _take_all(queue) == jobs


def test_jobs_that_were_active_before_a_restart_count() -> None:
    queue = FairQueue(_LIMITS)
    queue.count_active(QueuedJob(1, 7, "fold"))
    queue.add(QueuedJob(2, 7, "fold"))
    assert queue.next_for(None) is None
    queue.release(QueuedJob(1, 7, "fold"))
    assert queue.next_for(None) == QueuedJob(2, 7, "fold")


def test_other_limits_apply_from_the_next_decision_on() -> None:
    queue = FairQueue({"dock": ServiceLimits(runs_per_user=1, max_runs=1)})
    for number in range(4):
        queue.add(QueuedJob(number, 1, "dock"))
    assert queue.next_for(None) is not None
    assert queue.next_for(None) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=2, max_runs=9)})
    assert queue.next_for(None) is not None
    assert queue.next_for(None) is None
    queue.set_limits({"dock": ServiceLimits(runs_per_user=1, max_runs=9)})
    queue.release(QueuedJob(0, 1, "dock"))
    assert queue.next_for(None) is None
