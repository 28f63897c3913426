"""How the pages look and whether everybody can read them: pictures, and axe's checks."""

from __future__ import annotations

import contextlib
import math
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from axe_playwright_python.async_playwright import Axe  # type: ignore[import-untyped]
from playwright.async_api import Page, expect

from tests.dashboard.conftest import WAIT_MS, NewPage
from tests.harness import PROJECT, Server, curl, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

expect.set_options(timeout=WAIT_MS)

SIZES = {360: 780, 1440: 900, 2560: 1440}

FOLD = r"""
printf '\033[1mFolding\033[0m T1104 with 3 recycles\n'
for i in $(seq 1 24); do
    printf 'recycle %d  pLDDT \033[32m%d.%d\033[0m  pTM 0.%d\n' $i $((70+i)) $i $((60+i))
done
printf '\033[33mwarning\033[0m: 3 residues without a template\n' >&2
mkdir -p models/relaxed; for i in 1 2 3; do echo "MODEL $i" > models/relaxed/rank_$i.pdb; done
"""
WRITES_PICTURE = r"""
import struct, zlib
w, h = 320, 200
rows = b''.join(
    b'\0' + bytes(v for x in range(w) for v in (x * 200 // w, 60 + y // 2, 255 - x * 120 // w))
    for y in range(h)
)
part = lambda t, d: struct.pack('>I', len(d)) + t + d + struct.pack('>I', zlib.crc32(t + d))
head = part(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
body = part(b'IDAT', zlib.compress(rows)) + part(b'IEND', b'')
open('contacts.png', 'wb').write(b'\x89PNG\r\n\x1a\n' + head + body)
"""
SCORES = "residue,chain,pLDDT,x,y,z\n" + "".join(
    f"GLY{number},A,{80 + 15 * math.sin(number / 9):.1f},{number * 1.5:.2f},{-number:.2f},0.00\n"
    for number in range(1, 90)
)


async def submit(site: Server, name: str, script: str, *fields: str, user: int = 1) -> int:
    """Upload a job that has a name and tags, as people make them."""
    folder = site.directory / "looks"
    folder.mkdir(exist_ok=True)
    (folder / "run.sh").write_text(script)
    (folder / "scores.csv").write_text(SCORES)
    (folder / "draw.py").write_text(WRITES_PICTURE)
    files = ("-F", "file=@run.sh", "-F", "file=@scores.csv", "-F", "file=@draw.py")
    parts = [part for field in fields for part in ("-F", field)]
    service = (
        () if any(field.startswith("service") for field in fields) else ("-F", "service=example")
    )
    answer = await curl(
        *(f"{site.url}/upload", *files, "-F", f"user_id={user}", "-F", f"name={name}"),
        *(*service, *parts),
        cwd=folder,
    )
    assert answer.status == 201, answer
    return int(answer.json()["id"])


def fill_statistics(site: Server) -> None:
    """Give the charts an hour of work to show."""
    now = int(time.time()) // 60 * 60
    with contextlib.closing(sqlite3.connect(site.database, timeout=20)) as db, db:
        for minute in range(1, 60):
            done = round(14 + 9 * math.sin(minute / 7) + minute % 5)
            failed = 2 if minute % 11 == 3 else 0
            wait = 3 + 2 * math.sin(minute / 5) + (9 if 24 < minute < 33 else 0)
            run_time = 41 + 12 * math.cos(minute / 8)
            row = (
                60,
                now - minute * 60,
                "example",
                done,
                done,
                failed,
                1 if minute % 17 == 0 else 0,
                0,
            )
            db.execute(
                "INSERT INTO statistic VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                (*row, done, done * wait, done, done * run_time),
            )


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """The addresses of the pages, once there is something to see on them."""
    return {}


async def prepare(site: Server, shown: dict[str, str]) -> Mapping[str, str]:
    """Let jobs be in all states, once for all tests of this file."""
    if shown:
        return shown
    fill_statistics(site)
    for number, ligand in enumerate(("imatinib", "dasatinib", "nilotinib")):
        await submit(
            site, f"Docking of {ligand}", "sleep 0.2", "tag=project:kinase", user=number + 1
        )
    draw = FOLD + "python3 draw.py"
    fold = await submit(site, "T1104, AlphaFold", draw, "tag=project:casp", "tag=model:3")
    bad = await submit(site, "Refine loop 42", "echo 'cannot open loop.pdb' >&2; exit 3", user=2)
    for job in range(1, bad + 1):
        await site.wait(job)
    killed = await submit(site, "Wrong box size", "sleep 600", "tag=project:md", user=3)
    await curl("-X", "POST", f"{site.url}/terminate/{killed}")
    running = await submit(
        site,
        "Umbrella sampling, window 7",
        'for i in $(seq 9999); do echo "step $i  E = -$((41000 + i)) kJ/mol"; sleep 0.05; done',
        "tag=project:md",
        user=3,
    )
    for number in range(5):
        await submit(
            site, f"Relaxation {number + 1}", "sleep 600", "service=docking", user=4 + number % 2
        )
    await site.wait(running, "Running")
    await eventually(
        lambda: site.query("SELECT count(*) FROM job WHERE state = 'Queued'")[0][0] >= 1, "a queue"
    )
    shown.update(
        {
            "overview": "",
            "jobs": "jobs",
            "job": f"jobs/{fold}",
            "running": f"jobs/{running}",
            "failed": f"jobs/{bad}",
            "files": f"jobs/{fold}?tab=files&path=contacts.png",
            "table": f"jobs/{fold}?tab=files&path=scores.csv",
            "history": f"jobs/{fold}?tab=history",
            "submit": "submit?example=1",
            "agents": "agents",
            "services": "services",
            "tokens": "tokens",
            "empty": "jobs?user=999",
        }
    )
    return shown


