"""The demonstration: a throw-away server, the example job, its result."""

from __future__ import annotations

import asyncio
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import aiohttp

import runtime

_READY = re.compile(r"ready at (http://\S+)")
_START_SECONDS = 30.0
_JOB_SECONDS = 60.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.05
_ARCHIVE = Path("orchestrator-demo.zip")
_TABLE = "table.txt"


class DemoFailed(Exception):
    """The demonstration did not work; the message says where."""


def run() -> int:
    """Show the whole path once; returns 0, or 1 after saying what failed."""
    try:
        asyncio.run(_demonstrate())
    except (DemoFailed, aiohttp.ClientError, OSError, TimeoutError) as error:
        sys.stderr.write(f"orchestrator demo: failed: {error!r}\n")
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
            async with aiohttp.ClientSession(url) as session:
                job_id = await _submit(session)
                await asyncio.wait_for(_wait(session, job_id), _JOB_SECONDS)
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


async def _submit(session: aiohttp.ClientSession) -> int:
    files = sorted(path for path in runtime.data_file("examples").iterdir() if path.is_file())
    form = aiohttp.FormData()
    for path in files:
        form.add_field("file", path.read_bytes(), filename=path.name)
    form.add_field("user_id", "1")
    form.add_field("service", "example")
    async with session.post("/upload", data=form) as response:
        answer = await response.json()
    if response.status != 201:
        raise DemoFailed(f"upload: {answer['message']}")
    _say(f"uploaded  {', '.join(path.name for path in files)} as job {answer['id']}")
    return int(answer["id"])


async def _wait(session: aiohttp.ClientSession, job_id: int) -> None:
    shown = ""
    while True:
        async with session.get(f"/download/{job_id}") as response:
            if response.content_type == "application/zip":
                _ARCHIVE.write_bytes(await response.read())
                _say("state     Completed")
                return
            answer = await response.json()
        if answer["status"] != shown:
            shown = answer["status"]
            _say(f"state     {shown}")
        if shown in ("Failed", "Invalid", "Killed", "Unknown"):
            raise DemoFailed(f"the job became {shown}: {answer['message']}")
        await asyncio.sleep(_POLL_SECONDS)


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
