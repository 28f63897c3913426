"""Strangers on the agent channel: random and mutated frames, wrong order, giant lengths.

The seed is printed with a failure; FAULT_SEED=N repeats the same frames.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import aiohttp
import psutil
import pytest

from jobs import JobState
from tests.harness import AgentProcess, Server, curl, eventually, lines
from wire import codec, messages
from wire.frames import CHUNK_BYTES, encode_frame

NewAgent = Callable[[str], AgentProcess]

_CONNECTIONS = 150
_HONEST_WAY = ("Queued", "Processing", "Submitted", "Running", "Completed")
_INTEGERS = (-1, 0, 1, 2, 7, 255, 2**31, 2**63 - 1, 2**63, 2**64, 10**40)
_VALUES: tuple[object, ...] = (
    *_INTEGERS,
    None,
    True,
    "",
    "x" * 300,
    "\x00",
    "é",
    [],
    {},
    [[]],
    1.5,
    float("inf"),
)


class Stranger:
    """Makes up what a broken or hostile agent might send."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known_id: str | None = None  # of an agent that is not this one

    def hello(self) -> str:
        name = f"fuzz{self.random.randrange(5)}"
        slots = self.random.randrange(4)
        hello = messages.Hello(
            messages.PROTOCOL_VERSION, name, str(self.random.random()), name, "0", slots, None, ()
        )
        if self.known_id is not None and self.random.random() < 0.2:
            hello = dataclasses.replace(hello, agent_id=self.known_id)
        if self.random.random() < 0.5:
            held = messages.HeldAttempt(
                self._small(), self._small(), self._phase(), self.random.choice((0, 1, 2**40))
            )
            hello = dataclasses.replace(hello, attempts=(held,) * self.random.randrange(3))
        return codec.encode(hello)

    def frames(self) -> list[str | bytes]:
        return [self._frame() for _ in range(self.random.randrange(1, 12))]

    def _frame(self) -> str | bytes:
        make = self.random.choice(
            (self._message, self._message, self._mutated, self._mutated, self._binary, self._noise)
        )
        return make()

    def _small(self) -> int:
        return self.random.randrange(1, 30)

    def _phase(self) -> messages.AttemptPhase:
        return self.random.choice(list(messages.AttemptPhase))

    def _message(self) -> str:
        """A well-formed message, mostly of the wrong time or about the wrong attempt."""
        finished = messages.Finished(
            self._small(),
            self.random.choice(list(JobState)),
            self.random.choice((None, 0, 1)),
            "made up",
            self.random.choice((-1, 0, 1, 2**20, 2**62)),
            "0" * 64,
        )
        made: list[messages.Message] = [
            finished,
            messages.Accepted(self._small()),
            messages.Started(self._small()),
            messages.Rejected(self._small(), "no"),
            messages.Lost(self._small(), "lost"),
            messages.Heartbeat(),
            messages.Drain(),
            messages.Stored(self._small()),
            messages.Acknowledge(self._small() << 3, self.random.choice(_INTEGERS[:8])),
        ]
        return codec.encode(self.random.choice(made))

    def _mutated(self) -> str:
        text = self._message()
        position = self.random.randrange(len(text))
        if self.random.random() < 0.5:
            return text[:position] + chr(self.random.randrange(1, 0x2FF)) + text[position + 1 :]
        name = self.random.choice(("attempt_id", "state", "type"))
        value = json.dumps(self.random.choice(_VALUES))
        return text.replace(f'"{name}":', f'"{name}":{value},"was":', 1)

    def _binary(self) -> bytes:
        stream = self.random.randrange(8)
        offset = self.random.choice((0, 1, CHUNK_BYTES, 2**63))
        size = self.random.choice((0, 1, 100, CHUNK_BYTES, CHUNK_BYTES + 1))
        return encode_frame(self._small() << 3 | stream, offset, bytes(size))

    def _noise(self) -> str | bytes:
        data = self.random.randbytes(self.random.choice((0, 1, 16, 17, 5000)))
        return data if self.random.random() < 0.5 else data.hex()


