"""The public API of a real server, asked with curl: answers, refusals, limits."""

from __future__ import annotations

import asyncio
import io
import json
import re
import socket
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psutil
import pytest
import pytest_asyncio
import yaml
from aiohttp.test_utils import TestClient

import config
import runtime
from api import application as api
from dispatch import Dispatcher
from jobs import MAX_PATH_BYTES
from records import StoreFull
from store import Store, Upload
from tests.api.in_process import ApiServer
from tests.harness import Answer, Server, curl, eventually, running_server

LIMIT = config.MAX_UPLOAD_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "run.sh").write_text("cat -- * > all.txt\n")
    (folder / "input.pdb").write_text("ATOM\n")
    (folder / "empty").write_bytes(b"")
    return folder


@pytest.fixture
async def idle(tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent: what is uploaded stays queued."""
    async with running_server(tmp_path / "server", "--no-agent") as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def empty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server without an agent for all tests after which it must be as empty as before."""
    directory = tmp_path_factory.mktemp("empty")
    async with running_server(directory, "--no-agent") as server:
        yield server


def assert_error(answer: Answer, status: int, words: str) -> None:
    assert answer.status == status, answer
    body = answer.json()
    assert set(body) == {"id", "status", "message"}
    assert body["status"] == "Unknown"
    assert re.search(words, body["message"]), body


def nothing_stored(server: Server) -> bool:
    return server.query("SELECT (SELECT count(*) FROM job), (SELECT count(*) FROM blob)") == [
        (0, 0)
    ] and server.query("SELECT count(*) FROM chunk") == [(0,)]


async def test_the_simple_paths(empty: Server) -> None:
    health = await curl(f"{empty.url}/health")
    assert (health.status, health.json()["status"]) == (200, "healthy")
    ping = await curl(f"{empty.url}/")
    assert (ping.status, b"running" in ping.body) == (200, True)
    page = await curl(f"{empty.url}/swagger-ui/")
    assert b"swagger-ui-bundle.js" in page.body
    # nothing on the page comes from elsewhere: neither scripts nor the spec's validator
    assert not re.search(rb"(src|href)=.https?:", page.body)
    assert b'"validatorUrl": null' in page.body
    bundle = await curl(f"{empty.url}/swagger-ui/swagger_ui_static/swagger-ui-bundle.js")
    assert (bundle.status, len(bundle.body) > 100_000) == (200, True)
    assert (await curl(f"{empty.url}/swagger-ui/swagger.json")).json()["openapi"].startswith("3.")


async def test_what_is_not_there_is_answered_in_the_error_shape(empty: Server) -> None:
    assert_error(await curl(f"{empty.url}/nothing"), 404, "/nothing")
    for job_id in ("1", "abc", "-1", "9" * 30, "%00", "1.0"):
        assert_error(await curl(f"{empty.url}/download/{job_id}"), 404, "no job")
    assert_error(await curl("-X", "DELETE", f"{empty.url}/upload"), 405, "DELETE")
    assert_error(await curl("-X", "POST", f"{empty.url}/health"), 405, "POST")
    header = f"Authorization: Bearer {empty.agent_token()}"
    assert_error(await curl("-H", header, f"{empty.url}/agent"), 400, "WebSocket")


async def test_head_is_where_get_is(empty: Server) -> None:
    for path in ("/", "/health", "/jobs"):
        answer = await curl("-I", f"{empty.url}{path}")
        assert answer.status == 200
        assert b"x-content-type-options: nosniff" in answer.body.lower()
    assert (await curl("-I", f"{empty.url}/download/1")).status == 404


async def test_every_route_is_documented_and_every_documented_path_is_routed(
    empty: Server,
) -> None:
    document = yaml.safe_load(Path(runtime.data_file("openapi.yaml")).read_text())
    documented = {
        (method.upper(), path) for path, item in document["paths"].items() for method in item
    }
    settings = config.SettingsInForce(config.Settings())
    application = api.make_application(None, None, settings, frozenset())  # type: ignore[arg-type]
    routed = {
        (route.method, route.resource.canonical)
        for route in application.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    of_the_library = {
        ("GET", "/swagger-ui"),
        ("GET", "/swagger-ui/swagger.json"),
        ("GET", "/swagger-ui/swagger_ui_static"),
    }
    assert routed - of_the_library == documented


REFUSED = {
    "no file": (["-F", "user_id=1", "-F", "service=example"], "^file: missing"),
    "no run.sh": (["-F", "file=@input.pdb", "-F", "user_id=1", "-F", "service=example"], "run.sh"),
    "no user": (["-F", "file=@run.sh", "-F", "service=example"], "^user_id: missing"),
    "text user": (["-F", "file=@run.sh", "-F", "user_id=me", "-F", "service=example"], "^user_id"),
    "large user": (
        ["-F", "file=@run.sh", "-F", f"user_id={2**63}", "-F", "service=example"],
        "^user_id.*64",
    ),
    "small user": (
        ["-F", "file=@run.sh", "-F", f"user_id={-(2**63) - 1}", "-F", "service=example"],
        "^user_id.*64",
    ),
    "two users": (
        ["-F", "file=@run.sh", "-F", "user_id=1", "-F", "user_id=2", "-F", "service=example"],
        "^user_id.*more than once",
    ),
    "no service": (["-F", "file=@run.sh", "-F", "user_id=1"], "^service: missing"),
    "other service": (["-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=no"], "^service"),
    "same name twice": (
        ["-F", "file=@run.sh", "-F", "file=@input.pdb;filename=run.sh", "-F", "user_id=1"],
        "^file.*more than once",
    ),
    "path as name": (["-F", "file=@run.sh;filename=../run.sh"], "^file.*has . or .."),
    "absolute name": (["-F", "file=@run.sh;filename=/etc/cron.d/x"], "^file.*not relative"),
    "dots as name": (["-F", "file=@run.sh;filename=.."], "^file.*directory"),
    "file and directory": (
        [
            *("-F", "file=@run.sh", "-F", "file=@run.sh;filename=a"),
            *("-F", "file=@run.sh;filename=a/b", "-F", "user_id=1", "-F", "service=example"),
        ],
        "^file: the name 'a' is a file and a directory",
    ),
    "two normal forms": (
        [
            *("-F", "file=@run.sh", "-F", "file=@run.sh;filename=é"),
            *("-F", "file=@run.sh;filename=e\u0301", "-F", "user_id=1", "-F", "service=example"),
        ],
        "^file: the name 'é' is given more than once",
    ),
    "run.sh elsewhere": (
        ["-F", "file=@run.sh;filename=a/run.sh", "-F", "user_id=1", "-F", "service=example"],
        "named run.sh",
    ),
    "file as text": (["-F", "file=echo", "-F", "user_id=1", "-F", "service=example"], "^file"),
    "file elsewhere": (["-F", "attachment=@run.sh"], "attachment"),
    "not a form": (["-d", "user_id=1"], "multipart/form-data"),
    "no boundary": (["-H", "Content-Type: multipart/form-data", "-d", "x"], "boundary"),
    "no form in it": (
        ["-H", "Content-Type: multipart/form-data; boundary=b", "-d", "hello"],
        "well-formed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_bad_upload_is_refused_and_changes_nothing(
    empty: Server, folder: Path, case: str
) -> None:
    arguments, words = REFUSED[case]
    assert_error(await curl(*arguments, f"{empty.url}/upload", cwd=folder), 400, words)
    assert nothing_stored(empty)


@pytest.mark.parametrize(
    "body",
    [
        '--b\r\nContent-Disposition: form-data; name="user_id"\r\n\r\n1',
        '--b\r\nContent-Disposition: form-data; name="file"; filename="run.sh"\r\n\r\necho',
        '--b\r\nContent-Disposition: form-data; name="file"; filename="run.sh"\r\n\r\nx\r\n--b\r\n',
        "--b\r\nContent-Disposition",
        "--c\r\n\r\n--c--",
        "",
    ],
)
async def test_a_truncated_form_is_refused_and_changes_nothing(empty: Server, body: str) -> None:
    header = "Content-Type: multipart/form-data; boundary=b"
    answer = await curl("-H", header, "--data-binary", body, f"{empty.url}/upload")
    assert_error(answer, 400, "form|file|user_id")
    assert nothing_stored(empty)


async def test_fields_may_come_in_any_order_and_names_may_be_unusual(
    server: Server, folder: Path
) -> None:
    names = ["two words.txt", "ünï→.txt", '100%25 "quoted".txt', "-dash"]
    arguments = ["-F", "service=example", "-F", "file=@empty"]
    for name in names:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"')
        arguments += ["-F", f'file=@input.pdb;filename="{escaped}"']
    arguments += ["-F", "user_id=-7"]
    arguments += ["-F", "file=@run.sh"]
    answer = await curl(*arguments, f"{server.url}/upload", cwd=folder)
    assert answer.status == 201
    assert answer.json() == {"id": 1, "status": "Queued", "message": "Job successfully uploaded"}
    archive = await server.result(1)
    assert {*names, "empty", "run.sh", "all.txt", "stdout.log", "stderr.log"} == set(
        archive.namelist()
    )
    assert archive.read("empty") == b""
    assert archive.read("ünï→.txt") == b"ATOM\n"


async def test_names_of_files_may_be_paths(server: Server, folder: Path) -> None:
    # the longest path there may be, and one more directory beside it
    deepest = "/".join(["d" * 255] * 15 + ["d" * 127, "f" * 128])
    assert len(deepest) == MAX_PATH_BYTES
    (folder / "paths.sh").write_text(
        "cat data/input.pdb data/more/input.pdb > out; find . -type f\n"
    )
    arguments = ["-F", "user_id=1", "-F", "service=example", "-F", "file=@paths.sh;filename=run.sh"]
    names = ["data/input.pdb", "data/more/input.pdb", deepest, "data.pdb"]
    for name in names:
        arguments += ["-F", f"file=@input.pdb;filename={name}"]
    arguments += ["-F", "file=@empty;filename=data/empty"]
    answer = await curl(*arguments, f"{server.url}/upload", cwd=folder)
    assert answer.status == 201, answer
    archive = await server.result(1)
    assert archive.read("out") == b"ATOM\nATOM\n"
    for name in names:
        assert archive.read(name) == b"ATOM\n"
    assert archive.read("data/empty") == b""
    listed = (await curl(f"{server.url}/jobs/1")).json()["files"]
    assert {file["name"] for file in listed} == {"run.sh", "data/empty", *names}
    assert (await curl(f"{server.url}/jobs/1/files/data/more/input.pdb")).body == b"ATOM\n"
    again = await curl("-X", "POST", f"{server.url}/jobs/1/rerun")
    assert (await server.result(again.json()["id"])).read("out") == b"ATOM\nATOM\n"


async def test_paths_are_seen_before_a_job_runs(idle: Server, folder: Path) -> None:
    await curl(
        *("-F", "file=@run.sh", "-F", "file=@input.pdb;filename=data/ü/in.pdb"),
        *("-F", "user_id=1", "-F", "service=example", f"{idle.url}/upload"),
        cwd=folder,
    )
    files = (await curl(f"{idle.url}/jobs/1/files")).json()["files"]
    assert [file["path"] for file in files] == ["run.sh", "data/ü/in.pdb"]
    answer = await curl("-i", f"{idle.url}/jobs/1/files/data%2F%C3%BC/in.pdb")
    assert answer.body.endswith(b"\r\n\r\nATOM\n")
    assert b'filename="in.pdb"' in answer.body
    partial = (await curl(f"{idle.url}/download_partial/1")).body
    assert zipfile.ZipFile(io.BytesIO(partial)).read("data/ü/in.pdb") == b"ATOM\n"


def _request_head(server: Server, length: int) -> bytes:
    return (
        f"POST /upload HTTP/1.1\r\nHost: {server.url.removeprefix('http://')}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


_OPENING = (
    b'--b\r\nContent-Disposition: form-data; name="user_id"\r\n\r\n1\r\n'
    b'--b\r\nContent-Disposition: form-data; name="service"\r\n\r\nexample\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="run.sh"\r\n\r\n'
)
_CLOSING = b"\r\n--b--\r\n"


def _form_of(names: list[str]) -> bytes:
    part = '--b\r\nContent-Disposition: form-data; name="file"; filename="{}"\r\n\r\ntrue\r\n'
    return "".join(part.format(name) for name in names).encode() + _OPENING + _CLOSING


async def test_as_many_files_as_allowed_arrive_and_one_more_is_refused(
    server: Server, tmp_path: Path
) -> None:
    # the longest names there are, in characters that grow on the wire
    names = [f"{number:05}" + "é" * 125 for number in range(config.MAX_FILES)]
    form = ("-H", "Content-Type: multipart/form-data; boundary=b", "--data-binary", "@body")
    (tmp_path / "body").write_bytes(_form_of(names))
    answer = await curl(*form, f"{server.url}/upload", cwd=tmp_path)
    assert_error(answer, 400, "more than 10000 files")
    (tmp_path / "body").write_bytes(_form_of(names[1:]))
    answer = await curl(*form, f"{server.url}/upload", cwd=tmp_path)
    assert answer.status == 201, answer
    archive = await server.result(answer.json()["id"])
    assert set(archive.namelist()) >= set(names[1:])


async def test_a_client_that_disconnects_leaves_no_row_and_no_bytes(idle: Server) -> None:
    host, _, port = idle.url.removeprefix("http://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(_request_head(idle, 50_000_000) + _OPENING)
    for _ in range(20):
        writer.write(bytes(1_000_000))
        await writer.drain()
    await eventually(
        lambda: idle.query("SELECT count(*) FROM chunk") != [(0,)], "some of it was written"
    )
    writer.transport.abort()
    await eventually(lambda: nothing_stored(idle), "all of it was erased")


async def _upload_zeros(server: Server, total: int, *headers: str) -> Answer:
    """Send a request of exactly ``total`` bytes."""
    body = server.directory / "body"
    with open(body, "wb") as file:
        file.write(_OPENING)
        file.truncate(total - len(_CLOSING))
        file.seek(0, 2)
        file.write(_CLOSING)
    options = [word for header in headers for word in ("-H", header)]
    options += ["-H", "Content-Type: multipart/form-data; boundary=b"]
    return await curl("-T", str(body), "-X", "POST", *options, f"{server.url}/upload")


async def test_a_request_of_the_limit_is_accepted_without_buffering_it(idle: Server) -> None:
    process = psutil.Process(idle.pid)
    before = peak = process.memory_info().rss
    upload = asyncio.create_task(_upload_zeros(idle, LIMIT))
    while not upload.done():
        peak = max(peak, process.memory_info().rss)
        assert (await curl(f"{idle.url}/health")).status == 200
    assert (await upload).status == 201
    assert peak - before < 64 * 1024 * 1024


@pytest.mark.parametrize(
    "header", ["Expect: 100-continue", "Expect:", "Transfer-Encoding: chunked"]
)
async def test_one_byte_past_the_limit_is_refused(empty: Server, header: str) -> None:
    answer = await _upload_zeros(empty, LIMIT + 1, header)
    assert_error(answer, 413, "larger than 400 MB")
    await eventually(lambda: nothing_stored(empty), "all of it was erased")


async def test_a_request_announced_as_too_long_is_refused_before_its_body(empty: Server) -> None:
    host, _, port = empty.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = _request_head(empty, LIMIT + 1)
    writer.write(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    line = await asyncio.wait_for(reader.readline(), 20)
    assert line.startswith(b"HTTP/1.1 413")
    writer.close()


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:5000"},
        {"Host": "192.0.2.1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_a_page_of_another_site_can_not_post_a_job(
    empty: Server, folder: Path, headers: dict[str, str]
) -> None:
    arguments = ["-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=example"]
    for name, value in headers.items():
        arguments += ["-H", f"{name}: {value}" if value else f"{name};"]
    assert_error(await curl(*arguments, f"{empty.url}/upload", cwd=folder), 403, "Host|page")
    assert nothing_stored(empty)


async def test_the_own_page_may_post_and_other_names_of_the_machine_work(
    idle: Server, folder: Path
) -> None:
    port = idle.url.rpartition(":")[2]
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        host = f"{name}:{port}"
        answer = await curl(
            *("-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=example"),
            *("-H", f"Host: {host}", "-H", f"Origin: http://{host}", f"{idle.url}/upload"),
            cwd=folder,
        )
        assert answer.status == 201, answer


async def test_health_says_unhealthy_when_nothing_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = await Store.open(str(tmp_path / "db"))

    async def probe() -> None:
        raise StoreFull("the disk that holds the database is full")

    monkeypatch.setattr(store, "probe", probe)
    settings = config.SettingsInForce(config.Settings())
    application = api.make_application(store, Dispatcher(store, settings), settings, frozenset())
    async with TestClient(ApiServer(application)) as client:
        response = await client.get("/health")
        assert response.status == 500
        assert json.loads(await response.text())["status"] == "unhealthy"
    await store.close()


async def test_an_error_of_our_own_in_an_upload_is_no_fault_of_the_client(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = await Store.open(str(tmp_path / "db"))

    async def write(upload: Upload, data: bytes) -> None:
        raise ValueError("a defect of ours")

    monkeypatch.setattr(Upload, "write", write)
    settings = config.SettingsInForce(config.Settings())
    dispatcher = Dispatcher(store, settings)
    application = api.make_application(store, dispatcher, settings, frozenset({"t" * 20}))
    form = aiohttp.FormData({"user_id": "1", "service": "example"})
    form.add_field("file", b"true", filename="run.sh")
    async with TestClient(ApiServer(application)) as client:
        response = await client.post("/upload", data=form)
        assert response.status == 500
        assert "internal error" in (await response.json())["message"]
    await store.close()
