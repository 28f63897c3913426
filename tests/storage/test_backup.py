"""Backup of a database in use, and the check that finds damage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from config import AGENT_TOKEN_VARIABLE
from tests.harness import PROJECT, AgentProcess, Server, run, running_server


async def orchestrator(*arguments: str | Path) -> tuple[int, str]:
    program = str(PROJECT / "orchestrator.py")
    code, output = await run(sys.executable, program, *map(str, arguments))
    return code, output.decode()


async def test_a_backup_of_a_busy_server_is_whole_and_can_be_served(
    server: Server, tmp_path: Path
) -> None:
    content = os.urandom(5_000_000)
    job_id = await server.upload("cat data > copy", {"data": content})
    await server.result(job_id)
    target = tmp_path / "backup.db"

    async def keep_busy() -> None:
        while True:
            await server.upload("true")

    busy = asyncio.create_task(keep_busy())
    code, output = await orchestrator("backup", target, "--db", server.database)
    busy.cancel()
    assert (code, "whole and checked" in output) == (0, True), output
    code, output = await orchestrator("check", target)
    assert (code, "0 problems" in output) == (0, True), output
    async with running_server(tmp_path / "restored", "--db", str(target)) as restored:
        restored.database = target
        assert (await restored.result(job_id)).read("copy") == content


async def test_a_backup_is_its_owners_alone_and_makes_nobody_an_agent(
    bare_server: Server, tmp_path: Path
) -> None:
    ((token,),) = bare_server.query("SELECT value FROM setting WHERE name = 'agent_token'")
    target = tmp_path / "backup.db"
    (tmp_path / "backup.db.unfinished").write_text("left by one that was killed")
    previous = os.umask(0)
    try:
        code, output = await orchestrator("backup", target, "--db", bare_server.database)
    finally:
        os.umask(previous)
    assert code == 0, output
    assert target.stat().st_mode & 0o777 == 0o600
    assert token.encode() not in target.read_bytes()
    assert sorted(path.name for path in tmp_path.glob("backup.db*")) == ["backup.db"]
    code, output = await orchestrator("agent-token", "--db", target)
    assert (code, "there is no agent token in it" in output) == (2, True)
    code, output = await orchestrator("check", target)
    assert code == 0, output
    async with running_server(tmp_path / "restored", "--db", str(target), "--no-agent") as restored:
        restored.database = target
        agent = AgentProcess(restored, "old")
        await agent.start(environment={AGENT_TOKEN_VARIABLE: token})
        try:
            await agent.wait_connected()
            await restored.result(await restored.upload("true"))
        finally:
            await agent.kill()


async def test_a_backup_overwrites_nothing_and_needs_a_database(
    bare_server: Server, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    code, output = await orchestrator("backup", precious, "--db", bare_server.database)
    assert (code, "already exists" in output) == (2, True)
    assert precious.read_text() == "mine"
    code, output = await orchestrator("backup", tmp_path / "new", "--db", tmp_path / "none")
    assert (code, "no such file" in output) == (2, True)
    assert not (tmp_path / "new").exists()
    with contextlib.closing(sqlite3.connect(tmp_path / "foreign")) as foreign:
        foreign.execute("CREATE TABLE mine (x)")
    code, output = await orchestrator("backup", tmp_path / "new", "--db", tmp_path / "foreign")
    assert (code, "foreign: not a database of Orchestrator" in output) == (2, True)
    assert not (tmp_path / "new").exists()
    code, output = await orchestrator("backup", tmp_path / "no" / "x", "--db", bare_server.database)
    assert (code, "/no/x: its directory is not there" in output) == (2, True)


DAMAGE = {
    "bytes": ("UPDATE chunk SET data = zeroblob(length(data))", "has other bytes"),
    "length": ("DELETE FROM chunk", "has other bytes"),
    "state": ("UPDATE job SET state = 'Running'", "history ends with Completed"),
    "history": (
        "INSERT INTO history (job_id, attempt, at, from_state, to_state, reason)"
        " VALUES (1, 1, 0, 'Completed', 'Running', '')",
        "which can't be",
    ),
    "result": ("UPDATE attempt SET result_blob = NULL", "has no result"),
    "reference": ("DELETE FROM agent", "missing agent"),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_the_check_finds_damage(server: Server, kind: str) -> None:
    await server.result(await server.upload("true"))
    code, output = await orchestrator("check", server.database)
    assert code == 0, output
    await server.stop()
    sql, words = DAMAGE[kind]
    with contextlib.closing(sqlite3.connect(server.database, isolation_level=None)) as db:
        db.execute(sql)
    code, output = await orchestrator("check", server.database)
    assert (code, words in output) == (1, True), output


async def test_the_check_says_what_is_no_database(tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("text\n" * 1000)
    code, output = await orchestrator("check", other)
    assert (code, f"{other}: " in output) == (2, True)
    assert "Traceback" not in output