async def _visit(session: aiohttp.ClientSession, url: str, frames: list[str | bytes]) -> None:
    """Say all of it, then wait for the end that the server or we ourselves bring about."""
    async with session.ws_connect(f"{url}/agent") as peer:
        with contextlib.suppress(ConnectionError):
            for frame in frames:
                await (peer.send_str(frame) if isinstance(frame, str) else peer.send_bytes(frame))
        await peer.send_str("}")  # what the server can't but answer with a good-bye
        while not peer.closed:
            message = await peer.receive(timeout=20)
            if message.type is aiohttp.WSMsgType.CLOSE:
                assert message.data in (1001, 1002, 1008, 1009), message
                assert message.extra, "the server says why"


@pytest.mark.lease(3)
async def test_no_frame_ends_the_server_touches_jobs_of_others_or_leaves_anything_behind(
    bare_server: Server, new_agent: NewAgent, tmp_path: Path
) -> None:
    seed = int(os.environ.get("FAULT_SEED") or random.randrange(2**32))
    stranger = Stranger(seed)
    data = {"data": b"x" * 600_000}
    witness, go = tmp_path / "witness", tmp_path / "go"
    script = f"echo $ORCHESTRATOR_JOB_ID >> {witness}; while [ ! -e {go} ]; do sleep 0.05; done"
    script += "; echo $ORCHESTRATOR_JOB_ID > out"
    victim = new_agent("victim")
    await victim.start("--slots", "4")
    honest = [await bare_server.upload(script, user=10 + number) for number in range(4)]
    for job_id in honest:
        await bare_server.wait(job_id, "Running")
    seen = (await curl(f"{bare_server.url}/agents")).json()["agents"]
    stranger.known_id = seen[0]["id"]
    jobs = [await bare_server.upload("echo done > out", data, user=user) for user in range(3)]
    try:
        async with aiohttp.ClientSession(headers=bare_server.agent_headers()) as session:
            for number in range(_CONNECTIONS):
                first = [stranger.hello()] if number % 10 else []
                with contextlib.suppress(ConnectionError):
                    await _visit(session, bare_server.url, [*first, *stranger.frames()])
        assert (await curl(f"{bare_server.url}/health")).status == 200
        log = bare_server.log()
        for sign_of_a_defect in ("Traceback", "internal_error", "session_failed"):
            assert sign_of_a_defect not in log, log[log.index(sign_of_a_defect) - 500 :][:3000]
        process = psutil.Process(bare_server.pid)
        await eventually(
            lambda: len([c for c in process.net_connections() if c.status == "ESTABLISHED"]) <= 1,
            "all connections but the honest agent's are closed",
        )
        go.touch()
        for job_id in honest:
            assert (await bare_server.result(job_id)).read("out") == f"{job_id}\n".encode()
            assert bare_server.transitions(job_id) == list(_HONEST_WAY)
        assert sorted(lines(witness)) == sorted(map(str, honest)), "each was started once"
        agent = new_agent("honest")
        await agent.start()
        job_id = await bare_server.upload("echo honest > out", user=9)
        assert (await bare_server.result(job_id)).read("out") == b"honest\n"
        for other in jobs:  # killed, failed or given back by what strangers said, never stuck
            await bare_server.wait(other, seconds=40)
        blobs = "SELECT count(*) FROM blob WHERE state != 'sealed'"
        await eventually(lambda: bare_server.query(blobs) == [(0,)], "no bytes of strangers stay")
        await bare_server.stop()
        await bare_server.check()
    except BaseException as error:
        error.add_note(f"FAULT_SEED={seed}")
        raise


async def test_a_giant_frame_is_refused_with_a_reason_and_costs_bounded_memory(
    bare_server: Server,
) -> None:
    process = psutil.Process(bare_server.pid)
    before = process.memory_info().rss
    giant = "x" * (codec.MAX_TEXT_BYTES + 1)
    async with aiohttp.ClientSession(headers=bare_server.agent_headers()) as session:
        for _ in range(3):
            async with session.ws_connect(f"{bare_server.url}/agent") as peer:
                await peer.send_str(Stranger(1).hello())
                with contextlib.suppress(ConnectionError):
                    await peer.send_str(giant)
                message = await peer.receive(timeout=20)
                while message.type is aiohttp.WSMsgType.TEXT:
                    message = await peer.receive(timeout=20)
                assert message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)
    assert process.memory_info().rss - before < 3 * codec.MAX_TEXT_BYTES
    assert (await curl(f"{bare_server.url}/health")).status == 200
