"""Who is taken in as an agent: the bounds of what it says, and the secret of its id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import JobState, Resources
from tests.fleet.peers import archive, finished, running_fleet
from wire import messages

SECRET, OTHER = "s" * 40, "o" * 40


def _held(attempt_id: int = 1, incarnation: str = "") -> messages.HeldAttempt:
    return messages.HeldAttempt(1, attempt_id, messages.AttemptPhase.RUNNING, 0, incarnation)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots": 5000}, "slots"),
        ({"agent_id": "x" * 65}, "agent id"),
        ({"agent_id": "a b"}, "agent id"),
        ({"instance": "x" * 65}, "instance"),
        ({"version": "\n"}, "version"),
        ({"secret": "short"}, "secret"),
        ({"services": ("x" * 65,)}, "services"),
        ({"services": tuple(map(str, range(1001)))}, "services"),
        ({"attempts": (_held(2**62),)}, "out of range"),
        ({"attempts": (_held(-1),)}, "out of range"),
        ({"attempts": (_held(1, "x" * 65),)}, "out of range"),
        ({"attempts": (_held(),) * 10_001}, "at most"),
        ({"resources": Resources(-1)}, "resources"),
        ({"resources": Resources(1, 2**60)}, "resources"),
    ],
)
async def test_a_hello_out_of_bounds_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = fleet.connect("odd")
        peer.hello(**changes)
        refused = await peer.wait_for(messages.Refused)
        assert reason in refused.reason
        assert not refused.retry
        assert fleet.dispatcher.agents() == []


async def test_knowing_an_id_does_not_make_an_agent(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        owner = await fleet.agent("owner", secret=SECRET)
        job_id = await fleet.submit()
        await owner.wait_for(messages.Assign)
        for secret in (None, OTHER):
            thief = fleet.connect("owner")
            thief.hello(secret=secret)  # the same instance, too, which may replace a connection
            assert "another secret" in (await thief.wait_for(messages.Refused)).reason
        (status,) = fleet.dispatcher.agents()
        assert status.is_connected
        assert (await fleet.state(job_id))[0] is JobState.PROCESSING
    async with running_fleet(tmp_path) as fleet:  # it is kept over a restart of the server
        thief = fleet.connect("owner")
        thief.hello(secret=OTHER)
        await thief.wait_for(messages.Refused)
        await fleet.agent("owner", secret=SECRET)


async def test_an_agent_of_before_secrets_is_taken_in_until_it_shows_one(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        (await fleet.agent("upgraded")).disconnect()
        await fleet.agent("upgraded", secret=SECRET)
        old = fleet.connect("upgraded")
        old.hello()
        await old.wait_for(messages.Refused)


@pytest.mark.parametrize(
    "changes",
    [
        {"result_size": 2**62},
        {"result_size": 0},
        {"result_sha256": "x" * 64},
        {"result_sha256": ""},
    ],
)
async def test_a_report_out_of_bounds_ends_the_connection_and_changes_nothing(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("odd")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        peer.run_through(attempt_id)
        await fleet.wait(job_id, JobState.RUNNING)
        peer.say(finished(attempt_id, archive(), **changes))
        await peer.closed.wait()
        assert (await fleet.state(job_id))[0] is JobState.RUNNING


async def test_what_an_agent_says_to_users_is_cut_to_a_bound(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("talker")
        job_id = await fleet.submit()
        attempt_id = (await peer.wait_for(messages.Assign)).attempt_id
        peer.run_through(attempt_id)
        content = archive()
        peer.say(finished(attempt_id, content, message="x" * 1_000_000, state=JobState.FAILED))
        peer.send(attempt_id, content)
        await peer.wait_for(messages.Stored)
        assert len((await fleet.state(job_id))[1]) == 4000
