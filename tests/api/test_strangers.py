"""Who is no agent and no user: what a server shows to all who come through a proxy beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.api.test_api import assert_error
from tests.harness import PROJECT, Server, curl, eventually, run, running_server
from wire import codec, messages

_NGINX = """
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
worker_processes 1;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass {url};
            proxy_http_version 1.1;
            proxy_set_header Host localhost;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def nginx_before(server: Server) -> AsyncIterator[str]:
    """A real proxy on this machine; yields its address."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.access(program, os.X_OK):
        pytest.skip("nginx is not installed")
    directory = server.directory / "nginx"
    directory.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    text = _NGINX.format(directory=directory, port=port, url=server.url)
    (directory / "nginx.conf").write_text(text)
    process = await asyncio.create_subprocess_exec(
        program, "-c", str(directory / "nginx.conf"), "-p", str(directory)
    )
    try:
        with contextlib.closing(socket.socket()) as client:
            await eventually(lambda: client.connect_ex(("127.0.0.1", port)) == 0, "nginx listens")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


def _hello() -> str:
    return codec.encode(
        messages.Hello(
            protocol=messages.PROTOCOL_VERSION,
            agent_id="f" * 32,
            instance="e" * 16,
            name="stranger",
            version="1",
            slots=4,
            services=None,
            attempts=(),
        )
    )


async def test_behind_a_proxy_on_this_machine_a_stranger_is_no_agent(bare_server: Server) -> None:
    server = bare_server
    job_id = await server.upload("true")
    async with nginx_before(server) as proxy:
        assert (await curl(f"{proxy}/health")).status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
            async with aiohttp.ClientSession(headers=headers) as session:
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await session.ws_connect(f"{proxy}/agent")
                assert refused.value.status == 401
        assert_error(await curl(f"{proxy}/agent"), 401, "agent token")
        # an agent with the token gets through, so it was not the proxy that refused
        async with (
            aiohttp.ClientSession(headers=server.agent_headers()) as session,
            session.ws_connect(f"{proxy}/agent") as friend,
        ):
            await friend.send_str(_hello())
            assert isinstance(codec.decode(await friend.receive_str()), messages.Welcome)
            assign = codec.decode(await friend.receive_str())
            assert isinstance(assign, messages.Assign)
            assert assign.job_id == job_id


def _environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


async def test_what_the_server_was_told_is_not_in_proc_and_not_handed_on(tmp_path: Path) -> None:
    token = "token-from-the-environment"
    environment = {"ORCHESTRATOR_AGENT_TOKEN": token, "OTHER_SECRET": "the-password"}
    async with running_server(
        tmp_path / "server", "--slots", "1", environment=environment
    ) as server:
        assert b"ORCHESTRATOR_AGENT_TOKEN=xxxxx" in _environment_of(server.pid)
        agent = await server.agent_pid()
        archive = await server.result(await server.upload("env; cat /proc/$PPID/environ > parent"))
        for shown in (
            _environment_of(server.pid),
            _environment_of(agent),
            archive.read("stdout.log"),
            archive.read("parent"),
        ):
            assert token.encode() not in shown
        assert b"the-password" not in _environment_of(agent)
        assert b"PATH=" in _environment_of(agent)
        code, output = await run(
            *(sys.executable, str(PROJECT / "orchestrator.py"), "agent-token"),
            *("--db", str(server.database)),
        )
        assert code == 0
        assert token.encode() not in output  # that of the database; this one was not written down
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as session,
            session.ws_connect(f"{server.url}/agent") as peer,
        ):
            await peer.send_str(_hello())
            assert isinstance(codec.decode(await peer.receive_str()), messages.Welcome)
