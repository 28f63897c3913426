"""A lease counts time in which the server could have heard the agent, over all its starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import JobState
from tests.fleet.peers import running_fleet
from tests.in_process import Clock
from wire import messages

LEASE = 60.0


async def test_a_server_that_is_started_again_and_again_gives_up_a_dead_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, lease=LEASE) as fleet:
        peer = await fleet.agent("dead")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        peer.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
    for _ in range(20):
        async with running_fleet(tmp_path, lease=LEASE) as fleet:
            if (await fleet.state(job_id))[0] is JobState.QUEUED:
                break
            for _ in range(5):  # a fraction of the lease
                await clock.spend(2)
                await fleet.store.probe()
    else:
        raise AssertionError("it was never given up")


async def test_a_server_that_stood_still_for_long_ends_no_connection_and_no_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    async with running_fleet(tmp_path, lease=LEASE) as fleet:
        peer = await fleet.agent("alive")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        peer.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
        await fleet.agent("silent")
        for _ in range(3):
            clock.advance(10 * LEASE)
            peer.say(messages.Heartbeat())  # it waited in the socket
            await peer.wait_for(messages.Heartbeat)
        assert not peer.closed.is_set()
        assert [agent.is_connected for agent in fleet.dispatcher.agents()] == [True, True]
        # one that is silent although the server listens is given up as ever
        await clock.spend(LEASE)
        await fleet.until(lambda: [agent.name for agent in fleet.dispatcher.agents()] == ["alive"])
