"""The dashboard with tokens, over restarts of the server, and with very many jobs."""

from __future__ import annotations

import contextlib
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from playwright.async_api import Page, expect

from bench.database_file import multiply_job
from records import Role, Token, digest_of
from storage.tokens import create_token, new_secret, revoke_token
from tests.dashboard.conftest import WAIT_MS, NewPage
from tests.harness import PROJECT, Server, run, running_server

pytestmark = pytest.mark.asyncio(loop_scope="module")

expect.set_options(timeout=WAIT_MS)


def make_token(server: Server, name: str, role: Role, user_id: int | None = None) -> str:
    """Make a token as the command does; returns its secret."""
    secret = new_secret()
    create_token(str(server.database), Token(name, role, user_id, time.time()), digest_of(secret))
    return secret


async def log_in(page: Page, secret: str, is_remembered: bool = False) -> None:
    """Type a token where the page asks for it."""
    await page.get_by_label("API token").fill(secret)
    if is_remembered:
        await page.get_by_label("Remember it in this tab").check()
    await page.get_by_role("button", name="Continue").click()


async def places(page: Page) -> list[str]:
    """Return what the navigation offers."""
    return await page.locator(".places a").all_inner_texts()


async def test_a_token_is_asked_for_and_its_role_decides_what_is_offered(
    new_page: NewPage, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--slots", "2") as server:
        mine = await server.upload("sleep 600", user=7)
        other = await server.upload("echo secret of user 8", user=8)
        admin = make_token(server, "root", Role.ADMIN)
        read = make_token(server, "anna", Role.READ, user_id=7)
        # the server reads its tokens anew once a second
        page = await new_page(f"{server.url}/ui/")
        while not await page.get_by_label("API token").count():
            await page.reload()
        await log_in(page, "wrong")
        await expect(page.get_by_role("alert")).to_contain_text("not valid")
        await log_in(page, read, is_remembered=True)
        await expect(page.locator(".lamp")).to_have_text("Live")
        assert await places(page) == ["Overview", "Jobs", "Agents", "Services"]
        await expect(page.locator(".recent-row")).to_have_count(1)
        await page.goto(f"{server.url}/ui/#/jobs/{mine}")
        await expect(page.locator(".job-state .state")).to_have_text("Running")
        for action in ("Terminate", "Run again", "Delete"):
            await expect(page.get_by_role("button", name=action)).to_have_count(0)
        await page.goto(f"{server.url}/ui/#/jobs/{other}")
        await expect(page.get_by_role("alert").filter(has_text="no job")).to_be_visible()
        # kept over a reload, in this tab only
        await page.reload()
        await expect(page.locator(".lamp")).to_have_text("Live")
        stranger = await new_page(f"{server.url}/ui/")
        await expect(stranger.get_by_label("API token")).to_be_visible()
        assert await page.context.cookies() == []
        await log_in(stranger, admin)
        await expect(stranger.locator(".lamp")).to_have_text("Live")
        assert (await places(stranger))[-1] == "Tokens"
        await stranger.goto(f"{server.url}/ui/#/tokens")
        await expect(stranger.get_by_role("row", name="anna")).to_contain_text("jobs of user 7")
        assert read not in await stranger.content()
        await stranger.goto(f"{server.url}/ui/#/jobs/{other}")
        async with stranger.expect_download() as waiting:
            await stranger.get_by_role("button", name="Download result").click()
        assert (await (await waiting.value).path()).read_bytes().startswith(b"PK")
        # not remembered: gone with a reload
        await stranger.reload()
        await expect(stranger.get_by_label("API token")).to_be_visible()
        revoke_token(str(server.database), "anna")
        await expect(page.get_by_label("API token")).to_be_visible()


async def test_an_open_page_heals_when_the_server_was_restarted(
    new_page: NewPage, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--slots", "2") as server:
        gate = tmp_path / "gate"
        script = (
            f"for i in 1 2 3; do echo before $i; done; while [ ! -e {gate} ]; do sleep 0.1; done"
        )
        job = await server.upload(f"{script}; echo after")
        page = await new_page(f"{server.url}/ui/#/jobs/{job}")
        overview = await new_page(f"{server.url}/ui/")
        await expect(page.locator(".log-lines")).to_contain_text("before 3")
        await expect(overview.locator('[data-tile="Running"] .tile-number')).to_have_text("1")
        await server.kill()
        await expect(page.locator(".banner")).to_be_visible()
        await expect(overview.locator(".banner")).to_be_visible()
        await server.start("--slots", "2")
        await expect(page.locator(".banner")).to_be_hidden()
        await expect(overview.locator(".banner")).to_be_hidden()
        gate.touch()
        await expect(page.locator(".job-state .state")).to_have_text("Completed")
        await expect(page.locator(".log-lines")).to_contain_text("after")
        assert await page.locator(".line .line-text").all_inner_texts() == [
            *("before 1", "before 2", "before 3", "after")
        ]
        await expect(overview.locator('[data-tile="Running"] .tile-number')).to_have_text("0")
        row = overview.locator(f'.recent-row[href="#/jobs/{job}"]')
        await expect(row.locator(".state")).to_have_text("Completed")


async def test_pages_of_a_hundred_thousand_jobs_come_at_once(
    new_page: NewPage, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--no-agent") as server:
        await server.upload("true")
        await server.stop()
        multiply_job(server.database, 100_000, users=10)
        with contextlib.closing(sqlite3.connect(server.database)) as db, db:
            db.execute("UPDATE job SET name = 'needle' WHERE id = 500")
        await server.start("--no-agent")
        page = await new_page(f"{server.url}/ui/#/jobs")
        rows = page.locator(".job-table tbody tr")
        await expect(rows).to_have_count(50)
        first = await rows.first.locator(".job-id").inner_text()
        await page.get_by_role("link", name="Older").click()
        await expect(rows.first.locator(".job-id")).not_to_have_text(first)
        await page.get_by_role("link", name="Older").click()
        await expect(page.get_by_role("link", name="Newer")).to_be_visible()
        third = page.url
        third_first = await rows.first.locator(".job-id").inner_text()
        await page.go_back()
        await expect(rows.first.locator(".job-id")).not_to_have_text(third_first)
        await page.get_by_role("link", name="Newer").click()
        await expect(rows.first.locator(".job-id")).to_have_text(first)
        await page.goto(third)
        await expect(rows.first.locator(".job-id")).to_have_text(third_first)
        await page.get_by_role("link", name="Newest").click()
        await expect(rows.first.locator(".job-id")).to_have_text(first)
        # all that match are meant, also those on other pages, and said by their number
        await page.goto(f"{server.url}/ui/#/jobs?user=3")
        await expect(rows).to_have_count(50)
        await page.get_by_label("Select all jobs of this page").check()
        await page.get_by_role("button", name="Select all that match").click()
        await page.get_by_role("toolbar").get_by_role("button", name="Terminate").click()
        await expect(page.get_by_role("dialog")).to_contain_text("Terminate 10,000 jobs?")
        await page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        # rare ones are found though the server looks at a part at a time
        await page.goto(f"{server.url}/ui/#/jobs?id=500")
        await expect(rows).to_have_count(1)
        await expect(rows).to_contain_text("needle")
        await page.goto(f"{server.url}/ui/#/jobs?text=nothing-has-this")
        await expect(page.get_by_text("No job matches")).to_be_visible()


@pytest.mark.soak
async def test_a_hundred_megabytes_of_output_do_not_hang_the_tab(
    new_page: NewPage, tmp_path: Path
) -> None:
    environment = {"MAX_LOG_BYTES": str(200 * 2**20)}
    async with running_server(tmp_path / "server", environment=environment) as server:
        line = "x" * 99
        job = await server.upload(f"yes {line} | head -c 104857600; echo; echo the end")
        page = await new_page(f"{server.url}/ui/#/jobs/{job}")
        slowest = 0.0
        deadline = time.monotonic() + 300
        while await page.locator(".job-state .state").inner_text() != "Completed":
            assert time.monotonic() < deadline
            started = time.monotonic()
            await page.evaluate("() => new Promise(done => setTimeout(done, 0))")
            slowest = max(slowest, time.monotonic() - started)
        last = page.locator(".line").last
        await expect(last).to_contain_text("the end", timeout=180_000)
        assert slowest < 5
        assert await page.locator(".line").count() <= 2100
        await page.reload()
        await expect(last).to_contain_text("the end")
        await page.keyboard.press("/")
        await page.keyboard.type("the end")
        await expect(page.locator(".log-found")).to_have_text("1 of 1")


async def test_the_command_that_the_form_shows_does_the_same(
    new_page: NewPage, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--slots", "2") as server:
        page = await new_page(f"{server.url}/ui/#/submit?example=1")
        await expect(page.get_by_text("analyse.awk", exact=True)).to_be_visible()
        curl_line, command_line = [
            await page.get_by_label(f"The same with {name}").inner_text()
            for name in ("curl", "Command line")
        ]
        examples = PROJECT / "examples"
        code, output = await run("bash", "-c", curl_line, cwd=examples)
        assert code == 0, output
        orchestrator = f"{sys.executable} -m orchestrator_client.main"
        command = command_line.replace("orchestrator", orchestrator, 1)
        environment = f"cd {examples}; export PYTHONPATH={PROJECT} ORCHESTRATOR_URL={server.url};"
        code, output = await run("bash", "-c", f"{environment} {command}")
        assert code == 0, output.decode()
        for job in (1, 2):
            await server.wait(job, "Completed")
        names = server.query("SELECT name, user_id, service FROM job")
        assert names == [("A protein structure", 1, "example")] * 2
