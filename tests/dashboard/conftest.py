"""Fixtures for tests in a real browser: one browser and one server for each file of tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

from tests.harness import Server, running_server

CHROMIUM = shutil.which("chromium")
# for a machine without a network, a screen or a user of its own
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WAIT_MS = 60_000
"""How long a test waits for something to appear, on a machine that is busy with other work."""

NewPage = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium; nothing is downloaded."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian: chromium)")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """A server with an embedded agent of four slots and two services."""
    directory = tmp_path_factory.mktemp("site")
    environment = {"SERVICE_EXAMPLE_MAX_RUNS": "10", "SERVICE_DOCKING_TIMEOUT": "3600"}
    async with running_server(directory, "--slots", "4", environment=environment) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def new_page(browser: Browser) -> AsyncIterator[NewPage]:
    """Opens pages, each with a profile of its own. None may have complained when the test ends.

    What the browser says of answers with a status of failure is no complaint of the page.
    """
    complaints: list[str] = []
    contexts: list[BrowserContext] = []

    async def make(address: str, **options: object) -> Page:
        context = await browser.new_context(
            viewport={"width": 1280, "height": 800},
            accept_downloads=True,
            **options,  # type: ignore[arg-type]
        )
        contexts.append(context)
        page = await context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text)
                if message.type == "error"
                and not message.text.startswith("Failed to load resource")
                else None
            ),
        )
        await page.goto(address)
        return page

    yield make
    for context in contexts:
        await context.close()
    assert complaints == []


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where pictures of the pages go, for people to look at: ``$DASHBOARD_PICTURES`` if set."""
    folder = Path(os.environ.get("DASHBOARD_PICTURES", tmp_path / "pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
