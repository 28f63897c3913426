"""What the commands' options mean: durations, tags, parameters, and what all commands take."""

from __future__ import annotations

import argparse
import json
import re
from datetime import UTC, datetime, timedelta

from orchestrator_client.identifiers import UsageError

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", re.ASCII)
_LONGEST_SECONDS = 10**9


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to its caller how errors are told."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise :class:`UsageError`."""
        raise UsageError(f"{message}\n'{self.prog} --help' says how it is used")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command that asks a server takes."""
    group = parser.add_argument_group("which server, as whom")
    group.add_argument("--url", metavar="URL", help="the server (ORCHESTRATOR_URL)")
    group.add_argument("--profile", metavar="NAME", help="a profile of the settings file")
    group.add_argument(
        "--token-file", metavar="FILE", help="file with an API token (ORCHESTRATOR_TOKEN_FILE)"
    )
    group.add_argument(
        "--patience",
        metavar="TIME",
        type=duration_seconds,
        help="how long to try again while the server can't be reached",
    )


def add_user_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that says whose jobs are meant."""
    parser.add_argument(
        "-u", "--user", metavar="ID", help="user id (ORCHESTRATOR_USER; default: your Unix uid)"
    )


def add_format_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says how a list is printed."""
    parser.add_argument(
        "-o",
        "--output",
        choices=("table", "json", "jsonl", "id"),
        help="default: a table on a terminal, else lines of tab-separated text",
    )


def duration_seconds(text: str) -> float:
    """Return the seconds of a duration, as ``90``, ``90s``, ``5m``, ``2h``, ``1d12h``."""
    match = _DURATION.fullmatch(text.strip())
    if not text.strip() or match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, as 90, 30s, 5m, 2h or 1d12h")
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total > _LONGEST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is too long")
    return total


def whole_seconds(text: str) -> int:
    """Return a duration in whole seconds, at least one."""
    seconds = round(duration_seconds(text))
    if seconds < 1:
        raise argparse.ArgumentTypeError("must be at least a second")
    return seconds


def time_or_age(text: str) -> str:
    """Return a time for the server: as it stands, or so long ago (``2h``)."""
    try:
        seconds = duration_seconds(text)
    except argparse.ArgumentTypeError:
        return text
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def tag(text: str) -> tuple[str, str]:
    """Return the key and the value of ``KEY:VALUE``."""
    key, colon, value = text.partition(":")
    if not key or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} must be KEY:VALUE")
    return key, value


def parameter(text: str) -> tuple[str, object]:
    """Return the name and the value of ``NAME=VALUE``: JSON if it is that, else a text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def count(text: str) -> int:
    """Return a number that is not negative."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number")
    return int(text)
