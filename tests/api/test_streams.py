"""Streams of events: nothing missed, nothing twice, no one waits for a slow reader."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient

import config
from api import application as api
from api import events as api_events
from dispatch import Dispatcher
from events import Transition
from jobs import JobState
from storage import history as history_of_storage
from store import READERS, Store
from tests.api.in_process import ApiServer
from tests.api.test_api import assert_error
from tests.harness import AgentProcess, Server, curl, eventually, running_server
from tests.storage.steps import make_job, opened


@dataclass(frozen=True)
class Told:
    """One event as a client gets it."""

    id: str
    kind: str
    data: dict[str, Any]


def parse(text: str) -> Iterator[Told]:
    """Read events as the HTML standard says; blocks without data only move the last id."""
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        fields = dict(line.split(": ", 1) for line in lines)
        if "data" in fields:
            yield Told(fields["id"], fields["event"], json.loads(fields["data"]))


async def test_a_stream_of_one_job_tells_all_of_it_and_ends(server: Server) -> None:
    assert_error(await curl(f"{server.url}/jobs/1/events"), 404, "no job 1")
    for text in ("1", "x-1", "-1-1", "1-1-1", "9" * 30 + "-1"):
        answer = await curl(f"{server.url}/events?last_event_id={text}")
        assert_error(answer, 400, "^Last-Event-ID")
    job_id = await server.upload("true")
    url = f"{server.url}/jobs/{job_id}/events"
    answer = await curl("-N", url)
    told = list(parse(answer.body.decode()))
    history = (await curl(f"{server.url}/jobs/{job_id}/history")).json()["history"]
    assert [event.data for event in told] == history
    assert {event.kind for event in told} == {"job"}
    rest = await curl("-N", "-H", f"Last-Event-ID: {told[2].id}", url)
    assert list(parse(rest.body.decode())) == told[3:]
    assert (await curl("-N", f"{url}?last_event_id={told[2].id}")).body == rest.body
    assert (await curl("-H", f"Last-Event-ID: {told[-1].id}", url)).status == 204
    # ids of a database that was put back
    assert (await curl(f"{url}?last_event_id=999-999")).status == 204
    assert (await curl("-I", url)).status == 200


async def _take_some(
    url: str, last_id: str, limit: int, told: list[Told], session: aiohttp.ClientSession
) -> str:
    """Listen until there were ``limit`` events, a moment passed or the server is gone."""
    text = ""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError):
        async with asyncio.timeout(0.4):
            headers = {"Last-Event-ID": last_id} if last_id else {}
            async with session.get(url, headers=headers) as response:
                async for line in response.content:
                    text += line.decode()
                    if line == b"\n" and len(list(parse(text))) == limit:
                        break
    events = list(parse(text))
    told += events
    return events[-1].id if events else last_id


async def test_who_comes_back_misses_nothing_and_hears_nothing_twice(server: Server) -> None:
    chance = random.Random(1)
    told: list[Told] = []
    last_id = "0-0"

    async def jobs() -> None:
        for number in range(8):
            await server.upload("true")
            if number == 4:
                await server.kill()
                await server.start("--slots", "4")

    working = asyncio.create_task(jobs())
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while [event.data["status"] for event in told].count("Completed") < 8:
            last_id = await _take_some(
                f"{server.url}/events", last_id, chance.randint(1, 12), told, session
            )
        await working
    expected = server.query("SELECT job_id, attempt, to_state, reason FROM history ORDER BY id")
    jobs_told = [event.data for event in told if event.kind == "job"]
    assert [(e["id"], e["attempt"], e["status"], e["message"]) for e in jobs_told] == expected
    agents_told = [event.data for event in told if event.kind == "agent"]
    expected = server.query("SELECT agent_id, name, kind FROM agent_history ORDER BY id")
    assert [(e["id"], e["name"], e["status"]) for e in agents_told] == expected
    assert expected[0][1:] == ("local", "connected")


async def test_changes_of_agents_are_told(tmp_path: Path) -> None:
    async with running_server(
        tmp_path / "server", "--no-agent", environment={"LEASE": "1"}
    ) as server:
        agent = AgentProcess(server, "one")
        await agent.start()
        job_id = await server.upload("exec sleep 60")
        await server.wait(job_id, "Running")
        stream = asyncio.create_task(curl("-N", f"{server.url}/events?last_event_id=0-0"))
        agent.send(signal.SIGTERM)  # it drains: its job runs on
        await eventually(lambda: "event=agent_drains" in server.log(), "it drains")
        await agent.kill()
        await server.wait(job_id, "Queued")
        # a proper end of the stream
        assert await asyncio.wait_for(server.stop(), 60) == 0
        told = list(parse((await stream).body.decode()))
        changes = [event.data["status"] for event in told if event.kind == "agent"]
        assert changes == ["connected", "draining", "disconnected", "lost"]


# --- within one process -----------------------------------------------------------


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with opened(tmp_path / "orchestrator.db") as store:
        yield store


@contextlib.asynccontextmanager
async def streaming(store: Store) -> AsyncIterator[TestClient[Any, Any]]:
    """An API in this process, on a store that the test feeds."""
    settings = config.SettingsInForce(config.Settings())
    application = api.make_application(store, Dispatcher(store, settings), settings, frozenset())
    async with TestClient(ApiServer(application)) as client:
        yield client


async def test_a_filter_lets_through_only_what_is_asked_for(store: Store) -> None:
    await store.agents.record_connection("agent-1", "one")
    async with streaming(store) as client:
        response = await client.get("/events?user_id=2&service=example")
        await response.content.readuntil(b"\n\n")
        await make_job(store, user_id=1)
        mine = await make_job(store, user_id=2)
        await store.agents.record_connection("agent-2", "two")
        told = list(parse((await response.content.readuntil(b"}\n\n")).decode()))
        assert [event.data["id"] for event in told] == [mine.id]
        # the position is past what was not wanted
        assert told[0].id == "2-1"
        response.close()
        await eventually(lambda: not store.feed._of_all, "the stream ends with its client")


async def test_a_quiet_stream_shows_that_it_lives(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_events, "_HEARTBEAT_SECONDS", 0.05)
    await store.agents.record_connection("agent-1", "one")
    async with streaming(store) as client:
        response = await client.get("/events")
        assert await response.content.readuntil(b"\n\n") == b"id: 0-1\n\n"
        assert await response.content.readuntil(b"\n\n") == b": heartbeat\nid: 0-1\n\n"
        response.close()


def _flood(store: Store, first: int, count: int) -> None:
    """Publish large events, as if they were committed."""
    reason = "x" * 10_000
    store.feed.publish(
        [
            Transition(number, 1, 1, "example", 0, 0.0, None, JobState.QUEUED, reason)
            for number in range(first, first + count)
        ]
    )


async def test_a_reader_that_does_not_read_is_dropped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_events, "_WRITE_SECONDS", 0.2)
    async with streaming(store) as client:
        assert client.port is not None
        _, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1)
        writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await eventually(lambda: bool(store.feed._of_all), "it listens")
        for number in range(1000):
            _flood(store, 1 + number, 1)
            await asyncio.sleep(0)
            if not store.feed._of_all:
                break
        await eventually(lambda: not store.feed._of_all, "it is dropped")
        writer.close()


async def test_a_reader_that_is_too_far_behind_is_dropped(store: Store) -> None:
    async with streaming(store) as client:
        response = await client.get("/events")
        await response.content.readuntil(b"\n\n")
        _flood(store, 1, api_events._EVENTS_BEHIND + 1)
        with pytest.raises(aiohttp.ClientError):
            while await response.content.read(1_000_000):
                pass
        assert not store.feed._of_all


async def test_a_replay_for_one_user_reads_what_is_theirs_and_leaves_a_reader_to_others(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_of_storage, "_EXAMINE_TRANSITIONS", 7)
    mine = await make_job(store, user_id=2)
    for _ in range(20):
        await make_job(store, user_id=1)
    last = await make_job(store, user_id=2)
    read: list[Transition] = []
    under_way = 0
    most = 0
    transitions_after = store.history.transitions_after

    async def watched(*arguments: Any) -> tuple[list[Transition], int]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            found, reached = await transitions_after(*arguments)
        finally:
            under_way -= 1
        read.extend(found)
        return found, reached

    monkeypatch.setattr(store.history, "transitions_after", watched)

    async def told(client: TestClient[Any, Any]) -> list[int]:
        response = await client.get("/events?user_id=2", headers={"Last-Event-ID": "0-0"})
        text = ""
        while f'"id": {last.id},' not in text:
            text += (await response.content.readuntil(b"\n\n")).decode()
        response.close()
        return [event.data["id"] for event in parse(text)]

    async with streaming(store) as client:
        answers = await asyncio.gather(*(told(client) for _ in range(6)))
    assert answers == [[mine.id, last.id]] * 6
    assert {event.user_id for event in read} == {2}
    assert most < READERS
