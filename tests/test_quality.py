"""Types, lint and layout, so that one test command checks all of it."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from tests.harness import PROJECT, run

MAY_IMPORT = {
    "protocol": set[str](),
    "config": set[str](),
    "event_loop": set[str](),
    "logs": {"config"},
    "metrics": set[str](),
    "supervisor": set[str](),
    "forkserver": {"supervisor"},
    "launcher": set[str](),
    "channel": {"protocol"},
    "events": {"protocol"},
    "database": {"metrics"},
    "access": set[str](),
    "records": {"protocol", "database"},
    "schema": {"database"},
    "store_blobs": {"protocol", "records", "database"},
    "store_output": {"protocol", "events", "records", "database", "store_blobs"},
    "store_jobs": {"protocol", "events", "records", "database", "store_blobs"},
    "store_upload": {"protocol", "records", "database", "metrics", "store_blobs", "store_jobs"},
    "store_search": {"protocol", "events", "records", "database"},
    "store_results": {"protocol", "events", "records"},
    "store_status": {"events", "records"},
    "store_beside": {"protocol", "access", "database", "schema", "store_blobs"},
    "store": {
        *("protocol", "events", "records", "database", "access", "metrics", "schema"),
        *("store_blobs", "store_output", "store_jobs", "store_upload", "store_search"),
        *("store_beside", "store_results", "store_status"),
    },
    "instruments": {"protocol", "events", "records", "metrics"},
    "scheduler": {"protocol", "events", "records", "config"},
    "session": {
        *("protocol", "channel", "events", "records", "store", "incoming", "config"),
    },
    "dispatch": {
        *("protocol", "events", "records", "store", "database", "scheduler", "session"),
        *("incoming", "config"),
    },
    "incoming": {"protocol"},
    "api_answers": {"events", "records", "database", "dispatch", "config"},
    "api_log": {"api_answers", "api_access", "config", "instruments"},
    "api_operations": {
        *("protocol", "config", "store", "database", "session", "dispatch", "metrics"),
        *("instruments", "api_answers", "api_access"),
    },
    "api_guard": {"config", "api_answers"},
    "api_form": {"protocol", "records", "store_upload", "config", "api_answers"},
    "api_connection": {"api_answers"},
    "api_jobs": {
        *("protocol", "events", "records", "store", "dispatch"),
        *("api_answers", "api_connection", "api_form", "api_access"),
    },
    "api_events": {"protocol", "events", "store", "api_answers", "api_connection", "api_jobs"},
    "zip_members": set[str](),
    "api_ranges": set[str](),
    "api_files": {
        *("protocol", "records", "store", "dispatch", "incoming", "zip_members", "zip_stream"),
        *("api_answers", "api_connection", "api_jobs", "api_ranges"),
    },
    "api_access": {"access", "database", "store", "api_answers"},
    "api_submit": {
        *("protocol", "records", "store", "store_upload", "dispatch", "config"),
        *("api_answers", "api_access", "api_form"),
    },
    "api_output": {"protocol", "events", "records", "store", "api_answers", "api_connection"},
    "api": {
        *("protocol", "store", "database", "dispatch", "config"),
        *("api_answers", "api_guard", "api_access", "api_form", "api_submit"),
        *(
            "api_jobs",
            "api_events",
            "api_files",
            "api_output",
            "api_operations",
            "api_log",
            "instruments",
        ),
    },
    "demo": {"api"},
    "orchestrator": {
        *("protocol", "channel", "store", "store_beside", "database", "dispatch", "config"),
        *(
            "access",
            "api",
            "api_connection",
            "api_log",
            "instruments",
            "logs",
            "demo",
            "event_loop",
        ),
    },
    "archive": set[str](),
    "runner": {"protocol", "launcher", "archive"},
    "inotify": set[str](),
    "follower": {"protocol", "channel", "inotify", "runner"},
    "agent": {
        *("protocol", "channel", "runner", "launcher", "follower", "inotify"),
        *("snapshots", "config", "logs", "event_loop"),
    },
    "snapshots": {"protocol", "runner"},
    "zip_stream": set[str](),
}
"""The imports that docs/architecture.md allows."""


@pytest.mark.parametrize(
    "command",
    [["mypy"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    ids=" ".join,
)
async def test_the_checkers_find_nothing(command: list[str]) -> None:
    code, output = await run(sys.executable, "-m", *command, cwd=PROJECT)
    assert code == 0, output.decode()


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_imports_go_one_way() -> None:
    modules = {path.stem: path for path in PROJECT.glob("*.py")}
    assert set(modules) == set(MAY_IMPORT)
    for name, path in modules.items():
        assert _imports(path) & set(modules) <= MAY_IMPORT[name], name


def test_every_module_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    assert sorted(setup["options"]["py_modules"].split()) == sorted(MAY_IMPORT)


def test_sql_only_in_the_store_and_no_print_in_library_code() -> None:
    for path in PROJECT.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
        if not path.stem.startswith("store_") and path.stem not in ("store", "database"):
            assert "sqlite" not in "".join(_imports(path)), path


def test_the_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text()
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    assert command in readme
    assert (PROJECT / ".ci" / "run").read_text().endswith(f"{command}\n")


def test_every_test_that_the_fault_matrix_names_is_there() -> None:
    text = (PROJECT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = "".join(path.read_text() for path in (PROJECT / "tests").rglob("*.py"))
    assert named
    assert {name for name in named if f"def {name}(" not in tests} == set()
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (PROJECT / path).exists(), path
