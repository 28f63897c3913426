"""How log lines look, and which requests get one."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from telemetry.logs import JsonFormatter, TextFormatter, event, make_event
from tests.harness import AgentProcess, curl, eventually, running_server


def record(message: str, *arguments: object) -> logging.LogRecord:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failure = sys.exc_info()
    return logging.LogRecord("orchestrator.x", logging.INFO, "", 0, message, arguments, failure)


def test_json_has_the_fields_of_the_event_with_their_types() -> None:
    told = record("of a library")
    make_event(told, "a", job=7, name="x\ny", error="a b", code="none", ms=1.25)
    line = JsonFormatter().format(told)
    assert "\n" not in line
    fields = json.loads(line)
    assert fields.pop("exception").endswith("ValueError: two\nlines")
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "INFO",
        "logger": "orchestrator.x",
        "event": "a",
        "job": 7,
        "name": "x\ny",
        "error": "a b",
        "code": "none",
        "ms": 1.25,
    }


@pytest.mark.parametrize(
    ("message", "arguments"),
    [("free text of %s", ("a\nlibrary",)), ("a=b %s", ("c",)), ("event=x 100 %% of %d", (3,))],
)
def test_what_is_not_an_event_becomes_a_message_on_one_line(
    message: str, arguments: tuple[object, ...]
) -> None:
    expected = message % arguments
    assert json.loads(JsonFormatter().format(record(message, *arguments)))["message"] == expected
    line = TextFormatter().format(record(message, *arguments))
    assert "\n" not in line
    assert line.startswith("time=2")
    assert "two\\nlines" in line


def _logged(**fields: Any) -> logging.LogRecord:
    """Return the record that an event makes."""
    log = logging.getLogger("orchestrator.test")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    log.addHandler(handler)
    try:
        event(log, "assigned", level=logging.WARNING, **fields)
    finally:
        log.removeHandler(handler)
    return records[0]


def test_an_event_is_one_line_whatever_its_fields_hold() -> None:
    hostile = "a\nb\x85c\u2028d\x1b[31m e='f'"
    made = _logged(job=7, seconds=0.125, agent="gpu-1", name=hostile, code=None)
    line = TextFormatter().format(made)
    assert line.isprintable()
    assert " event=assigned job=7 seconds=0.125 agent=gpu-1 name=" in line
    assert line.endswith(f"name={hostile!r} code=None")
    fields = json.loads(JsonFormatter().format(made))
    assert (fields["job"], fields["name"], fields["code"]) == (7, hostile, None)
    assert (fields["event"], fields["level"]) == ("assigned", "WARNING")


def test_what_libraries_log_is_one_printable_line() -> None:
    hostile = "a\r\nb\x85c\u2028d\x1b[31m\x9b2J"
    made = logging.LogRecord("library", logging.INFO, "", 0, "said %s", (hostile,), None)
    line = TextFormatter().format(made)
    assert line.isprintable()
    assert r"said a\r\nb\x85c\u2028d\x1b[31m\x9b2J" in line


async def test_every_line_of_server_and_agents_is_json_if_asked_for(tmp_path: Path) -> None:
    async with running_server(
        tmp_path / "server", "--slots", "1", "--log-format", "json"
    ) as server:
        agent = AgentProcess(server, "other")
        await agent.start("--log-format", "json", "--services", "none")
        await eventually(lambda: '"event": "connected"' in agent.log(), "it is connected")
        await server.result(await server.upload("true"))
        await curl(f"{server.url}/nothing?token=secret")
        await agent.kill()
        await server.stop()
        told = [json.loads(line) for line in (server.log() + agent.log()).splitlines()]
    loggers = {line["logger"] for line in told if "event" in line}
    assert loggers >= {"orchestrator.dispatch", "orchestrator.agent", "orchestrator.access"}
    requests = [line for line in told if line.get("event") == "request"]
    notable = [(line["method"], line["path"], line["status"]) for line in requests]
    # the polls that succeeded are not there
    assert ("POST", "/upload", 201) in notable
    assert ("GET", "/nothing", 404) in notable
    assert not any("/download" in path for _, path, _ in notable)
    assert "secret" not in server.log()


async def test_the_access_log_has_all_requests_or_none(tmp_path: Path) -> None:
    environment = {"ACCESS_LOG": "all"}
    async with running_server(tmp_path / "all", "--no-agent", environment=environment) as server:
        await curl(f"{server.url}/health")
        await eventually(lambda: "method=GET path='/health' status=200" in server.log(), "a line")
    async with running_server(tmp_path / "none", "--no-agent", "--no-access-log") as server:
        await curl(f"{server.url}/nothing")
        await server.upload("true")
        assert await server.stop() == 0
        assert "event=uploaded" in server.log()
        assert "event=request" not in server.log()


async def test_what_is_not_http_is_told_in_one_line(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(server.url.rpartition(":")[2])
        )
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n")
        assert b"400 Bad Request" in await reader.read(100)
        writer.close()
        await eventually(lambda: "event=malformed_request" in server.log(), "it is told")
        assert "Traceback" not in server.log() and "level=ERROR" not in server.log()
