"""SIGHUP: settings that change while the server runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import config
from config import ServiceLimits, SettingsInForce
from tests.harness import PROJECT, Server, curl, eventually, running_server


def test_a_change_says_what_holds_now_and_what_needs_a_restart() -> None:
    def load(changes: Mapping[str, str]) -> config.Settings:
        return config.load(changes, {})

    settings = SettingsInForce(load({"PORT": "1", "SLOTS": "1"}))
    heard: list[int] = []
    settings.on_change(lambda: heard.append(settings.current.max_age))
    change = settings.replace(
        load({"PORT": "2", "SLOTS": "1", "MAX_AGE": "7", "SERVICE_DOCK_MAX_RUNS": "3"})
    )
    assert change.changed == ("MAX_AGE", "services")
    assert change.needing_restart == ("PORT",)
    assert (settings.current.port, settings.current.max_age, heard) == (1, 7, [7])
    assert settings.current.services["dock"] == ServiceLimits(max_runs=3)


async def hang_up(server: Server, expected: str) -> None:
    """Send SIGHUP and wait for one more line that says what came of it."""
    before = server.log().count(expected)
    os.kill(server.pid, signal.SIGHUP)
    await eventually(lambda: server.log().count(expected) == before + 1, expected)


async def test_limits_services_and_retention_change_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text("[services.dock]\nmax_runs = 1\n")
    async with running_server(tmp_path / "server", "--slots", "3", "--config", str(file)) as server:
        assert (await curl("-H", "Host: other", f"{server.url}/")).status == 403
        jobs = [await server.upload("sleep 30", service="dock") for _ in range(3)]
        await server.wait(jobs[0], "Running")

        # a bad file changes nothing, in no part
        file.write_text('ALLOWED_HOSTS = "other"\n[services.dock]\nmax_runs = -1\n')
        await hang_up(server, "event=settings_refused")
        assert (await curl("-H", "Host: other", f"{server.url}/")).status == 403
        assert (await server.status(jobs[1]))["status"] == "Queued"

        file.write_text(
            'LOG_FORMAT = "json"\nALLOWED_HOSTS = "other"\n'
            "[services.dock]\nmax_runs = 2\n[services.fold]\nruns_per_user = 1\n"
        )
        await hang_up(server, "event=settings_reloaded changed='ALLOWED_HOSTS,services'")
        expected = "event=settings_need_restart names=LOG_FORMAT"
        await eventually(lambda: expected in server.log(), expected)
        assert (await curl("-H", "Host: other", f"{server.url}/")).status == 200
        # the quota applies at once: nothing else happened that would wake the scheduler
        await server.wait(jobs[1], "Running")
        assert (await server.status(jobs[2]))["status"] == "Queued"

        first, second = [await server.upload("sleep 30", service="fold") for _ in range(2)]
        await server.wait(first, "Running")
        assert (await server.status(second))["status"] == "Queued"

        file.write_text("MAX_AGE = 1\n")
        await curl("-X", "POST", f"{server.url}/terminate/{jobs[2]}")
        await hang_up(server, "event=settings_reloaded")
        state = "SELECT state FROM job WHERE id = ?"
        await eventually(lambda: server.query(state, jobs[2]) == [("Cleaned",)], "it is cleaned")


async def test_jobs_of_a_service_that_is_taken_away_wait_and_say_why(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.toml"
    dock = "[services.dock]\nmax_runs = 1\n"
    file.write_text(dock)
    warning = "event=service_not_configured service=dock jobs_waiting=1"
    async with running_server(tmp_path / "server", "--slots", "3", "--config", str(file)) as server:
        running, waiting = [await server.upload("sleep 30", service="dock") for _ in range(2)]
        await server.wait(running, "Running")
        file.write_text("")
        await hang_up(server, warning)
        # what runs goes on, and its end starts nothing
        assert (await server.status(running))["status"] == "Running"
        await curl("-X", "POST", f"{server.url}/terminate/{running}")
        await server.stop()
        await server.start("--slots", "3", "--config", str(file))
        assert server.log().count(warning) == 2
        await server.wait(await server.upload("true"), "Completed")
        queue = (await curl(f"{server.url}/jobs/{waiting}")).json()["queue"]
        assert queue == {"position": 1, "reason": "this service is not configured"}
        services = (await curl(f"{server.url}/services")).json()["services"]
        shown = {service["name"]: service for service in services}["dock"]
        assert [shown[name] for name in ("is_configured", "queued", "max_runs")] == [False, 1, None]

        file.write_text(dock)
        await hang_up(server, "event=settings_reloaded")
        await server.wait(waiting, "Running")


async def test_a_server_whose_terminal_was_closed_stops_instead(tmp_path: Path) -> None:
    terminal, its_end = os.openpty()
    with open(tmp_path / "log", "wb") as log:
        server = await asyncio.create_subprocess_exec(
            *(sys.executable, str(PROJECT / "orchestrator.py"), "--port", "0", "--no-agent"),
            cwd=tmp_path,
            stdin=its_end,
            stdout=log,
            stderr=log,
        )
    os.close(its_end)
    try:
        path = tmp_path / "log"
        await eventually(lambda: "ready at" in path.read_text(), "it is ready")
        server.send_signal(signal.SIGHUP)
        await eventually(lambda: "event=settings_reloaded" in path.read_text(), "it goes on")
        os.close(terminal)
        server.send_signal(signal.SIGHUP)
        assert await asyncio.wait_for(server.wait(), 60) == 0
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