async def settle(page: Page) -> None:
    """Wait until a page shows what it has loaded."""
    await expect(page.locator("main .page")).to_be_visible()
    await expect(page.locator(".is-waiting")).to_have_count(0)
    await expect(page.locator(".lamp[data-state=live]")).to_be_visible()
    await page.wait_for_function(
        "() => ![...document.querySelectorAll('.tile-number, .chart-figure')]"
        ".some(number => number.textContent === '\\u2013')"
    )


async def problems_of(page: Page) -> list[tuple[str, list[str]]]:
    """Return what axe finds: labels that are missing, colours too close, an order of no sense."""
    violations = (await Axe().run(page)).response["violations"]
    return [
        (
            violation["id"],
            [node["html"][:150] + node["failureSummary"] for node in violation["nodes"]],
        )
        for violation in violations
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_every_page_can_be_read_by_everybody_in_both_themes(
    site: Server, new_page: NewPage, pictures: Path, shown: dict[str, str], theme: str
) -> None:
    pages = await prepare(site, shown)
    page = await new_page(f"{site.url}/ui/", color_scheme=theme, reduced_motion="reduce")
    problems = []
    for name, address in pages.items():
        await page.goto(f"{site.url}/ui/#/{address}")
        await settle(page)
        for width in (360, 1440):
            await page.set_viewport_size({"width": width, "height": SIZES[width]})
            await page.screenshot(path=pictures / f"{name}-{theme}-{width}.png")
            # nothing sticks out to the right
            wide = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, (name, width, wide)
            problems += [(name, str(width), *problem) for problem in await problems_of(page)]
    assert problems == []


async def test_a_large_screen_is_used_and_a_chosen_theme_is_kept(
    site: Server, new_page: NewPage, pictures: Path, shown: dict[str, str]
) -> None:
    pages = await prepare(site, shown)
    page = await new_page(f"{site.url}/ui/", color_scheme="light", reduced_motion="reduce")
    await page.set_viewport_size({"width": 2560, "height": SIZES[2560]})
    for name in ("overview", "jobs", "running"):
        await page.goto(f"{site.url}/ui/#/{pages[name]}")
        await settle(page)
        await page.screenshot(path=pictures / f"{name}-light-2560.png")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = await page.evaluate(ground)
    await page.get_by_role("button", name="Theme: Dark").click()
    dark = await page.evaluate(ground)
    assert dark != light
    await page.reload()
    await settle(page)
    assert await page.evaluate(ground) == dark
    await page.get_by_role("button", name="Theme: As the system").click()
    assert await page.evaluate(ground) == light


async def test_the_pictures_of_the_documentation_are_taken(
    site: Server, new_page: NewPage, pictures: Path, shown: dict[str, str]
) -> None:
    pages = await prepare(site, shown)
    document = (PROJECT / "docs" / "dashboard.md").read_text()
    named = set(re.findall(r"\(pictures/(\w+)\.png\)", document))
    assert named == {path.stem for path in (PROJECT / "docs" / "pictures").iterdir()}
    for name in sorted(named):
        theme = "dark" if name == "table" else "light"
        page = await new_page(f"{site.url}/ui/", color_scheme=theme, reduced_motion="reduce")
        await page.set_viewport_size({"width": 1280, "height": 800})
        await page.goto(f"{site.url}/ui/#/{pages[name]}")
        await settle(page)
        if name == "running":
            await expect(page.locator(".line").nth(30)).to_be_visible()
        await page.screenshot(path=pictures / f"{name}.png")


async def test_dialogs_and_the_log_in_can_be_read_by_everybody(
    site: Server, new_page: NewPage, pictures: Path, shown: dict[str, str]
) -> None:
    await prepare(site, shown)
    page = await new_page(f"{site.url}/ui/#/jobs", reduced_motion="reduce")
    await settle(page)
    await page.get_by_label("Select all jobs of this page").check()
    await page.get_by_role("toolbar").get_by_role("button", name="Terminate").click()
    await expect(page.get_by_role("dialog")).to_be_visible()
    await page.screenshot(path=pictures / "confirm-light-1280.png")
    assert await problems_of(page) == []
    await page.keyboard.press("Escape")
    await page.locator("#filter").focus()
    await page.screenshot(path=pictures / "filter-light-1280.png")
    assert await problems_of(page) == []
    await page.locator("h1").click()
    await page.keyboard.press("?")
    await page.screenshot(path=pictures / "keys-light-1280.png")
    assert await problems_of(page) == []
