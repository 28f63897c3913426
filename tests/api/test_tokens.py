"""API tokens: without any the API is open; with one, each caller gets what its token allows."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import runtime
from api.application import routes
from api.routes import Policy
from commands import operators
from config import Settings, SettingsInForce
from records import Role, Token, digest_of
from storage.tokens import create_token, new_secret, revoke_token
from telemetry.instruments import Instruments
from tests.harness import PROJECT, Answer, Server, curl, eventually, run, running_server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with running_server(tmp_path / "server", "--slots", "2") as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.sh").write_text("echo done > output.txt\n")
    return tmp_path


async def token_command(server: Server, *arguments: str) -> tuple[int, str]:
    """Run ``orchestrator.py token`` beside the server."""
    command = (sys.executable, str(PROJECT / "orchestrator.py"), "token", *arguments)
    code, output = await run(*command, "--db", str(server.database))
    return code, output.decode()


def presented(secret: str) -> tuple[str, str]:
    """Return curl's arguments that present a token."""
    return ("-H", f"Authorization: Bearer {secret}")


async def new_token(server: Server, name: str, user: str, role: str) -> tuple[str, str]:
    """Make a token beside the server, as the command does; returns curl's arguments for it."""
    secret = new_secret()
    user_id = None if user == "any" else int(user)
    token = Token(name, Role(role), user_id, time.time())
    await asyncio.to_thread(create_token, str(server.database), token, digest_of(secret))
    return presented(secret)


async def until_status(status: int, *arguments: str) -> Answer:
    """Ask until the answer has a status; the server looks for changed tokens each second."""
    deadline = time.monotonic() + 20
    while (answer := await curl(*arguments)).status != status:
        assert time.monotonic() < deadline, answer
        await asyncio.sleep(0.02)
    return answer


async def upload(server: Server, folder: Path, *arguments: str, user: int = 7) -> Answer:
    fields = ("-F", "file=@run.sh", "-F", f"user_id={user}", "-F", "service=example")
    return await curl(*fields, *arguments, f"{server.url}/upload", cwd=folder)


def assert_error(answer: Answer, status: int, words: str) -> None:
    assert answer.status == status, answer
    body = answer.json()
    assert set(body) == {"id", "status", "message"}
    assert body["status"] == "Unknown"
    assert re.search(words, body["message"]), body


