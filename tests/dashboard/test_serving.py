"""The dashboard's files, as the server sends them."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from tests.harness import PROJECT, Server, curl, run

DASHBOARD = PROJECT / "dashboard"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FIRST_LOAD_BYTES = 60 * 1024


def headers_of(answer: bytes) -> dict[str, str]:
    """Return the headers of what ``curl -i`` printed, names in lower case."""
    head = answer.partition(b"\r\n\r\n")[0].decode()
    pairs = (line.partition(": ") for line in head.splitlines()[1:])
    return {name.lower(): value for name, _, value in pairs}


def imports_of(path: Path) -> set[Path]:
    """Return the modules that are loaded with a module, its own included."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for name in re.findall(
            r"^(?:import|\} from|import .*from) '(\.[^']+)';", module.read_text(), re.M
        ):
            waiting.append((module.parent / name).resolve())
    return found


async def test_the_page_is_served_with_its_policy_and_asked_for_again(site: Server) -> None:
    address = f"{site.url}/ui/"
    headers = headers_of((await curl("-i", address)).body)
    assert headers["content-security-policy"] == POLICY
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"
    answer = await curl("-H", f"If-None-Match: {headers['etag']}", address)
    assert (answer.status, answer.body) == (304, b"")
    script = await curl("-i", "-H", "Accept-Encoding: gzip", f"{site.url}/ui/main.js")
    headers = headers_of(script.body)
    assert (headers["content-encoding"], headers["vary"]) == ("gzip", "Accept-Encoding")
    body = script.body.partition(b"\r\n\r\n")[2]
    assert gzip.decompress(body) == (DASHBOARD / "main.js").read_bytes()
    assert headers["content-type"] == "text/javascript; charset=utf-8"
    answer = await curl("-H", f"If-None-Match: {headers['etag']}", f"{site.url}/ui/main.js")
    assert answer.status == 304


@pytest.mark.parametrize(
    "path", ["types.d.ts", "tsconfig.json", "../openapi.yaml", "%2e%2e/store.py"]
)
async def test_nothing_but_the_page_is_served(site: Server, path: str) -> None:
    answer = await curl("--path-as-is", f"{site.url}/ui/{path}")
    assert answer.status == 404
    assert answer.json()["status"] == "Unknown"


async def test_browsers_are_led_to_the_page_and_others_are_not(site: Server) -> None:
    plain = await curl(site.url)
    assert plain.body == b"Orchestrator is running\n"
    html = await curl("-H", "Accept: text/html,application/xhtml+xml", site.url)
    assert b'href="ui/"' in html.body
    answer = await curl("-L", f"{site.url}/ui")
    assert (answer.status, b"<title>Orchestrator</title>" in answer.body) == (200, True)


def test_the_first_load_is_small_and_asked_for_at_once() -> None:
    index = (DASHBOARD / "index.html").read_text()
    named = {
        (DASHBOARD / name).resolve()
        for name in re.findall(r'(?:href|src)="([\w/.-]+\.(?:css|js|svg))"', index)
    }
    first = imports_of(DASHBOARD / "main.js")
    page = imports_of(DASHBOARD / "pages" / "overview.js")
    # what the page needs is asked for with the page, not one after the other
    assert first | page <= named
    files = {DASHBOARD / "index.html", *named, *first, *page}
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) < FIRST_LOAD_BYTES


def test_no_markup_is_made_of_text() -> None:
    for path in DASHBOARD.rglob("*.js"):
        text = path.read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
        ):
            assert word not in text, (path, word)
    index = (DASHBOARD / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", index)


async def test_the_type_checker_finds_nothing() -> None:
    tsc = PROJECT / ".ci" / "tools" / "node_modules" / ".bin" / "tsc"
    if not tsc.exists():
        pytest.skip("no TypeScript: npm install --prefix .ci/tools typescript@5.9")
    code, output = await run(str(tsc), "-p", str(DASHBOARD))
    assert code == 0, output.decode()
