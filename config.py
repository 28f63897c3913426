"""Settings: defaults < TOML file < environment < command line, validated once.

The same names everywhere: ``PORT`` in the environment is ``PORT`` in the TOML file
and ``--port`` on the command line. A service exists when any of its
``SERVICE_<NAME>_RUNS_PER_USER``, ``_MAX_RUNS`` or ``_TIMEOUT`` is set; the TOML file
may also use tables, ``[services.NAME]``, which allow any name.
"""

from __future__ import annotations

import dataclasses
import enum
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

VERSION = "0.1.0"

AGENT_TOKEN_VARIABLE = "ORCHESTRATOR_AGENT_TOKEN"

MAX_UPLOAD_BYTES = 400 * 1024 * 1024
"""The largest request body of POST /upload (the API contract's 400 MB, read as MiB)."""

MAX_FILES = 10_000
"""The most files that a job may ever have; their list must fit into one message to the agent."""

LONGEST_TIMEOUT = 10 * 366 * 24 * 3600
"""The longest time limit of a job, in seconds."""

_MIB = 1024 * 1024

_SERVICE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERVICE_KEY = re.compile(r"SERVICE_(?P<name>.+)_(?P<limit>RUNS_PER_USER|MAX_RUNS|TIMEOUT)")
_AGENT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class ConfigError(Exception):
    """A setting is missing, unknown or has a value that can't be used."""


class LogFormat(enum.StrEnum):
    """How log lines are written."""

    TEXT = "text"
    JSON = "json"


class AccessLog(enum.StrEnum):
    """Which requests get a line in the log.

    ``notable``: those that change something, fail, or take a second or longer. Clients poll,
    scrapers scrape: one line for each answered poll would bury what a person looks for.
    """

    OFF = "off"
    NOTABLE = "notable"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Quotas of one service; ``timeout`` is in seconds, None for no limit."""

    runs_per_user: int = 5
    max_runs: int = 10
    timeout: int | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the server can be told. Durations are in seconds.

    ``max_age``: how long files of a final job are kept. ``lease``: how long an agent
    may be away before its jobs go to another. ``max_attempts``: how often a job may
    be started. ``kill_grace``: time between SIGTERM and SIGKILL for a job's processes.
    ``max_result_bytes``, ``max_result_files``: what a job may leave, before it is compressed;
    ``max_log_bytes``: what is kept of each of its two output streams.
    ``upload_idle``: how long a client may send nothing in the middle of an upload.
    ``max_files``: the most files of a job. ``max_open_uploads`` of one user, and
    ``max_open_uploads_total`` of all, may arrive at a time; ``max_queued_jobs`` of one user
    may wait. ``slots``: slots of the embedded agent. ``allowed_hosts``: further names under
    which browsers and clients may address the server.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    db_path: str = "orchestrator.db"
    max_age: int = 10 * 24 * 3600
    lease: float = 60.0
    max_attempts: int = 3
    kill_grace: float = 5.0
    max_result_bytes: int = 4 * 1024 * _MIB
    max_result_files: int = 1_000_000
    max_log_bytes: int = 16 * _MIB
    max_files: int = MAX_FILES
    upload_idle: float = 60.0
    max_open_uploads: int = 8
    max_open_uploads_total: int = 128
    max_queued_jobs: int = 100_000
    slots: int = field(default_factory=lambda: os.cpu_count() or 1)
    allowed_hosts: tuple[str, ...] = ()
    log_format: LogFormat = LogFormat.TEXT
    access_log: AccessLog = AccessLog.NOTABLE
    agent_token: str | None = field(default=None, repr=False)
    services: Mapping[str, ServiceLimits] = field(
        default_factory=lambda: MappingProxyType({"example": ServiceLimits()})
    )


_FIXED_AT_START = frozenset(
    {"host", "port", "db_path", "slots", "agent_token", "log_format"},
)
"""Settings that can't change while the server runs: it has bound, opened or started them."""


