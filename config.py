"""Settings: defaults < TOML file < environment < command line, validated once.

The same names everywhere: ``PORT`` in the environment is ``PORT`` in the TOML file
and ``--port`` on the command line. A service exists when any of its
``SERVICE_<NAME>_...`` settings is set; the TOML file may also use tables,
``[services.NAME]``, which allow any name.

Each setting is one row of a table, with its type, default, meaning and whether a reload
changes it: environment, TOML, ``--help`` and the README's tables are all made of that row
or checked against it. The module is long because the tables are.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import ipaddress
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jobs import (
    MAX_CPUS,
    MAX_GPUS,
    MAX_MEMORY_BYTES,
    Isolation,
    IsolationKind,
    Resources,
    parse_memory,
)

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


class TokenRule(enum.StrEnum):
    """Who may use the API without a token: ``optional``: everybody until there is the first one."""

    REQUIRED = "required"
    OPTIONAL = "optional"


# --- values -----------------------------------------------------------------------


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


def _flag(value: object) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    flag = words.get(str(value).strip().lower())
    if flag is None:
        raise ValueError("must be true or false")
    return flag


def _paths(value: object) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("must be paths, separated by commas")
    paths = tuple(part.strip() for part in parts if part.strip())
    for path in paths:
        if not os.path.isabs(path) or not path.isprintable():
            raise ValueError(f"{path!r}: must be absolute paths")
    return paths


def _command(value: object) -> tuple[str, ...]:
    try:
        parts = shlex.split(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"is no command line: {error}") from None
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        raise ValueError("must be a command line, or a list of its words")
    return tuple(parts)


def _one_of(choices: type[enum.StrEnum]) -> Callable[[object], enum.StrEnum]:
    def parse(value: object) -> enum.StrEnum:
        try:
            return choices(_text(value))
        except ValueError:
            raise ValueError(f"must be one of: {', '.join(choices)}") from None

    return parse


_COUNT = _integer(1, 1_000_000)


# --- the tables -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table of settings.

    ``name`` is that of the environment and of TOML, ``attribute`` that of the settings in the
    program. ``parse`` makes the value of what a place says, or raises :class:`ValueError` with
    the words that follow the name. ``default`` is for people to read. ``option`` is the command
    line's, if it has one. Without ``reloadable`` it is bound, opened or started with for as long
    as the server runs.
    """

    name: str
    attribute: str
    parse: Callable[[object], Any]
    default: str
    meaning: str
    option: str | None
    reloadable: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """What a field of the tables below adds to its type and default."""

    parse: Callable[[object], Any]
    meaning: str
    option: str | None = None
    reloadable: bool = True
    name: str | None = None
    shown: str | None = None  # the default in words


def _memory(value: object) -> int:
    return parse_memory(str(value) if type(value) is int else _text(value))


def _row(default: Any, parse: Callable[[object], Any], meaning: str, **more: Any) -> Any:
    return field(default=default, metadata={"row": _Row(parse, meaning, **more)})