def documented() -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return every documented operation: method, path, description."""
    document = yaml.safe_load(Path(runtime.data_file("openapi.yaml")).read_text())
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    ]


def filled(path: str, job_id: int) -> str:
    """Put a job in a documented path, and some file or agent where it has one."""
    return re.sub(r"{\w+}", "run.sh", path.replace("{id}", str(job_id)))


async def test_tokens_are_demanded_honoured_and_revoked_while_the_server_runs(
    server: Server, folder: Path
) -> None:
    assert (await upload(server, folder)).status == 201
    assert (await token_command(server, "list")) == (0, "")
    code, output = await token_command(
        server, "create", "--name", "web", "--user", "any", "--role", "submit"
    )
    assert code == 0, output
    secret = output.splitlines()[0]
    web = presented(secret)
    answer = await until_status(401, "-i", f"{server.url}/download/1")
    assert b'\r\nwww-authenticate: bearer realm="orchestrator"\r\n' in answer.body.lower()
    open_paths = {"/", "/health", "/swagger-ui/", "/ui/"}
    for method, path, operation in documented():
        answer = await curl("-X", method, server.url + filled(path, 1))
        if path in open_paths:
            assert answer.status == 200
        elif path.startswith("/ui"):
            assert answer.status in (308, 404)
        elif path == "/agent":
            assert_error(answer, 401, "agent token")
        else:
            assert_error(answer, 401, "Authorization: Bearer")
            assert {"401", "403"} <= set(operation["responses"]), (method, path)
    assert_error(await upload(server, folder), 401, "Authorization: Bearer")
    assert_error(await curl(f"{server.url}/nothing"), 401, "Authorization: Bearer")
    assert (await curl(f"{server.url}/swagger-ui/swagger.json")).status == 200
    for header in ("Bearer wrong", "Basic d2ViOng=", "Bearer", "Bearer \N{SNOWMAN}", secret):
        answer = await curl("-H", f"Authorization: {header}", f"{server.url}/download/1")
        assert_error(answer, 401, "not valid")
    assert re.search(r"path='/nothing' status=401 .* caller=-$", server.log(), re.MULTILINE)
    # the embedded agent has a token of its own, and goes on
    assert (await upload(server, folder, *web)).status == 201
    assert (await until_status(200, *web, f"{server.url}/download/2?wait=20")).body[:2] == b"PK"
    assert re.search(r"path='/upload' status=201 .* caller=web$", server.log(), re.MULTILINE)
    code, output = await token_command(
        server, "create", "--name", "web", "--user", "1", "--role", "read"
    )
    assert (code, "the token web already exists" in output) == (2, True)
    code, output = await token_command(server, "list")
    assert re.fullmatch(r"web user=any role=submit created=\d{4}-\d\d-\d\dT[\d:]{8}Z\n", output)
    files = [path for path in server.directory.iterdir() if path.is_file()]
    assert all(secret.encode() not in path.read_bytes() for path in files)
    code, output = await token_command(server, "revoke", "web")
    assert (code, "nobody may use the API" in output) == (0, True)
    await until_status(401, *web, f"{server.url}/download/1")
    assert_error(await curl(f"{server.url}/download/1"), 401, "wants a token")
    assert (await token_command(server, "revoke", "web"))[0] == 2
    other = await new_token(server, "other", "any", "admin")
    await until_status(200, *other, f"{server.url}/download/1")
    code, output = await token_command(server, "forget")
    assert (code, "there are 1 tokens" in output) == (2, True)
    assert (await token_command(server, "revoke", "other"))[0] == 0
    await server.stop()
    await server.start("--slots", "2")
    assert_error(await curl(f"{server.url}/download/1"), 401, "wants a token")
    assert (await token_command(server, "forget"))[0] == 0
    await until_status(200, f"{server.url}/download/1")


@pytest.mark.parametrize(
    ("arguments", "rule", "status", "said"),
    [
        ((), "optional", 200, "Everybody on this machine may use it"),
        ((), "required", 401, "Nobody may use it yet"),
        (("--host", "0.0.0.0"), "", 401, "Nobody may use it yet"),
        (("--host", "0.0.0.0"), "optional", 200, "Everybody who reaches this machine"),
    ],
)
async def test_tokens_are_required_where_others_can_reach_the_server_or_it_is_said_who_may(
    tmp_path: Path, arguments: tuple[str, ...], rule: str, status: int, said: str
) -> None:
    environment = {"TOKENS": rule} if rule else {}
    async with running_server(
        tmp_path / "server", "--no-agent", *arguments, environment=environment
    ) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        await eventually(lambda: said in server.log(), "it says who may use it")
        assert (await curl(f"{url}/jobs")).status == status
        assert (await curl(f"{url}/health")).status == 200
        token = await new_token(server, "first", "any", "read")
        await until_status(200, *token, f"{url}/jobs")
        await until_status(401, f"{url}/jobs")


async def test_a_bound_token_can_not_tell_another_s_job_from_none(
    server: Server, folder: Path
) -> None:
    for user in (7, 8):
        assert (await upload(server, folder, user=user)).status == 201
    await server.wait(1)
    await server.wait(2)
    bound = await new_token(server, "bound", "7", "submit")
    await until_status(401, f"{server.url}/download/1")
    asked = 0
    for method, path, _ in documented():
        if "{id}" not in path:
            continue
        asked += 1
        own = await curl(*bound, "-X", method, server.url + filled(path, 1))
        assert own.status in (200, 201, 409), (path, own)
        others = await curl(*bound, "-X", method, server.url + filled(path, 2))
        assert_error(others, 404, "there is no job 2")
        unknown = await curl(*bound, "-X", method, server.url + filled(path, 999))
        assert unknown.body.replace(b"999", b"2") == others.body
        head = await curl(*bound, "-I", server.url + filled(path, 2))
        assert head.status in (404, 405)
    assert asked >= 4
    assert server.query("SELECT count(*) FROM job WHERE user_id = 8") == [(1,)]
    assert_error(await upload(server, folder, *bound, user=8), 403, "not for user 8")
    assert server.query("SELECT count(*) FROM job WHERE user_id = 8") == [(1,)]
    assert (await upload(server, folder, *bound, user=7)).status == 201
    assert_error(await curl(*bound, f"{server.url}/nothing"), 404, "/nothing")


async def test_of_the_jobs_of_an_agent_a_bound_token_sees_its_own(server: Server) -> None:
    own, other = [await server.upload("sleep 60", user=user) for user in (7, 8)]
    await server.wait(own, "Running")
    await server.wait(other, "Running")
    bound = await new_token(server, "bound", "7", "read")
    all_of_them = await new_token(server, "all", "any", "admin")
    await until_status(200, *bound, f"{server.url}/agents")
    await until_status(401, f"{server.url}/agents")
    for token, jobs in ((bound, [own]), (all_of_them, [own, other])):
        (agent,) = (await until_status(200, *token, f"{server.url}/agents")).json()["agents"]
        assert (agent["jobs"], agent["busy"]) == (jobs, 2)


async def test_lists_show_a_bound_token_its_own_jobs(server: Server, folder: Path) -> None:
    for user in (7, 8, 7):
        assert (await upload(server, folder, user=user)).status == 201
    bound = await new_token(server, "bound", "7", "read")
    other = await new_token(server, "other", "any", "read")
    await until_status(401, f"{server.url}/jobs")

    async def ids(token: tuple[str, str], query: str) -> list[int]:
        answer = await curl(*token, f"{server.url}/jobs?{query}")
        assert answer.status == 200, answer
        return [job["id"] for job in answer.json()["jobs"]]

    assert await ids(bound, "") == await ids(bound, "user_id=7") == [3, 1]
    assert await ids(bound, "service=example&text=") == [3, 1]
    assert await ids(other, "") == [3, 2, 1]
    assert await ids(other, "user_id=8") == [2]
    assert_error(await curl(*bound, f"{server.url}/jobs?user_id=8"), 403, "not for user 8")
    for path in ("/agents", "/services", "/metrics"):
        assert (await curl(*bound, server.url + path)).status == 200
        assert_error(await curl(server.url + path), 401, "Bearer")
    assert_error(await curl(*other, "-X", "POST", f"{server.url}/agents/local/drain"), 403, "admin")


async def test_a_stream_shows_a_bound_token_its_own_and_ends_when_the_token_is_revoked(
    server: Server, folder: Path
) -> None:
    token = await new_token(server, "bound", "7", "submit")
    admin = await new_token(server, "admin", "any", "admin")
    await until_status(401, f"{server.url}/jobs")
    assert_error(await curl(*token, f"{server.url}/events?user_id=8"), 403, "not for user 8")
    url = f"{server.url}/events?last_event_id=0-0"
    stream = asyncio.create_task(run("curl", "-sN", *token, url))
    other = asyncio.create_task(run("curl", "-sN", *admin, url))
    for user in (8, 7):
        answer = await upload(server, folder, *admin, user=user)
        await curl(*admin, f"{server.url}/download/{answer.json()['id']}?wait=20")
    await asyncio.to_thread(revoke_token, str(server.database), "bound")
    code, output = await asyncio.wait_for(stream, 20)
    assert code != 0
    assert b"event: job" in output
    heard = {(event["id"], event["user_id"]) for event in events_in(output)}
    assert heard == {(2, 7)}
    assert not other.done()
    assert (await server.stop()) == 0
    _, output = await asyncio.wait_for(other, 20)
    assert {event.get("user_id") for event in events_in(output)} >= {7, 8}


def events_in(stream: bytes) -> list[dict[str, Any]]:
    """Return the data of the events of a stream."""
    return [
        json.loads(line.removeprefix(b"data: "))
        for line in stream.splitlines()
        if line.startswith(b"data: ")
    ]


async def test_each_role_does_what_it_says_and_no_more(server: Server, folder: Path) -> None:
    assert (await upload(server, folder)).status == 201
    await server.wait(1)
    read = await new_token(server, "read", "any", "read")
    submit = await new_token(server, "submit", "any", "submit")
    await until_status(401, f"{server.url}/download/1")
    again = ("-X", "POST", f"{server.url}/jobs/1/rerun")
    end = ("-X", "POST", f"{server.url}/terminate/1")
    assert (await curl(*read, f"{server.url}/download/1")).status == 200
    for refused in (await upload(server, folder, *read), await curl(*read, *again)):
        assert_error(refused, 403, "allows to read, the role submit is needed")
    assert_error(await curl(*read, *end), 403, "submit is needed")
    assert (await upload(server, folder, *submit)).status == 201
    assert (await curl(*submit, *again)).status == 201
    assert_error(await curl(*submit, *end), 409, "already Completed")
    code, output = await token_command(
        server, "create", "--name", "x", "--user", "7", "--role", "admin"
    )
    assert (code, "use --user any" in output) == (2, True)
    for bad in (("--user", "me", "--role", "read"), ("--user", "7", "--role", "root")):
        with pytest.raises(SystemExit):
            operators.parse_arguments(["token", "create", "--name", "x", *bad])


def policy_of_all_routes() -> Policy:
    settings = SettingsInForce(Settings())
    nothing: Any = None
    return Policy(routes(nothing, nothing, settings, frozenset(), Instruments()))


def test_what_the_policy_does_not_know_only_admins_may_do() -> None:
    policy = policy_of_all_routes()
    assert policy.access("POST", "/agents/{name}/drain").role is Role.ADMIN
    assert policy.access("DELETE", "/upload/everything").role is Role.ADMIN
    assert policy.access("GET", "/something/new").role is Role.ADMIN
    assert not policy.access("GET", "/something/new").is_for_bound_tokens
    assert policy.access("GET", None).role is Role.READ
    assert Role.ADMIN.includes(Role.SUBMIT)
    assert not Role.READ.includes(Role.SUBMIT)


def test_every_call_that_may_demand_a_token_is_documented_to_do_so() -> None:
    document = yaml.safe_load((PROJECT / "openapi.yaml").read_text())
    policy = policy_of_all_routes()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            is_open = policy.access(method.upper(), path).role is None
            documented = {"401", "403"} <= operation["responses"].keys()
            assert documented is not is_open, (method, path)
            assert (operation.get("security") == []) is is_open, (method, path)


async def test_a_token_needs_a_database_that_a_server_has_made(tmp_path: Path) -> None:
    server = Server(tmp_path, {})
    code, output = await token_command(server, "list")
    assert (code, "start the server once" in output) == (2, True)
    assert not server.database.exists()


async def test_a_request_with_too_much_header_is_refused(server: Server) -> None:
    large = ("-H", f"X-Large: {'x' * 8200}")
    many = [word for number in range(130) for word in ("-H", f"X-{number}: x")]
    for arguments in (
        (*large, f"{server.url}/health"),
        (*many, f"{server.url}/health"),
        (f"{server.url}/health?{'x' * 24_600}",),
        ("-X", "WRONG METHOD", f"{server.url}/health"),
    ):
        # aiohttp refuses these before they come to the API, and answers in the same shape
        assert_error(await curl(*arguments), 400, "^not an acceptable HTTP request: .")
    assert "Traceback" not in server.log()
    assert (await curl(f"{server.url}/health")).status == 200


async def test_ids_of_agents_are_for_admins(server: Server) -> None:
    await server.result(await server.upload("true"))
    url = f"{server.url}/agents"
    (known,) = (await curl(url)).json()["agents"]
    assert known["id"]
    roles = ("admin", "submit", "read")
    bearers = {role: await new_token(server, role, "any", role) for role in roles}
    await until_status(401, url)
    for role, expected in zip(roles, (known["id"], None, None), strict=True):
        (seen,) = (await until_status(200, *bearers[role], url)).json()["agents"]
        assert (seen["name"], seen["id"]) == (known["name"], expected)
