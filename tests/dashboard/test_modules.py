"""The dashboard's modules alone, in the browser: what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from tests.harness import Server

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(browser: Browser, site: Server) -> Page:
    """One page for all: modules alone change nothing in it."""
    page = await browser.new_page()
    await page.goto(f"{site.url}/ui/")
    return page


async def call(page: Page, module: str, expression: str, argument: Any = None) -> Any:
    """Evaluate an expression over the exports ``m`` of a module and an argument ``x``."""
    return await page.evaluate(
        f"async x => {{ const m = await import('/ui/{module}.js'); return {expression}; }}",
        argument,
    )


async def test_numbers_are_said_with_their_units(page: Page) -> None:
    seconds = [0, 0.34, 0.9999, 4.21, 59.97, 60, 3600, 11105, 90061, -3]
    assert await call(page, "format", "x.map(m.duration)", seconds) == [
        *("0 ms", "340 ms", "1.0 s", "4.2 s", "1 m", "1 m", "1 h", "3 h 5 m", "1 d 1 h", "0 ms")
    ]
    sizes = [0, 1, 1023, 1024, 1536, 1023 * 1024 + 1023, 13_000_000, 2**40, 2**60]
    assert await call(page, "format", "x.map(m.bytes)", sizes) == [
        *(
            "0 B",
            "1 B",
            "1023 B",
            "1.0 KiB",
            "1.5 KiB",
            "1.0 MiB",
            "12.4 MiB",
            "1.0 TiB",
            "1024 PiB",
        )
    ]
    words = ["plain-1.pdb", "a b", "it's", "$(x)", ""]
    assert await call(page, "format", "x.map(m.quoted)", words) == [
        *("plain-1.pdb", "'a b'", "'it'\\''s'", "'$(x)'", "''")
    ]
    ticks = [0, 1, 3, 7, 12, 26, 99, 101]
    assert await call(page, "chart", "x.map(m.roundUp)", ticks) == [1, 1, 5, 10, 20, 50, 100, 200]


@pytest.mark.parametrize(
    ("typed", "terms"),
    [
        ("", []),
        ("17", [("id", "17")]),
        ("#17", [("id", "17")]),
        ("status:failed,KILLED", [("status", "Failed,Killed")]),
        ('service:"My Tool" out of memory', [("service", "My Tool"), ("text", "out of memory")]),
        ("tag:project:x tag:a:b", [("tag", "project:x"), ("tag", "a:b")]),
        ("user:1 user:2", [("user", "2")]),
        ("user_id:3 state:Running", [("user", "3"), ("status", "Running")]),
        ('"17" more', [("text", "17 more")]),
    ],
)
async def test_filters_are_read_and_written(
    page: Page, typed: str, terms: list[tuple[str, str]]
) -> None:
    parsed = await call(page, "filter", "m.parse(x).map(term => [term.key, term.value])", typed)
    assert [tuple(term) for term in parsed] == terms
    again = "m.parse(m.write(m.parse(x))).map(term => [term.key, term.value])"
    assert await call(page, "filter", again, typed) == parsed


@pytest.mark.parametrize("typed", ["colour:red", "status:Done", "user:x", "tag:x", "since:soon"])
async def test_what_is_no_filter_is_said(page: Page, typed: str) -> None:
    tried = "(() => { try { m.parse(x); return ''; } catch (error) { return error.message; } })()"
    assert typed.partition(":")[0] in (await call(page, "filter", tried, typed)).lower() or (
        "state" in await call(page, "filter", tried, typed)
    )


async def test_the_place_in_a_log_counts_bytes_and_not_marks(page: Page) -> None:
    offset = "m.offsetAfter(x[0], x[1], new TextEncoder().encode(x[1]).length)"
    assert await call(page, "log/reader", offset, [10, "abc\n"]) == 14
    assert await call(page, "log/reader", offset, [10, "\u00e9\n"]) == 13
    marked = "ab\n[... 1000 bytes left out ...]\ncd"
    assert await call(page, "log/reader", offset, [10, marked]) == 10 + 4 + 1000
    again = "old\n[... attempt 2 ...]\nnew"
    assert await call(page, "log/reader", offset, [500, again]) == 3


async def test_a_buffer_of_lines_is_bounded_and_shows_what_a_terminal_would(page: Page) -> None:
    lines = await call(
        page,
        "log/buffer",
        """(() => {
            const buffer = new m.LogBuffer();
            for (const [source, text] of x) buffer.add(source, text, null);
            return Array.from({ length: buffer.end }, (_, at) => {
                const { source, text } = buffer.line(at);
                return [source, text];
            });
        })()""",
        [
            *(["stdout", "on"], ["stderr", "err\n"], ["stdout", "e\ntw"], ["stdout", "o\r\n"]),
            *(
                ["stdout", "10%\r"],
                ["stdout", "20%\r100%\n\nend"],
            ),
        ],
    )
    assert lines == [
        *(["stdout", "one"], ["stderr", "err"], ["stdout", "two"], ["stdout", "100%"]),
        *(["stdout", ""], ["stdout", "end"]),
    ]
    kept = await call(
        page,
        "log/buffer",
        """(() => {
            const buffer = new m.LogBuffer();
            const piece = `${'y'.repeat(60)}\\n`.repeat(10_000);
            for (let at = 0; at < 60; at += 1) buffer.add('stdout', piece, null);
            return [buffer.end, buffer.end - buffer.first];
        })()""",
    )
    assert kept[0] == 600_000
    assert 100_000 < kept[1] <= 200_000


async def test_lists_keep_their_elements_and_have_one_for_each_item(page: Page) -> None:
    shown = await call(
        page,
        "dom",
        """(() => {
            const list = document.createElement('ul');
            const show = items => m.keyed(list, items, item => item[0],
                ([key, text]) => m.h('li', {}, text),
                (element, [key, text]) => m.setText(element, text));
            show(x[0]);
            const kept = list.children[1];
            for (const items of x.slice(1)) show(items);
            return [[...list.children].map(child => child.textContent), kept === list.children[0]];
        })()""",
        [
            [["a", "1"], ["b", "2"], ["c", "3"]],
            [["b", "4"], ["same", "5"], ["same", "6"]],
            [["b", "7"], ["same", "8"], ["same", "9"], ["d", "10"]],
        ],
    )
    assert shown == [["7", "8", "9", "10"], True]


async def test_what_needs_attention_is_found_and_the_worst_comes_first(page: Page) -> None:
    agent = {"id": "1", "name": "node7", "is_connected": True, "is_drained": False, "busy": 0}
    service = {"name": "fold", "is_configured": True, "queued": 0, "active": 0, "agents": ["node7"]}
    disk = {"free": 50 * 2**30, "total": 100 * 2**30, "database": 1}
    calm = {"points": [{"failed": 0, "invalid": 0}], "disk": disk}

    async def said(agents: list[Any], services: list[Any], stats: dict[str, Any]) -> list[str]:
        found = "m.attention(...x).map(item => `${item.level}: ${item.text}`)"
        items: list[str] = await call(page, "pages/attention", found, [agents, services, stats])
        return items

    assert await said([agent], [service], calm) == ["good: Nothing. All is well."]
    assert await said(
        [agent, {**agent, "id": "2", "name": "gpu1", "set_aside": "disk full"}],
        [{**service, "agents": [], "queued": 3}],
        {"points": [{"failed": 2, "invalid": 0}], "disk": {**disk, "free": 2**30 // 8}},
    ) == [
        "bad: The server’s disk is nearly full: 128 MiB of 100 GiB are free.",  # noqa: RUF001
        "bad: No agent offers fold; 3 jobs wait.",
        "bad: gpu1 is set aside: disk full",
        "warn: 2 jobs failed in the last hour.",
    ]
    away = {**agent, "is_connected": False, "busy": 2, "lease_left": 30}
    assert await said([agent, away], [service], calm) == [
        "bad: node7 is away with 2 jobs; they go to others in 30.0 s."
    ]
    assert await said([away], [{**service, "queued": 4}], calm) == [
        "bad: No agent is connected; 4 jobs wait.",
        "bad: node7 is away with 2 jobs; they go to others in 30.0 s.",
    ]
    assert await said([{**agent, "problem": "Slurm is silent"}], [service], calm) == [
        "bad: node7 starts no jobs: Slurm is silent"
    ]
    aside = [{"service": "fold", "reason": "invalid partition"}]
    assert await said([{**agent, "services_set_aside": aside}], [service], calm) == [
        "bad: fold is set aside on node7: invalid partition"
    ]