class SettingsInForce:
    """The settings that hold now. A reload replaces them, so ask ``current`` at each use."""

    def __init__(self, settings: Settings) -> None:
        self.current = settings
        self._listeners: list[Callable[[], None]] = []

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have ``listener`` called after each change."""
        self._listeners.append(listener)

    def replace(self, settings: Settings) -> SettingsChange:
        """Put the new settings in force, except those that need a restart to change."""
        before = self.current
        changed = {name for name in _ATTRIBUTES if getattr(settings, name) != getattr(before, name)}
        kept = {name: getattr(before, name) for name in _FIXED_AT_START}
        self.current = dataclasses.replace(settings, **kept)
        for listener in self._listeners:
            listener()
        return SettingsChange(
            _setting_names(changed - _FIXED_AT_START), _setting_names(changed & _FIXED_AT_START)
        )


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """What a reload did, by the names of settings: changed, or left because it needs a restart."""

    changed: tuple[str, ...]
    needing_restart: tuple[str, ...]


_ATTRIBUTES = tuple(attribute.name for attribute in dataclasses.fields(Settings))


def _setting_names(attributes: set[str]) -> tuple[str, ...]:
    names = {attribute: name for name, (attribute, _) in _SETTINGS.items()}
    return tuple(sorted(names.get(attribute, attribute) for attribute in attributes))


def _integer(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return parse


def _seconds(low: float, high: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if not isinstance(value, (int, float, str)) or isinstance(value, bool):
            raise ValueError("must be a number of seconds")
        number = float(value)
        if not low <= number <= high:
            raise ValueError(f"must be from {low:g} to {high:g} seconds")
        return number

    return parse


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("must be a text that is not empty")
    return value


def _token(value: object) -> str:
    token = _text(value)
    if len(token) < 16 or not token.isascii() or " " in token:
        raise ValueError("must be at least 16 ASCII characters without spaces")
    return token


def _names(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("must be names, separated by commas")
    return tuple(part.strip().lower() for part in parts if part.strip())


def _one_of(choices: type[enum.StrEnum]) -> Callable[[object], enum.StrEnum]:
    def parse(value: object) -> enum.StrEnum:
        try:
            return choices(_text(value))
        except ValueError:
            raise ValueError(f"must be one of: {', '.join(choices)}") from None

    return parse


_COUNT = _integer(1, 1_000_000)

_SETTINGS: Mapping[str, tuple[str, Callable[[object], Any]]] = {
    "HOST": ("host", _text),
    "PORT": ("port", _integer(0, 65535)),
    "DB_PATH": ("db_path", _text),
    "MAX_AGE": ("max_age", _integer(1, LONGEST_TIMEOUT)),
    "LEASE": ("lease", _seconds(1, 7 * 24 * 3600)),
    "MAX_ATTEMPTS": ("max_attempts", _integer(1, 1000)),
    "KILL_GRACE": ("kill_grace", _seconds(0, 3600)),
    "MAX_RESULT_BYTES": ("max_result_bytes", _integer(1, 2**48)),
    "MAX_RESULT_FILES": ("max_result_files", _integer(1, 100_000_000)),
    "MAX_LOG_BYTES": ("max_log_bytes", _integer(2, 2**40)),
    "MAX_FILES": ("max_files", _integer(1, MAX_FILES)),
    "UPLOAD_IDLE": ("upload_idle", _seconds(0.1, 24 * 3600)),
    "MAX_OPEN_UPLOADS": ("max_open_uploads", _COUNT),
    "MAX_OPEN_UPLOADS_TOTAL": ("max_open_uploads_total", _COUNT),
    "MAX_QUEUED_JOBS": ("max_queued_jobs", _integer(1, 1_000_000_000)),
    "SLOTS": ("slots", _integer(1, 4096)),
    "ALLOWED_HOSTS": ("allowed_hosts", _names),
    "LOG_FORMAT": ("log_format", _one_of(LogFormat)),
    "ACCESS_LOG": ("access_log", _one_of(AccessLog)),
    AGENT_TOKEN_VARIABLE: ("agent_token", _token),
}

_LIMITS: Mapping[str, tuple[str, Callable[[object], Any]]] = {
    "RUNS_PER_USER": ("runs_per_user", _COUNT),
    "MAX_RUNS": ("max_runs", _COUNT),
    "TIMEOUT": ("timeout", _integer(1, LONGEST_TIMEOUT)),
}


def load(
    environment: Mapping[str, str],
    arguments: Mapping[str, object],
    config_file: Path | None = None,
) -> Settings:
    """Put the settings together; ``arguments`` holds what the command line set, by setting name.

    Raises :class:`ConfigError` that names the place and the setting.
    """
    layers: list[tuple[str, Mapping[str, object]]] = []
    if config_file is not None:
        layers.append((str(config_file), _read_toml(config_file)))
    known = {name: value for name, value in environment.items() if _is_setting(name)}
    layers.append(("environment", known))
    layers.append(("command line", arguments))

    values: dict[str, Any] = {}
    services: dict[str, ServiceLimits] = {"example": ServiceLimits()}
    for place, layer in layers:
        for name, value in layer.items():
            _apply(place, name, value, values, services)
    return Settings(**values, services=MappingProxyType(services))


def checked_agent_name(name: str) -> str:
    """Return ``name`` if agents may be called so; raises :class:`ConfigError`."""
    if not _AGENT_NAME.fullmatch(name):
        raise ConfigError(f"agent name {name!r}: use letters, digits, dot, dash and underscore")
    return name


def checked_token(token: str) -> str:
    """Return ``token`` without white space around it; raises :class:`ConfigError`."""
    try:
        return _token(token.strip())
    except ValueError as error:
        raise ConfigError(f"agent token {error}") from None


def _is_setting(name: str) -> bool:
    return name in _SETTINGS or _SERVICE_KEY.fullmatch(name) is not None


def _read_toml(path: Path) -> Mapping[str, object]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    services = document.pop("services", {})
    if not isinstance(services, dict):
        raise ConfigError(f"{path}: services must be a table")
    layer: dict[str, object] = {name.upper(): value for name, value in document.items()}
    for service, limits in services.items():
        if not isinstance(limits, dict):
            raise ConfigError(f"{path}: services.{service} must be a table")
        layer[f"services.{service}"] = limits
    return layer


def _apply(
    place: str,
    name: str,
    value: object,
    values: dict[str, Any],
    services: dict[str, ServiceLimits],
) -> None:
    try:
        if name.startswith("services.") and isinstance(value, dict):
            service = name.removeprefix("services.")
            _define(services, service, {key.upper(): limit for key, limit in value.items()})
        elif name in _SETTINGS:
            attribute, parse = _SETTINGS[name]
            values[attribute] = parse(value)
        elif match := _SERVICE_KEY.fullmatch(name):
            _define(services, match["name"].lower(), {match["limit"]: value})
        else:
            raise ValueError("unknown setting")
    except ValueError as error:
        raise ConfigError(f"{place}: {name}: {error}") from None


def _define(services: dict[str, ServiceLimits], service: str, limits: Mapping[str, object]) -> None:
    if not _SERVICE_NAME.fullmatch(service):
        raise ValueError("a service name has letters, digits, dot, dash and underscore")
    changes: dict[str, Any] = {}
    for name, value in limits.items():
        if name not in _LIMITS:
            raise ValueError(f"unknown limit {name}")
        attribute, parse = _LIMITS[name]
        try:
            changes[attribute] = parse(value)
        except ValueError as error:
            raise ValueError(f"{attribute} {error}") from None
    services[service] = dataclasses.replace(services.get(service, ServiceLimits()), **changes)
