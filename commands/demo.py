"""The demonstration: a throw-away server, the example job, its result."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import runtime
from orchestrator_client import AsyncClient, OrchestratorError

_READY = re.compile(r"ready at (http://\S+)")
_START_SECONDS = 30.0
_JOB_SECONDS = 60.0
_STOP_SECONDS = 10.0
_ARCHIVE = Path("orchestrator-demo.zip")
_TABLE = "table.txt"


class DemoFailed(Exception):
    """The demonstration did not work; the message says where."""


def run() -> int:
    """Show the whole path once; returns 0, or 1 after saying what failed."""
    try:
        asyncio.run(_demonstrate())
    except (DemoFailed, OrchestratorError, OSError, TimeoutError) as error:
        sys.stderr.write(f"orchestrator demo: failed: {error}\n")
        return 1
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def _demonstrate() -> None:
    with tempfile.TemporaryDirectory(prefix="orchestrator-demo-") as directory:
        log_path = Path(directory) / "server.log"
        with open(log_path, "wb") as server_log:
            process = await asyncio.create_subprocess_exec(
                *runtime.program("serve", "--host", "127.0.0.1", "--port", "0"),
                *("--db", str(Path(directory) / "demo.db")),
                stdout=asyncio.subprocess.PIPE,
                stderr=server_log,
            )
        try:
            url = await asyncio.wait_for(_ready_url(process, log_path), _START_SECONDS)
            _say(f"server    {url}")
            await _run_example(url)
        finally:
            await _stop(process)
    _show_result()


async def _ready_url(process: asyncio.subprocess.Process, log_path: Path) -> str:
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    match = _READY.search(line)
    if match is None:
        raise DemoFailed(f"the server did not start: {log_path.read_text()[-500:]}")
    return match[1]


async def _run_example(url: str) -> None:
    files = sorted(path for path in runtime.data_file("examples").iterdir() if path.is_file())
    async with AsyncClient(url, user_id=1) as client:
        job = await client.submit("example", files)
        _say(f"uploaded  {', '.join(path.name for path in files)} as job {job.id}")
        await job.wait(_JOB_SECONDS)
        for line in await job.history():
            _say(f"state     {line['status']}")
        await job.download(_ARCHIVE)


def _show_result() -> None:
    with zipfile.ZipFile(_ARCHIVE) as archive:
        _say(f"saved     {_ARCHIVE}:")
        for member in archive.infolist():
            _say(f"          {member.file_size:>8}  {member.filename}")
        if _TABLE not in archive.namelist():
            raise DemoFailed(f"there is no {_TABLE} in the result")
        _say(archive.read(_TABLE).decode())


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        code = await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise DemoFailed("the server did not stop in time") from None
    if code != 0:
        raise DemoFailed(f"the server ended with exit code {code}")
