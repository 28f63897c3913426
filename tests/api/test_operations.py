"""What operators see and steer: agents, services, metrics, health."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs import MAX_MEMORY_BYTES
from records import JobTimes
from telemetry.instruments import JobInstruments
from telemetry.metrics import Counter, Histogram, exposition
from tests.harness import AgentProcess, Server, curl, run, running_server


async def ask(server: Server, path: str) -> dict[str, Any]:
    answer = await curl(f"{server.url}{path}")
    assert answer.status == 200, answer
    return answer.json()


async def agents_of(server: Server) -> dict[str, dict[str, Any]]:
    return {agent["name"]: agent for agent in (await ask(server, "/agents"))["agents"]}


async def post(server: Server, path: str) -> dict[str, Any]:
    answer = await curl("-X", "POST", f"{server.url}{path}")
    assert answer.status == 200, answer
    return answer.json()


async def agents_when(
    server: Server, condition: Callable[[dict[str, dict[str, Any]]], bool]
) -> dict[str, dict[str, Any]]:
    """Wait until the server sees its agents so."""
    deadline = time.monotonic() + 20
    while not condition(agents := await agents_of(server)):
        assert time.monotonic() < deadline, agents
    return agents


Numbers = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Numbers:
    """Read metrics as Prometheus would."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- agents -----------------------------------------------------------------------