def _rows_of(table: type[Any]) -> tuple[Setting, ...]:
    rows = []
    for attribute in dataclasses.fields(table):
        if (row := attribute.metadata.get("row")) is not None:
            default = "none" if attribute.default in (None, ()) else str(attribute.default)
            rows.append(
                Setting(
                    row.name or attribute.name.upper(),
                    attribute.name,
                    row.parse,
                    row.shown or default,
                    row.meaning,
                    row.option,
                    row.reloadable,
                )
            )
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What the operator says of one service: the table of service settings."""

    runs_per_user: int = _row(5, _COUNT, "active jobs of one user in the service")
    max_runs: int = _row(10, _COUNT, "active jobs of the service")
    timeout: int | None = _row(
        None, _integer(1, LONGEST_TIMEOUT), "seconds after which a job is ended"
    )
    cpus: int = _row(1, _integer(1, MAX_CPUS), "cores that a job gets that asks for none")
    memory: int | None = _row(
        None,
        _memory,
        "memory that such a job gets, in bytes or as `512M`, `8G`; over it, it is ended",
    )
    gpus: int = _row(0, _integer(0, MAX_GPUS), "GPUs that such a job gets")
    max_cpus: int | None = _row(
        None, _integer(1, MAX_CPUS), "cores that a job may ask for", shown="as `CPUS`"
    )
    max_memory: int | None = _row(
        None, _memory, "memory that a job may ask for", shown="as `MEMORY`"
    )
    max_gpus: int | None = _row(
        None, _integer(0, MAX_GPUS), "GPUs that a job may ask for", shown="as `GPUS`"
    )
    isolation: IsolationKind = _row(
        IsolationKind.AUTO,
        _one_of(IsolationKind),
        "what keeps its jobs from what is not theirs: `auto` (the agent's choice), `none`,"
        " `landlock`, `bubblewrap`, `podman` or `wrapper`; see docs/isolation.md",
    )
    network: bool = _row(True, _flag, "`false` takes the network away", shown="true")
    readable: tuple[str, ...] = _row(
        (), _paths, "paths that its jobs may read beyond what all may, separated by commas"
    )
    writable: tuple[str, ...] = _row((), _paths, "paths that its jobs may read and write")
    image: str | None = _row(
        None, _text, "the image of `podman`; it must be on the agent's machine"
    )
    wrapper: tuple[str, ...] = _row(
        (),
        _command,
        "the command line that `wrapper` puts before `bash run.sh`, with `{directory}`, `{cpus}`,"
        " `{memory}`, `{gpus}`",
    )
    slurm_options: tuple[str, ...] = _row(
        (), _command, "options of sbatch for its jobs where an agent hands them to Slurm"
    )

    def needs(self, cpus: int | None, memory: int | None, gpus: int | None) -> Resources:
        """Return what a job gets that asks for this; None for what it does not ask for."""
        return Resources(
            self.cpus if cpus is None else cpus,
            (self.memory or 0) if memory is None else memory,
            self.gpus if gpus is None else gpus,
        )

    def largest(self) -> Resources:
        """Return what a job may ask for."""
        largest_memory = self.max_memory or self.memory or MAX_MEMORY_BYTES
        return Resources(
            self.cpus if self.max_cpus is None else self.max_cpus,
            largest_memory,
            self.gpus if self.max_gpus is None else self.max_gpus,
        )

    def asked_isolation(self) -> Isolation:
        """Return what its jobs may reach."""
        return Isolation(
            self.isolation, self.network, self.readable, self.writable, self.image, self.wrapper
        )


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the server can be told: the table of settings. Durations are in seconds."""

    host: str = _row(
        "127.0.0.1",
        _text,
        "where it listens; on any but a loopback address the API needs tokens, see `TOKENS`",
        option="--host",
        reloadable=False,
    )
    port: int = _row(
        5000,
        _integer(0, 65535),
        "the port it listens on; 0 picks a free one",
        option="--port",
        reloadable=False,
    )
    db_path: str = _row("orchestrator.db", _text, "the one file", option="--db", reloadable=False)
    max_age: int = _row(
        10 * 24 * 3600,
        _integer(1, LONGEST_TIMEOUT),
        "seconds until files of a finished job are removed (it is then `Cleaned`)",
    )
    lease: float = _row(
        60.0,
        _seconds(1, 7 * 24 * 3600),
        "seconds that an agent may be away before its jobs go to another",
        shown="60",
    )
    max_attempts: int = _row(
        3, _integer(1, 1000), "how often a job is started before it is given up"
    )
    kill_grace: float = _row(
        5.0, _seconds(0, 3600), "seconds between SIGTERM and SIGKILL", shown="5"
    )
    max_result_bytes: int = _row(
        4 * 1024 * _MIB,
        _integer(1, 2**48),
        "bytes that the files of a job may have when it ends, inputs included; with more it is"
        " `Failed` and keeps only its logs",
    )
    max_result_files: int = _row(
        1_000_000, _integer(1, 100_000_000), "the same for the number of files and directories"
    )
    max_log_bytes: int = _row(
        16 * _MIB,
        _integer(2, 2**40),
        "what is kept of each of `stdout.log` and `stderr.log`: of a longer one the start and the"
        " end",
    )
    max_files: int = _row(MAX_FILES, _integer(1, MAX_FILES), "files of a job (at most the default)")
    upload_idle: float = _row(
        60.0,
        _seconds(0.1, 24 * 3600),
        "seconds that a client may send nothing in the middle of an upload, before it is ended"
        " (408)",
        shown="60",
    )
    max_open_uploads: int = _row(8, _COUNT, "uploads of a user that may arrive at a time, else 429")
    max_open_uploads_total: int = _row(128, _COUNT, "the same for all users together, else 503")
    max_queued_jobs: int = _row(
        100_000, _integer(1, 1_000_000_000), "jobs of a user that may wait, else 429"
    )
    slots: int = field(
        default_factory=lambda: os.cpu_count() or 1,
        metadata={
            "row": _Row(
                _integer(1, 4096),
                "jobs at a time of the embedded agent (`--no-agent`: none)",
                option="--slots",
                reloadable=False,
                shown="number of cores",
            )
        },
    )
    isolation: IsolationKind = _row(
        IsolationKind.AUTO,
        _one_of(IsolationKind),
        "what `auto` means for the embedded agent: `none`, `landlock`, `bubblewrap`, or `auto`:"
        " Landlock where the kernel has it; also an option of `agent`",
        option="--isolation",
        reloadable=False,
    )
    job_user: str | None = _row(
        None,
        _text,
        "the user, or the range of user ids (`60000-60999`, one for each job), that jobs of an"
        " embedded agent that is root run as; also an option of `agent`",
        option="--job-user",
        reloadable=False,
    )
    allow_root_jobs: bool = _row(
        False,
        _flag,
        "`true` accepts an isolation that was asked for by name although jobs run as root, against"
        " which none holds; also an option of `agent`",
        reloadable=False,
        shown="false",
    )
    allowed_hosts: tuple[str, ...] = _row(
        (), _names, "further names under which the server may be addressed, separated by commas"
    )
    log_format: LogFormat = _row(
        LogFormat.TEXT,
        _one_of(LogFormat),
        "`text` (`key=value`) or `json`, one line an event; also an option of `agent`",
        option="--log-format",
        reloadable=False,
    )
    access_log: AccessLog = _row(
        AccessLog.NOTABLE,
        _one_of(AccessLog),
        "requests in the log: `all`, `off` (`--no-access-log`), or `notable`: those that change"
        " something, fail, or take a second or longer",
    )
    tokens: TokenRule | None = _row(
        None,
        _one_of(TokenRule),
        "`required`: the API needs a token; `optional`: it is open to everybody who reaches it"
        " until the first token is made",
        shown="optional on a loopback address, else required",
    )
    agent_token: str | None = field(
        default=None,
        repr=False,
        metadata={
            "row": _Row(
                _token,
                "what agents must present",
                reloadable=False,
                name=AGENT_TOKEN_VARIABLE,
                shown="generated, kept in the file",
            )
        },
    )
    services: Mapping[str, ServiceLimits] = field(
        default_factory=lambda: MappingProxyType({"example": ServiceLimits()})
    )
    config_file: str | None = None  # from which some of them are

    def isolations(self) -> dict[str, Isolation]:
        """Return, by service, what agents must be asked for before they get its jobs."""
        asked = {name: limits.asked_isolation() for name, limits in self.services.items()}
        return {name: isolation for name, isolation in asked.items() if isolation.needs_asking()}

    def are_tokens_required(self) -> bool:
        """Whether nobody may use the API without a token, even if there is none yet."""
        if self.tokens is None:
            return not is_loopback(self.host)
        return self.tokens is TokenRule.REQUIRED


