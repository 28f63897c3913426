"""An input that can't be read ends its own job, and nothing else."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from jobs import JobState
from records import StoreUnavailable
from tests.fleet.peers import archive, running_fleet
from wire import messages
from wire.frames import Frame, Stream, transfer_parts


@pytest.mark.parametrize("size", [100, 3_000_000])
async def test_a_job_whose_input_is_damaged_fails_and_the_others_go_on(
    tmp_path: Path, size: int
) -> None:
    async with running_fleet(tmp_path) as fleet:
        damaged = await fleet.submit(content=bytes(size))
        with contextlib.closing(sqlite3.connect(tmp_path / "orchestrator.db")) as db:
            db.execute("DELETE FROM chunk WHERE id = (SELECT max(id) FROM chunk)")
            db.commit()
        peer = fleet.connect("one")
        peer.hello()
        good = await fleet.submit()
        content = archive()
        attempts = {}
        for _ in range(2):
            assign = await peer.wait_for(messages.Assign)
            attempts[assign.job_id] = assign.attempt_id
        peer.deliver(attempts[good], content)
        message = await fleet.wait(damaged, JobState.FAILED)
        assert message.startswith("its input can't be read")
        await fleet.wait(good, JobState.COMPLETED)
        await fleet.until(lambda: fleet.dispatcher.agents()[0].busy == 0)
        assert fleet.dispatcher.agents()[0].is_connected


async def test_an_input_that_can_be_read_again_after_a_moment_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fleet.session._READ_AGAIN_SECONDS", 0.01)
    async with running_fleet(tmp_path) as fleet:
        read = fleet.store.blobs.read_files
        failures: list[int] = []

        async def read_files(*arguments: object) -> bytes:
            if len(failures) < 2:
                failures.append(1)
                raise StoreUnavailable("an I/O error that passes")
            return await read(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(fleet.store.blobs, "read_files", read_files)
        content = bytes(range(256)) * 1000
        await fleet.submit(content=content)
        peer = await fleet.agent("one")
        assign = await peer.wait_for(messages.Assign)
        frame = await peer.wait_for(Frame)
        assert transfer_parts(frame.transfer) == (assign.attempt_id, Stream.INPUT)
        assert frame.data == content
        assert len(failures) == 2