async def test_agents_are_seen_with_what_they_hold_while_connected_and_away(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    agent = new_agent("node7")
    await agent.start("--slots", "3", "--services", "example,fold")
    await agent.wait_connected()
    job = await bare_server.upload("sleep 60")
    await bare_server.wait(job, "Running")
    seen = (await agents_of(bare_server))["node7"]
    assert (seen["slots"], seen["busy"], seen["jobs"]) == (3, 1, [job])
    assert (seen["services"], seen["version"]) == (["example", "fold"], "0.1.0")
    assert (seen["is_connected"], seen["is_drained"], seen["address"]) == (True, False, "127.0.0.1")
    assert 0 <= seen["heartbeat_age"] < 60
    assert seen["load"] >= 0
    since = datetime.fromisoformat(seen["connected_since"])
    assert abs((datetime.now(UTC) - since).total_seconds()) < 60

    await agent.kill()
    seen = (await agents_when(bare_server, lambda agents: not agents["node7"]["is_connected"]))[
        "node7"
    ]
    assert (seen["busy"], seen["jobs"], seen["connected_since"]) == (1, [job], None)
    assert 0 < seen["lease_left"] <= 60
    assert (await ask(bare_server, "/services"))["services"][0]["agents"] == []


async def test_a_drained_agent_finishes_its_jobs_and_gets_no_other_until_resumed(
    bare_server: Server, new_agent: Callable[[str], AgentProcess], tmp_path: Path
) -> None:
    agent = new_agent("node7")
    await agent.start("--slots", "2")
    await agent.wait_connected()
    gate = tmp_path / "gate"
    held = await bare_server.upload(f"until [ -e {gate} ]; do sleep 0.05; done; echo done > out")
    await bare_server.wait(held, "Running")
    assert (await post(bare_server, "/agents/node7/drain"))["is_drained"]
    drained = await post(bare_server, "/agents/node7/drain")  # again: it stays so
    assert (drained["is_drained"], drained["jobs"]) == (True, [held])
    other = await bare_server.upload("true")
    gate.touch()
    assert "out" in (await bare_server.result(held)).namelist()

    # it holds over restarts of both, also while it is away and has nothing
    await agent.kill()
    await bare_server.stop()
    await bare_server.start("--no-agent")
    assert not (await agents_of(bare_server))["node7"]["is_connected"]
    await agent.start("--slots", "2")
    back = await agents_when(bare_server, lambda agents: agents["node7"]["is_connected"])
    seen = back["node7"]
    assert (seen["is_drained"], seen["slots"]) == (True, 2)
    assert (await bare_server.status(other))["status"] == "Queued"

    by_id = await post(bare_server, f"/agents/{seen['id']}/resume")
    assert (by_id["name"], by_id["is_drained"]) == ("node7", False)
    await bare_server.wait(other, "Completed")
    history = "SELECT kind FROM agent_history WHERE kind IN ('draining', 'resumed') ORDER BY id"
    assert bare_server.query(history) == [("draining",), ("resumed",)]


async def test_an_agent_that_is_away_can_be_drained_an_unknown_one_is_not_found(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    agent = new_agent("node7")
    await agent.start()
    await agent.wait_connected()
    await agent.kill()
    await agents_when(bare_server, lambda agents: not agents)
    assert not (await post(bare_server, "/agents/node7/resume"))["is_connected"]
    assert await agents_of(bare_server) == {}
    assert (await post(bare_server, "/agents/node7/drain"))["is_drained"]
    assert list(await agents_of(bare_server)) == ["node7"]
    for name in ("nobody", "%00", "%FF", "%ED%A0%80", "%F0%9F%92%A9", "a%2Fb", "x" * 4000):
        verb = "drain" if len(name) > 3 else "resume"
        answer = await curl("-X", "POST", f"{bare_server.url}/agents/{name}/{verb}")
        assert (answer.status, answer.json()["status"]) == (404, "Unknown")


# --- services, metrics, health ----------------------------------------------------


_DONE = "until [ -e ../../../go ]; do sleep 0.05; done; sleep 0.3"


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that has done one job, failed one, holds one and has another wait."""
    environment = {"SERVICE_FOLD_MAX_RUNS": "1", "SERVICE_FOLD_TIMEOUT": "60"}
    async with running_server(tmp_path / "s", "--slots", "2", environment=environment) as server:
        done = await server.upload(_DONE)
        await server.wait(done, "Running")
        # only now, so that its run, as the server sees it, is as long as its last sleep at least
        (server.directory / "orchestrator.db.agent" / "go").touch()
        await server.result(done)
        await server.wait(await server.upload("exit 3"), "Failed")
        await server.wait(await server.upload("sleep 60", service="fold"), "Running")
        await server.upload("sleep 60", service="fold")
        yield server


def _seconds_between(server: Server, *states: str) -> list[float]:
    """How long each of the jobs of ``busy`` that ended took from the first of the states on."""
    rows = server.query(
        "SELECT max(at) - min(at) FROM history WHERE job_id IN (1, 2)"
        f" AND to_state IN ({', '.join('?' * len(states))}) GROUP BY job_id",
        *states,
    )
    return [row[0] for row in rows]


async def test_services_say_what_waits_what_runs_and_how_long_it_takes(busy: Server) -> None:
    waits = _seconds_between(busy, "Queued", "Running")
    runs = _seconds_between(busy, "Running", "Completed", "Failed")
    for _ in range(2):
        example, fold = (await ask(busy, "/services"))["services"]
        assert fold == {
            "name": "fold",
            "is_configured": True,
            "runs_per_user": 5,
            "max_runs": 1,
            "timeout": 60,
            "resources": {"cpus": 1, "memory": None, "gpus": 0},
            "max_resources": {"cpus": 1, "memory": MAX_MEMORY_BYTES, "gpus": 0},
            "active": 1,
            "queued": 1,
            "agents": ["local"],
            "median_wait": None,
            "median_run": None,
            "median_cpu": None,
            "median_memory": None,
        }
        assert (example["active"], example["queued"]) == (0, 0)
        assert 0 < example["median_wait"] < 20
        assert 0.1 < example["median_run"] < 20
        assert 0 < example["median_cpu"] < 20
        assert 2**20 < example["median_memory"] < 2**30
        assert example["median_wait"] == pytest.approx(statistics.median(waits), abs=0.001)
        assert example["median_run"] == pytest.approx(statistics.median(runs), abs=0.001)
        # the second time after a restart, which knows of the jobs that ended before
        await busy.stop()
        await busy.start("--slots", "2")
        await agents_when(busy, lambda agents: agents["local"]["is_connected"])
        await busy.wait(3, "Running")


async def test_metrics_are_what_prometheus_reads_and_what_happened(busy: Server) -> None:
    code, head = await run("curl", "-sS", "-D", "-", "-o", "/dev/null", f"{busy.url}/metrics")
    assert code == 0
    assert b"Content-Type: text/plain; version=0.0.4; charset=utf-8" in head
    text = (await curl(f"{busy.url}/metrics")).body.decode()
    numbers = parsed(text)

    def of(name: str, **labels: str) -> float:
        return numbers[name, tuple(sorted(labels.items()))]

    assert of("orchestrator_jobs", service="fold", state="Running") == 1
    assert of("orchestrator_jobs", service="fold", state="Queued") == 1
    assert of("orchestrator_jobs", service="example", state="Queued") == 0
    assert of("orchestrator_jobs_finished_total", service="example", state="Completed") == 1
    assert of("orchestrator_jobs_finished_total", service="example", state="Failed") == 1
    assert of("orchestrator_job_run_seconds_count", service="example") == 2
    run_seconds = sum(_seconds_between(busy, "Running", "Completed", "Failed"))
    assert 0.2 < run_seconds < 20
    assert of("orchestrator_job_run_seconds_sum", service="example") == pytest.approx(run_seconds)
    assert of("orchestrator_job_wait_seconds_count", service="fold") == 1
    assert of("orchestrator_agents_connected") == 1
    assert (of("orchestrator_slots"), of("orchestrator_slots_busy")) == (2, 1)
    assert of("orchestrator_uploaded_bytes_total") == len(_DONE + "exit 3sleep 60sleep 60")
    assert of("orchestrator_result_bytes_total") > 200
    assert of("orchestrator_http_response_bytes_total", path="/download/{id}") > 100
    uploads = of("orchestrator_http_requests_total", method="POST", path="/upload", status="201")
    assert uploads == 4
    assert of("orchestrator_database_bytes") == busy.database.stat().st_size
    assert of("orchestrator_commit_operations_count") >= 4
    assert of("orchestrator_commit_seconds_bucket", le="+Inf") >= 4
    assert of("process_resident_memory_bytes") > 10_000_000
    assert of("process_open_fds") > 5
    assert any(name == "orchestrator_build_info" for name, _ in numbers)
    # names and units as https://prometheus.io/docs/practices/naming/ wants them
    for name, kind in re.findall(r"# TYPE (\S+) (\S+)", text):
        assert name.endswith("_total") == (kind == "counter"), name


def test_label_values_arrive_whole_whatever_is_in_them() -> None:
    counter = Counter("c_total", 'two\nlines \\ "quoted"', ("name",))
    histogram = Histogram("h", "values", (0.5, 1), ("name",))
    names = ['"', "\\", "a\nb", "\\n", "ü, {}=", ""]
    for number, name in enumerate(names):
        counter.add(number + 0.5, name)
        histogram.observe(number / 2, name)
    numbers = parsed(exposition([counter.family(), histogram.family()]))
    for number, name in enumerate(names):
        assert numbers["c_total", (("name", name),)] == number + 0.5
        for bound, count in (("0.5", number < 2), ("1", number < 3), ("+Inf", True)):
            assert numbers["h_bucket", (("le", bound), ("name", name))] == count
        assert numbers["h_sum", (("name", name),)] == number / 2


def test_medians_are_of_the_last_hundred_jobs_that_ran() -> None:
    jobs = JobInstruments()
    assert jobs.median_run("dock") is None
    jobs.begin(JobTimes("dock", 0.0, 1000.0, 3000.0) for _ in range(200))
    jobs.begin(JobTimes("dock", 0.0, None, 5.0) for _ in range(200))  # killed in line
    assert (jobs.median_wait("dock"), jobs.median_run("dock")) == (1000.0, 2000.0)
    assert (jobs.median_cpu("dock"), jobs.median_memory("dock")) == (None, None)
    jobs.begin(JobTimes("dock", 0.0, 1.0, 3.0, 0.5, 2**20) for _ in range(100))
    assert (jobs.median_cpu("dock"), jobs.median_memory("dock")) == (0.5, 2**20)
    assert (jobs.median_wait("dock"), jobs.median_run("dock")) == (1.0, 2.0)


async def test_health_says_healthy_and_what_else_is_to_know(busy: Server) -> None:
    answer = await curl(f"{busy.url}/health")
    health = json.loads(answer.body)
    assert health.pop("uptime") > 0
    assert health == {
        "status": "healthy",
        "version": "0.1.0",
        "database_writable": True,
        "agents_connected": 1,
    }