SETTINGS = _rows_of(Settings)
"""The settings of the server, in the order in which they are documented."""

SERVICE_SETTINGS = _rows_of(ServiceLimits)
"""The settings of each service: ``SERVICE_<NAME>_...``, or keys of a TOML table."""

_BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}
_SERVICE_SETTING_BY_NAME = {setting.name: setting for setting in SERVICE_SETTINGS}
# the shortest name that leaves a known setting: SERVICE_DOCK_MAX_RUNS is not of "dock_max"
_SERVICE_KEY = re.compile(rf"SERVICE_(?P<name>.+?)_(?P<limit>{'|'.join(_SERVICE_SETTING_BY_NAME)})")
_FIXED_AT_START = frozenset(setting.attribute for setting in SETTINGS if not setting.reloadable)


# --- what holds now ---------------------------------------------------------------


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
    names = {setting.attribute: setting.name for setting in SETTINGS}
    return tuple(sorted(names.get(attribute, attribute) for attribute in attributes))


# --- where they come from ---------------------------------------------------------


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
    for service, limits in services.items():
        if problem := limits.asked_isolation().problem():
            raise ConfigError(f"service {service}: {problem}")
    file = None if config_file is None else str(config_file.absolute())
    return Settings(**values, services=MappingProxyType(services), config_file=file)


@functools.cache
def is_loopback(host: str) -> bool:
    """Whether a listening address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    return name in _BY_NAME or _SERVICE_KEY.fullmatch(name) is not None


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
        elif name in _BY_NAME:
            values[_BY_NAME[name].attribute] = _BY_NAME[name].parse(value)
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
        if (setting := _SERVICE_SETTING_BY_NAME.get(name)) is None:
            raise ValueError(f"unknown setting {name.lower()}")
        try:
            changes[setting.attribute] = setting.parse(value)
        except ValueError as error:
            raise ValueError(f"{setting.attribute} {error}") from None
    services[service] = dataclasses.replace(services.get(service, ServiceLimits()), **changes)
