"""Types, lint and layout, so that one test command checks all of it."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

from tests.harness import PROJECT, run

pytestmark = pytest.mark.quick

_LONGEST_CLASS, _LONGEST_MODULE = 300, 450  # lines
_MODULES_AT_THE_TOP = 9


@pytest.mark.parametrize(
    "command",
    [["mypy"], ["ruff", "check", "."], ["ruff", "format", "--check", "."]],
    ids=" ".join,
)
async def test_the_checkers_find_nothing(command: list[str]) -> None:
    code, output = await run(sys.executable, "-m", *command, cwd=PROJECT)
    assert code == 0, output.decode()


_RULE = re.compile(r"^\| `([\w/]+)` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def _modules() -> dict[str, Path]:
    """Return all modules of the program by their names with slashes."""
    paths = list(PROJECT.glob("*.py"))
    for package in PROJECT.glob("*/__init__.py"):
        if package.parent.name not in ("bench", "tests"):
            paths += package.parent.rglob("*.py")
    return {str(path.relative_to(PROJECT).with_suffix("")): path for path in paths}


def _imported(path: Path) -> set[str]:
    """Return what a module imports, ours and others', by names with slashes."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.replace(".", "/") for name in names}


def _rules() -> dict[str, set[str]]:
    """Return what each part may import, as docs/architecture.md says."""
    text = (PROJECT / "docs" / "architecture.md").read_text()
    return {part: set(re.findall(r"`([\w/]+)`", may)) for part, may in _RULE.findall(text)}


def _covers(part: str, module: str) -> bool:
    return module.startswith(part) if part.endswith("/") else module == part


def test_imports_go_one_way() -> None:
    modules, rules = _modules(), _rules()
    assert {part for part in rules if not any(_covers(part, module) for module in modules)} == set()
    for name, path in modules.items():
        parts = [part for part in rules if _covers(part, name)]
        assert parts, f"docs/architecture.md has no row for {name}"
        own = max(parts, key=len)
        for other in _imported(path) & set(modules):
            if other.endswith("/__init__"):
                continue
            may = {own, *rules[own]}
            assert any(_covers(part, other) for part in may), f"{name} imports {other}"


def test_handlers_import_no_handlers() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    sentence = re.search(r"none of(.*?)imports another of these", text, re.DOTALL)
    assert sentence
    handlers = set(re.findall(r"`([\w/]+)`", sentence[1]))
    modules = _modules()
    defined = {
        name
        for name, path in modules.items()
        if name.startswith("api/") and re.search(r"^class \w*Handlers\b", path.read_text(), re.M)
    }
    assert handlers == defined
    for name in handlers:
        assert _imported(modules[name]) & handlers <= {name}, name


def test_the_tree_of_the_documentation_is_the_tree_of_the_files() -> None:
    text = (PROJECT / "docs" / "architecture.md").read_text()
    tree = text.partition("## The tree")[2].partition("```\n")[2].partition("```")[0]
    shown = set(re.findall(r"^([\w.]+(?:/|\.py))", tree, re.MULTILINE))
    tops = {name.split("/")[0] + ("/" if "/" in name else ".py") for name in _modules()}
    assert tops - shown == set()
    assert {name for name in shown if not (PROJECT / name).exists()} == set()


def test_classes_and_modules_are_small_enough_to_be_read() -> None:
    for name, path in _modules().items():
        text = path.read_text()
        tree = ast.parse(text)
        reason = ast.get_docstring(tree) or ""
        assert len(text.splitlines()) <= _LONGEST_MODULE or "long because" in reason, name
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= _LONGEST_CLASS, f"{name}: {node.name} has {lines} lines"


def test_few_modules_stand_at_the_top() -> None:
    assert len(list(PROJECT.glob("*.py"))) <= _MODULES_AT_THE_TOP


def test_no_import_goes_in_a_circle() -> None:
    modules = _modules()
    waiting = {name: _imported(path) & set(modules) for name, path in modules.items()}
    while free := {name for name, others in waiting.items() if not others & set(waiting)}:
        waiting = {name: others for name, others in waiting.items() if name not in free}
    assert waiting == {}


def test_every_folder_of_the_program_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    folders = {path.parent for path in _modules().values()} - {PROJECT}
    ours = {".".join(folder.relative_to(PROJECT).parts) for folder in folders}
    packages = {
        name if name.split(".")[0] == "orchestrator_client" else f"orchestrator_app.{name}"
        for name in ours
    }
    assert set(setup["options"]["packages"].split()) == packages | {"orchestrator_app"}


def test_sql_only_in_storage_and_no_print_in_library_code() -> None:
    for name, path in _modules().items():
        text = path.read_text()
        assert not re.search(r"^\s*print\(", text, re.MULTILINE), path
        if not name.startswith("storage/") and name != "store":
            assert not any(
                other.split("/")[0] in ("sqlite3", "aiosqlite") for other in _imported(path)
            ), path


def test_the_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (PROJECT / "README.md").read_text()
    command = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest"
    assert command in readme
    assert (PROJECT / ".ci" / "run").read_text().endswith(f"{command}\n")


def test_the_ci_pins_every_package_that_is_asked_for() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    names = set(re.findall(r"^([A-Za-z][\w-]*)", wanted, re.MULTILINE))
    assert {"aiohttp", "multipart", "pytest"} <= names
    text = (PROJECT / ".ci" / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))
    known = {name.lower().replace("_", "-") for name in pinned}
    assert {name for name in names if name.lower().replace("_", "-") not in known} == set()
    assert "PIP_CONSTRAINT" in (PROJECT / ".ci" / "run").read_text()


def test_every_test_that_the_fault_matrix_names_is_there() -> None:
    text = (PROJECT / "docs" / "reliability.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    tests = "".join(path.read_text() for path in (PROJECT / "tests").rglob("*.py"))
    assert named
    assert {name for name in named if f"def {name}(" not in tests} == set()
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (PROJECT / path).exists(), path


async def test_no_program_of_others_is_kept_in_the_repository() -> None:
    if not (PROJECT / ".git").exists():
        pytest.skip("not a clone")
    code, output = await run("git", "ls-files", "-z", cwd=PROJECT)
    assert code == 0, output.decode()
    names = [name for name in output.decode().split("\0") if name]
    assert [name for name in names if "node_modules" in name] == []
    large = [name for name in names if (PROJECT / name).is_file()]
    assert [name for name in large if (PROJECT / name).stat().st_size > 400_000] == []
