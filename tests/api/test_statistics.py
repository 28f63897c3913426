"""``GET /stats``, ``/token`` and ``/tokens``: what they tell, and to whom."""

from __future__ import annotations

import time

from records import Role, Token, digest_of
from storage.tokens import create_token, new_secret
from tests.harness import Server, curl


async def test_statistics_tell_what_came_and_ended(server: Server) -> None:
    good, bad = await server.upload("true"), await server.upload("exit 3")
    await server.wait(good, "Completed")
    await server.wait(bad, "Failed")
    answer = (await curl(f"{server.url}/stats?period=24h&service=example")).json()
    assert (answer["period"], answer["step_seconds"], len(answer["points"])) == ("24h", 900, 96)
    names = ("submitted", "completed", "failed", "killed", "invalid")
    sums = [sum(point[name] for point in answer["points"]) for name in names]
    assert sums == [2, 1, 1, 0, 0]
    assert answer["points"][-1]["time"] <= time.time()
    assert 0 < answer["disk"]["database"] < answer["disk"]["total"]
    # they are in the database: a crash takes nothing of them
    await server.kill()
    await server.start()
    again = (await curl(f"{server.url}/stats")).json()
    assert [sum(point[name] for point in again["points"]) for name in names] == sums
    others = (await curl(f"{server.url}/stats?service=nobody")).json()
    assert not any(point["submitted"] for point in others["points"])


async def test_statistics_refuse_what_they_do_not_know(server: Server) -> None:
    for query in ("period=2h", "period=", "periode=1h"):
        answer = await curl(f"{server.url}/stats?{query}")
        assert answer.status == 400, query
        assert (answer.json()["id"], answer.json()["status"]) == (0, "Unknown")
        assert query.partition("=")[0] in answer.json()["message"]


async def test_callers_hear_of_their_own_token_and_admins_of_all(server: Server) -> None:
    open_to_all = {"is_token_needed": False, "name": None, "role": "admin", "user_id": None}
    assert (await curl(f"{server.url}/token")).json() == open_to_all
    assert (await curl(f"{server.url}/tokens")).json() == {"tokens": []}
    secrets = {}
    for name, role, user_id in (("root", Role.ADMIN, None), ("anna", Role.READ, 7)):
        secrets[name] = new_secret()
        token = Token(name, role, user_id, time.time())
        create_token(str(server.database), token, digest_of(secrets[name]))
    deadline = time.monotonic() + 20
    while (await curl(f"{server.url}/token")).status != 401:
        assert time.monotonic() < deadline
    anna = ("-H", f"Authorization: Bearer {secrets['anna']}")
    own = (await curl(*anna, f"{server.url}/token")).json()
    assert own == {"is_token_needed": True, "name": "anna", "role": "read", "user_id": 7}
    assert (await curl(*anna, f"{server.url}/stats")).status == 200
    assert (await curl(*anna, f"{server.url}/tokens")).status == 403
    root = ("-H", f"Authorization: Bearer {secrets['root']}")
    answer = await curl(*root, f"{server.url}/tokens")
    assert [token["name"] for token in answer.json()["tokens"]] == ["anna", "root"]
    assert not any(secret.encode() in answer.body for secret in secrets.values())
    # what the page is made of is shown to all
    assert (await curl(f"{server.url}/ui/")).status == 200
