"""What a queued job waits for is said in words that tell what is missing, and where."""

from __future__ import annotations

from pathlib import Path

from config import ServiceLimits
from jobs import Resources
from records import UserQueue
from tests.fleet.peers import Fleet, running_fleet
from wire import messages

GB = 2**30


def why(fleet: Fleet, resources: Resources, service: str = "example", user: int = 1) -> str:
    return fleet.dispatcher.why_waiting(UserQueue(service, user), resources)


async def test_the_reason_says_what_is_missing_and_where(tmp_path: Path) -> None:
    services = {"example": ServiceLimits(runs_per_user=2, max_runs=99, max_cpus=64)}
    async with running_fleet(tmp_path, services) as fleet:
        assert why(fleet, Resources(), "gone") == "this service is not configured"
        assert why(fleet, Resources()) == "no agent is connected"
        machine = Resources(cpus=4, memory=8 * GB, gpus=1)
        peer = await fleet.agent("gpu1", slots=4, services=("example",), resources=machine)
        await fleet.until(lambda: why(fleet, Resources()) == "next")
        assert why(fleet, Resources(gpus=2)) == (
            "needs 2 GPUs; the largest agent that offers this service has 1"
        )
        assert why(fleet, Resources(cpus=5)) == (
            "needs 5 cores; the largest agent that offers this service has 4"
        )
        assert why(fleet, Resources(memory=9 * GB)) == (
            "needs 9 GB of memory; the largest agent that offers this service has 8 GB of memory"
        )
        await fleet.submit(user_id=2, cpus=1, memory=4 * GB, gpus=1)
        await peer.wait_for(messages.Assign)
        assert why(fleet, Resources(gpus=1)) == "waits for 1 GPU on gpu1"
        assert why(fleet, Resources(memory=8 * GB)) == "waits for 8 GB of memory on gpu1"
        assert why(fleet, Resources(cpus=4)) == "waits for 4 cores on gpu1"
        assert why(fleet, Resources(cpus=3, memory=4 * GB)) == "next"
        (status,) = fleet.dispatcher.agents()
        assert (status.resources, status.used) == (machine, Resources(1, 4 * GB, 1))
        await fleet.submit(user_id=2)
        assert why(fleet, Resources(), user=2) == "user limit 2 of 2"
        for user in (3, 4):
            await fleet.submit(user_id=user)
        await fleet.until(lambda: fleet.dispatcher.agents()[0].busy == 4)
        assert why(fleet, Resources()) == "all slots busy"
        peer.say(messages.Drain())
        await fleet.until(
            lambda: why(fleet, Resources()) == "all agents that offer this service are drained"
        )


async def test_a_job_gets_what_was_asked_for_or_what_its_service_says(tmp_path: Path) -> None:
    services = {"example": ServiceLimits(cpus=2, memory=GB, max_cpus=4)}
    async with running_fleet(tmp_path, services) as fleet:
        peer = await fleet.agent("one", resources=Resources(8, 8 * GB, 1))
        await fleet.submit()
        assert (await peer.wait_for(messages.Assign)).resources == Resources(2, GB, 0)
        await fleet.submit(cpus=4)
        assert (await peer.wait_for(messages.Assign)).resources == Resources(4, GB, 0)


async def test_an_agent_that_knows_no_resources_has_a_core_for_each_slot(tmp_path: Path) -> None:
    async with running_fleet(tmp_path) as fleet:
        peer = await fleet.agent("old", slots=2)
        for _ in range(3):
            await fleet.submit()
        for _ in range(2):
            assert (await peer.wait_for(messages.Assign)).resources == Resources()
        assert fleet.dispatcher.agents()[0].busy == 2
        assert why(fleet, Resources(gpus=1)) == (
            "needs 1 GPU; the largest agent that offers this service has 0"
        )
