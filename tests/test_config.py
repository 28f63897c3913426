"""Where settings come from and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import config
from agent.command import default_workdir
from config import ConfigError, ServiceLimits
from tests.settings_table import README, with_tables

pytestmark = pytest.mark.quick


def test_later_places_win(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text('PORT = 1\nMAX_AGE = 2\nLEASE = 3\n[services."My-Tool"]\nmax_runs = 4\n')
    environment = {"MAX_AGE": "20", "LEASE": "30", "SERVICE_EXAMPLE_TIMEOUT": "60", "HOME": "/"}
    settings = config.load(environment, {"LEASE": "300"}, file)
    assert (settings.port, settings.max_age, settings.lease) == (1, 20, 300.0)
    assert settings.services["My-Tool"] == ServiceLimits(max_runs=4)
    assert settings.services["example"] == ServiceLimits(timeout=60)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = config.load({}, {})
    assert (settings.host, settings.port, settings.db_path) == (
        "127.0.0.1",
        5000,
        "orchestrator.db",
    )
    assert settings.max_age == 864000
    assert settings.services == {"example": ServiceLimits(5, 10, None)}


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"PORT": "65536"}, "PORT"),
        ({"PORT": "http"}, "PORT"),
        ({"MAX_AGE": "0"}, "MAX_AGE"),
        ({"LEASE": "nan"}, "LEASE"),
        ({"SERVICE_DOCK_MAX_RUNS": "none"}, "SERVICE_DOCK_MAX_RUNS"),
        ({"ORCHESTRATOR_AGENT_TOKEN": "short"}, "ORCHESTRATOR_AGENT_TOKEN"),
    ],
)
def test_a_bad_value_is_refused_by_name(environment: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config.load(environment, {})


@pytest.mark.parametrize("text", ["PROT = 1", "PORT = ", 'PORT = "x"', "services = 3", "LEASE=[1]"])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"orchestrator\.toml"):
        config.load({}, {}, file)


def test_a_bad_limit_of_a_service_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "orchestrator.toml"
    file.write_text("[services.dock]\nmax_runs = 2\ntimeout = 0\n")
    with pytest.raises(ConfigError, match=r"services\.dock: timeout must be a whole number"):
        config.load({}, {}, file)


def test_an_agent_keeps_a_directory_for_each_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    here = default_workdir("node", "http://head:5000")
    assert here == Path("/state/orchestrator/node@head_5000")
    assert default_workdir("node", "https://user@[::1]:1/../x").parent == here.parent
    assert default_workdir("node", "http://other:5000") != here


def test_the_tables_of_the_readme_are_those_of_the_program() -> None:
    text = README.read_text()
    assert text == with_tables(text), "write them with: python -m tests.settings_table"


def test_a_service_setting_belongs_to_the_shortest_name() -> None:
    settings = config.load({"SERVICE_DOCK_MAX_RUNS": "3", "SERVICE_A_B_TIMEOUT": "4"}, {})
    assert set(settings.services) == {"example", "dock", "a_b"}
    assert settings.services["dock"] == ServiceLimits(max_runs=3)
