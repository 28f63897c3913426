"""One broken agent does not eat the queue."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from config import ServiceLimits
from fleet.agent import AgentStatus
from fleet.health import MAX_LOSSES, Health
from jobs import JobState, Resources
from records import UserQueue
from tests.fleet.peers import Fleet, Peer, archive, running_fleet
from tests.in_process import Clock
from wire import messages


async def _lose_all(peer: Peer, reason: str = "No space left on device") -> None:
    """Take each attempt and lose it at once."""
    while True:
        assign = await peer.receive(messages.Assign)
        peer.say(messages.Lost(assign.attempt_id, reason))


async def _complete_all(peer: Peer) -> None:
    while True:
        assign = await peer.receive(messages.Assign)
        peer.deliver(assign.attempt_id, archive())


async def test_no_job_fails_because_one_of_two_agents_loses_all_it_gets(tmp_path: Path) -> None:
    async with running_fleet(tmp_path, max_attempts=2) as fleet:
        # the broken one has more slots, so it is the less loaded one and asked first
        bad = await fleet.agent("bad", slots=64)
        good = await fleet.agent("good", slots=2)
        tasks = [asyncio.create_task(_lose_all(bad)), asyncio.create_task(_complete_all(good))]
        try:
            submitted = [await fleet.submit() for _ in range(60)]
            for job_id in submitted:
                await fleet.wait(job_id, JobState.COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
        status = {agent.name: agent for agent in fleet.dispatcher.agents()}
        assert status["good"].set_aside is None


async def test_an_agent_that_loses_all_is_set_aside_and_tried_with_one_job_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, max_attempts=1000) as fleet:
        bad = await fleet.agent("bad", slots=8)
        losing = asyncio.create_task(_lose_all(bad))
        submitted = [await fleet.submit(user_id=user) for user in range(20)]
        await _spend_until_set_aside(fleet, clock, bad)
        losing.cancel()
        (status,) = fleet.dispatcher.agents()
        assert status.set_aside is not None
        assert "No space left" in status.set_aside
        await fleet.until(lambda: fleet.dispatcher.agents()[0].busy == 0)
        await _spend(clock, bad, 301)
        assign = await bad.wait_for(messages.Assign)
        await fleet.store.probe()
        assert fleet.dispatcher.agents()[0].busy == 1, "one job on trial"
        bad.deliver(assign.attempt_id, archive())
        completing = asyncio.create_task(_complete_all(bad))
        for job_id in submitted:
            await fleet.wait(job_id, JobState.COMPLETED)
        assert fleet.dispatcher.agents()[0].set_aside is None
        completing.cancel()


async def test_a_service_that_can_not_begin_there_is_set_aside_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    limits = ServiceLimits(runs_per_user=99, max_runs=99)
    services = {"good": limits, "wrong": limits}
    async with running_fleet(tmp_path, services, max_attempts=1000) as fleet:
        peer = await fleet.agent("login", slots=8)
        serving = asyncio.create_task(_lose_one_service(peer, "wrong"))
        waiting = [await fleet.submit(service="wrong") for _ in range(20)]

        def shown() -> AgentStatus:
            return fleet.dispatcher.agents()[0]

        await _spend_until_set_aside(fleet, clock, peer)
        ((service, reason),) = shown().services_set_aside
        assert service == "wrong"
        assert "invalid partition" in reason
        assert shown().set_aside is None
        await fleet.wait(await fleet.submit(service="good"), JobState.COMPLETED)
        why = fleet.dispatcher.why_waiting(UserQueue("wrong", 1), Resources())
        assert why.startswith("this service is set aside on agent login: ")
        assert "invalid partition" in why
        # what works for others says nothing of this one
        assert [name for name, _ in shown().services_set_aside] == ["wrong"]
        serving.cancel()
        await _spend(clock, peer, 301)
        assign = await peer.wait_for(messages.Assign)
        await fleet.store.probe()
        assert shown().busy == 1, "one job on trial"
        assert fleet.dispatcher.why_waiting(UserQueue("wrong", 1), Resources()) == why
        # a cluster has taken that one: the others need not wait until it has run
        peer.say(messages.Waiting(assign.attempt_id, "in Slurm as 7: Priority", is_handed_on=True))
        await fleet.until(lambda: shown().busy == 8)
        assert shown().services_set_aside == ()
        peer.deliver(assign.attempt_id, archive())
        completing = asyncio.create_task(_complete_all(peer))
        for job_id in waiting:
            await fleet.wait(job_id, JobState.COMPLETED)
        assert shown().services_set_aside == ()
        completing.cancel()


async def test_a_job_that_was_handed_on_before_says_nothing_of_those_that_are_refused_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, max_attempts=1000) as fleet:
        peer = await fleet.agent("login", slots=8)
        job_id = await fleet.submit()
        before = (await peer.wait_for(messages.Assign)).attempt_id
        peer.say(messages.Waiting(before, "in Slurm as 7: Priority", is_handed_on=True))
        losing = asyncio.create_task(_lose_one_service(peer, "example"))
        await fleet.submit()
        await _spend_until_set_aside(fleet, clock, peer)
        peer.say(messages.Waiting(before, "in Slurm as 7: Resources", is_handed_on=True))
        peer.run_through(before)
        await fleet.wait(job_id, JobState.RUNNING)
        assert fleet.dispatcher.agents()[0].services_set_aside
        losing.cancel()


async def test_a_reload_of_the_settings_has_a_service_tried_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, max_attempts=1000) as fleet:
        peer = await fleet.agent("login", slots=8)
        losing = asyncio.create_task(_lose_one_service(peer, "example"))
        job_id = await fleet.submit()
        await _spend_until_set_aside(fleet, clock, peer)
        losing.cancel()
        fleet.settings.replace(fleet.settings.current)
        assert fleet.dispatcher.agents()[0].services_set_aside == ()
        assign = await peer.wait_for(messages.Assign)
        peer.deliver(assign.attempt_id, archive())
        await fleet.wait(job_id, JobState.COMPLETED)


async def _lose_one_service(peer: Peer, service: str) -> None:
    """Lose each attempt of a service, as its settings are wrong there; complete all others."""
    while True:
        assign = await peer.receive(messages.Assign)
        if assign.service == service:
            peer.say(messages.Lost(assign.attempt_id, "invalid partition", by_service=True))
        else:
            peer.deliver(assign.attempt_id, archive())


async def _spend(clock: Clock, peer: Peer, seconds: int) -> None:
    """Let time pass in which the agent is heard."""
    for _ in range(seconds):
        peer.say(messages.Heartbeat())
        await clock.spend(1)


async def _spend_until_set_aside(fleet: Fleet, clock: Clock, peer: Peer) -> None:
    for _ in range(1000):
        (shown,) = fleet.dispatcher.agents()
        if shown.set_aside is not None or shown.services_set_aside:
            return
        await _spend(clock, peer, 1)
        await fleet.store.probe()
    raise AssertionError("it was never set aside")


async def test_a_job_that_no_agent_can_begin_fails_at_some_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, max_attempts=1) as fleet:
        bad = await fleet.agent("bad", slots=1)
        losing = asyncio.create_task(_lose_all(bad))
        job_id = await fleet.submit()
        started = asyncio.get_running_loop().time()
        for _ in range(100_000):
            if (await fleet.state(job_id))[0] is JobState.FAILED:
                break
            await _spend(clock, bad, 1)
        assert asyncio.get_running_loop().time() - started > 60, "not in a moment"
        losing.cancel()


def test_losses_in_a_row_count_those_of_one_moment_once() -> None:
    health = Health()
    assert health.allowed(8, 3, 0.0) == 5
    for _ in range(100):
        health.lose("full", 0.0, was_started=False)
    assert (health.losses, health.set_aside()) == (1, None)
    assert health.allowed(8, 0, 0.5) == 0
    now = 0.0
    for _ in range(MAX_LOSSES - 1):
        now = health.trial_at
        assert health.allowed(8, 0, now) == 8
        health.lose("full", now, was_started=False)
    assert health.set_aside() == "full"
    assert health.allowed(8, 0, health.trial_at) == 1
    assert health.allowed(8, 1, health.trial_at) == 0
    for _ in range(30):
        pause = health.lose("full", health.trial_at, was_started=False)
    assert pause == 300
    assert health.begin(), "a job that it begins shows that it is well"
    assert health.allowed(8, 0, 0.0) == 8


def test_an_agent_that_lost_running_jobs_is_well_only_once_it_has_delivered_one() -> None:
    health = Health()
    health.lose("full", 0.0, was_started=True)
    assert not health.begin()
    assert health.recover()
    assert not health.recover()
