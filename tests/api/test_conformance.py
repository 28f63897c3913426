"""openapi.yaml against the running server: no answer that it does not describe, no 5xx."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Server, curl, run, running_server

_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
# a WebSocket, and streams that do not end
_NOT_ASKED = ("/agent", "/events")
_SEED = os.environ.get("FAULT_SEED", "1")


@pytest.fixture
async def lived_in(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with a job of each kind: 1 completed, others failed and killed."""
    async with running_server(tmp_path / "server", "--slots", "2") as server:
        await server.wait(await server.upload("echo out; echo err >&2; mkdir a; echo b > a/b"))
        await server.wait(await server.upload("exit 3"))
        long = await server.upload("echo up; sleep 1000")
        await server.wait(long, "Running")
        assert (await curl("-X", "POST", f"{server.url}/terminate/{long}")).status == 200
        yield server


@pytest.mark.parametrize("job_id", [1, None])
async def test_the_server_answers_as_its_description_says(
    lived_in: Server, tmp_path: Path, job_id: int | None
) -> None:
    parameters = "" if job_id is None else f'[parameters]\n"path.id" = {job_id}\n'
    (tmp_path / "schemathesis.toml").write_text(parameters)
    excluded = [part for path in _NOT_ASKED for part in ("--exclude-path", path)]
    # the first request is not even HTTP: the tool's probe of a header with a zero byte
    code, output = await run(
        sys.executable,
        *("-m", "schemathesis.cli", "run", str(PROJECT / "openapi.yaml"), "--url", lived_in.url),
        *("--checks", ",".join(_CHECKS), *excluded, "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "6", "--seed", _SEED, "--request-timeout", "20"),
        cwd=tmp_path,
    )
    assert code == 0, output.decode()[-6000:]
    log = lived_in.log()
    assert "level=ERROR" not in log and "Traceback" not in log, log[-3000:]
