"""Leases, adoption and windows between the two ends of the channel, in one process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from config import Settings
from jobs import JobState
from tests.in_process import House, Machine, running_house, until
from wire import messages
from wire.frames import WINDOW_BYTES

pytestmark = pytest.mark.quick

LEASE = 60.0


@pytest.fixture
async def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    settings = Settings(lease=LEASE, kill_grace=1.0)
    async with running_house(tmp_path, monkeypatch, settings) as house:
        yield house


@pytest.fixture
def machine(house: House, tmp_path: Path) -> Machine:
    return new_machine(house, tmp_path, "one")


def new_machine(house: House, tmp_path: Path, name: str) -> Machine:
    made = Machine(house, tmp_path / name)
    house.machines.append(made)
    return made


async def test_a_job_goes_out_and_its_result_comes_back(house: House, machine: Machine) -> None:
    machine.start()
    job = await house.submit(b"echo")
    await house.wait(job, JobState.RUNNING)
    machine.executor.end(1, 0)
    archive = await house.result(job)
    assert archive.read("run.sh") == b"echo"
    assert archive.read("out.txt") == b"of attempt 1"
    assert await house.states(job) == [
        JobState.PROCESSING,
        JobState.SUBMITTED,
        JobState.RUNNING,
        JobState.COMPLETED,
    ]


async def test_a_lease_is_as_long_as_it_is(house: House, machine: Machine, tmp_path: Path) -> None:
    machine.start()
    job = await house.submit()
    await house.wait(job, JobState.RUNNING)
    machine.is_reachable = False
    machine.cut()
    await until(lambda: not house.dispatcher.agents()[0].is_connected, "it is away")
    house.clock.advance(LEASE)  # the server stood still: none of it counts
    await house.store.probe()
    await house.clock.spend(LEASE - 4)
    await house.store.probe()
    assert await house.state(job) is JobState.RUNNING
    await house.clock.spend(4)
    await house.wait(job, JobState.QUEUED)
    # another takes it, and what the first one delivers then counts for nothing
    other = new_machine(house, tmp_path, "two")
    other.start()
    await house.wait(job, JobState.RUNNING)
    machine.executor.end(1, 0)
    machine.is_reachable = True
    await until(lambda: not list((tmp_path / "one" / "attempts").iterdir()), "it was dropped")
    other.executor.end(2, 0)
    assert (await house.result(job)).read("out.txt") == b"of attempt 2"


async def test_an_agent_that_is_back_in_time_keeps_its_job(house: House, machine: Machine) -> None:
    machine.start()
    job = await house.submit()
    await house.wait(job, JobState.RUNNING)
    for _ in range(3):  # longer than the lease in sum, but never at once
        machine.is_reachable = False
        machine.cut()
        await until(lambda: not house.dispatcher.agents()[0].is_connected, "it is away")
        await house.clock.spend(LEASE - 4)
        machine.is_reachable = True
        await until(lambda: house.dispatcher.agents()[0].is_connected, "it is back")
    machine.executor.end(1, 0)
    await house.result(job)
    assert machine.executor.starts == [1]
    assert JobState.QUEUED not in await house.states(job)


@pytest.mark.parametrize("moment", ["running", "ended meanwhile"])
async def test_a_new_process_of_the_agent_adopts_what_the_old_one_left(
    house: House, machine: Machine, moment: str
) -> None:
    machine.start()
    job = await house.submit()
    await house.wait(job, JobState.RUNNING)
    await machine.stop()
    if moment == "ended meanwhile":
        machine.executor.end(1, 0)
    machine.start()
    machine.executor.end(1, 0)
    assert (await house.result(job)).read("out.txt") == b"of attempt 1"
    assert machine.executor.starts == [1]


@pytest.mark.parametrize("cuts", [[after] * 12 for after in (2, 3, 4, 5)] + [[9, 1, 4, 2, 7]])
async def test_connections_that_break_at_any_frame_lose_and_repeat_nothing(
    house: House, machine: Machine, cuts: list[int]
) -> None:
    script = bytes(range(256)) * 2048  # of two frames
    machine.cuts = list(cuts)
    machine.start()
    job = await house.submit(script)
    await house.wait(job, JobState.RUNNING)
    machine.executor.end(1, 0)
    assert (await house.result(job)).read("run.sh") == script
    assert machine.executor.starts == [1]


async def test_no_end_runs_further_ahead_than_the_window(house: House, machine: Machine) -> None:
    machine.start()
    job = await house.submit(bytes(3 * WINDOW_BYTES))
    await until(lambda: len(machine.connections) == 1, "it is connected")
    server = machine.connections[0].peer
    ahead = 0

    def acknowledged() -> int:
        sent = machine.connections[0].sent
        return max(
            (word.offset for word in sent if isinstance(word, messages.Acknowledge)), default=0
        )

    def looks() -> bool:
        nonlocal ahead
        ahead = max(ahead, server.sent_bytes - acknowledged())
        return server.sent_bytes > 3 * WINDOW_BYTES

    await until(looks, "all of it was sent")
    assert WINDOW_BYTES / 2 < ahead < WINDOW_BYTES * 1.01  # frames have headers
    await house.wait(job, JobState.RUNNING)


async def test_silence_ends_a_connection_on_both_ends(house: House, machine: Machine) -> None:
    machine.start()
    await until(lambda: len(machine.connections) == 1, "it is connected")
    await until(
        lambda: any(isinstance(word, messages.Heartbeat) for word in machine.connections[0].sent),
        "it was heard",
    )
    machine.connections[0].fall_silent()
    await house.clock.spend(LEASE)
    await until(lambda: len(machine.connections) > 1, "it connects again")
