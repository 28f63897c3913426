"""HTTP clients that stop in the middle: of an upload, of a download."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from pathlib import Path

import psutil

from tests.harness import Server, curl, eventually, running_server

_MIB = 1024 * 1024


async def _open(server: Server, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.setblocking(False)
    port = int(server.url.rpartition(":")[2])
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", port))
    return client


def _start_of_an_upload(size: int) -> bytes:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="run.sh"\r\n\r\n'
    head = (
        "POST /upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    return head.encode() + body + bytes(size)


async def _read_all(client: socket.socket) -> bytes:
    """Read until the server closes."""
    received = b""
    while data := await asyncio.get_running_loop().sock_recv(client, _MIB):
        received += data
    return received


async def test_an_upload_that_stalls_is_ended_and_leaves_nothing_a_slow_one_is_not(
    tmp_path: Path,
) -> None:
    loop = asyncio.get_running_loop()
    environment = {"UPLOAD_IDLE": "1"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        stalled, slow = await _open(server), await _open(server)
        await loop.sock_sendall(stalled, _start_of_an_upload(3 * _MIB))
        await loop.sock_sendall(slow, _start_of_an_upload(1))
        ended = asyncio.create_task(loop.sock_recv(stalled, _MIB))
        while not ended.done():
            await asyncio.sleep(0.2)  # a client that is slow, but not stalled
            await loop.sock_sendall(slow, b"x")
        answer = await ended
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'{"id": 0, "status": "Unknown", "message": "nothing came for 1 s"}' in answer
        await loop.sock_sendall(slow, b"x")
        await eventually(
            lambda: server.query("SELECT count(*) FROM blob") == [(0,)], "its bytes are erased"
        )
        assert server.log().count("status=408") == 1
        stalled.close()
        slow.close()


async def test_readers_that_stall_grow_no_memory_hold_up_no_one_and_lose_no_byte(
    server: Server,
) -> None:
    loop = asyncio.get_running_loop()
    job_id = await server.upload("head -c 20000000 /dev/urandom > noise")
    await server.wait(job_id, "Completed")
    process = psutil.Process(server.pid)
    whole = hashlib.sha256((await server.download(job_id)).body)
    before = process.memory_info().rss
    stalled = [await _open(server, receive_buffer=65536) for _ in range(8)]
    request = f"GET /download/{job_id} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for client in stalled:
        await loop.sock_sendall(client, request.encode())
    for _ in range(2):
        assert (await curl(f"{server.url}/health")).status == 200
        await server.result(await server.upload("true"))
        assert hashlib.sha256((await server.download(job_id)).body).digest() == whole.digest()
    assert process.memory_info().rss - before < 24 * _MIB
    answer = await _read_all(stalled[0])
    assert hashlib.sha256(answer.partition(b"\r\n\r\n")[2]).digest() == whole.digest()
    for client in stalled:
        client.close()
