"""The program as pip installs it: two folders, one command, and nothing else to import."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

import pytest

from tests.harness import PROJECT

_OURS = {"orchestrator_app", "orchestrator_client"}


def _run(*command: str, cwd: Path) -> str:
    """Run a command in an environment without the clone; fails the test if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment into which the wheel of this tree was installed."""
    place = tmp_path_factory.mktemp("installed")
    sources = place / "sources"
    listed = _run(
        "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=PROJECT
    )
    for name in listed.split("\0"):
        if name and (PROJECT / name).is_file():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_bytes((PROJECT / name).read_bytes())
    venv.create(place / "venv", with_pip=True)
    python = str(place / "venv" / "bin" / "python")
    _run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheels", str(sources), cwd=place)
    (wheel,) = (place / "wheels").glob("*.whl")
    _run(python, "-m", "pip", "install", "-q", str(wheel), cwd=place)
    return place / "venv"


def test_the_demo_runs_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    shown = _run(str(installed / "bin" / "orchestrator"), "demo", cwd=tmp_path)
    assert "state     Completed" in shown
    assert (tmp_path / "orchestrator-demo.zip").exists()


def test_the_agent_of_the_installed_wheel_says_what_it_needs(
    installed: Path, tmp_path: Path
) -> None:
    shown = _run(str(installed / "bin" / "orchestrator"), "agent", "--help", cwd=tmp_path)
    assert "--server" in shown


def test_the_whole_dashboard_is_installed(installed: Path) -> None:
    (copy,) = (installed / "lib").glob("python*/site-packages/orchestrator_app/dashboard")
    for path in (PROJECT / "dashboard").rglob("*"):
        if path.suffix in (".css", ".html", ".js", ".svg"):
            there = copy / path.relative_to(PROJECT / "dashboard")
            assert there.read_bytes() == path.read_bytes(), path


def test_nothing_but_the_client_can_be_imported_from_outside(
    installed: Path, tmp_path: Path
) -> None:
    python = str(installed / "bin" / "python")
    site = Path(
        _run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
        ).strip()
    )
    (record,) = site.glob("orchestrator_jobserver-*.dist-info/RECORD")
    tops = {line.split("/")[0] for line in record.read_text().splitlines()}
    assert {top for top in tops if not top.endswith(".dist-info") and top != ".."} == _OURS
    for name in ("store", "agent", "config", "events", "api"):
        code = f"import importlib.util; assert importlib.util.find_spec({name!r}) is None"
        _run(python, "-c", code, cwd=tmp_path)
    _run(python, "-c", "import orchestrator_client", cwd=tmp_path)
