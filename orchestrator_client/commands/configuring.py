"""The user's own set-up: the settings in force, and completion for shells."""

from __future__ import annotations

import argparse
import os

from orchestrator_client import completion as shell_completion
from orchestrator_client.arguments import add_common_options, add_user_option
from orchestrator_client.command_table import COMMANDS, parser_of
from orchestrator_client.output import print_json, printable, write_line
from orchestrator_client.session import Session
from orchestrator_client.settings import settings_file

PATIENCE_SECONDS = 5.0


def config_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``config``."""
    parser.add_argument("-s", "--service", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    add_user_option(parser)
    add_common_options(parser)


def config(session: Session, options: argparse.Namespace) -> int:
    """Show the settings in force and where each comes from; never a token."""
    settings = session.settings
    origins = settings.origins
    token_origin = origins.get("token") or origins.get("token_file")
    rows = {
        "url": (settings.url, origins.get("url")),
        "user": (str(settings.user_id), origins.get("user") or "the Unix user id"),
        "service": (settings.service or "the only one of the server", origins.get("service")),
        "token": ("none" if settings.token is None else "(hidden)", token_origin),
        "profile": (settings.profile or "none", None),
        "file": (str(settings_file(os.environ)), None),
    }
    if options.output == "json":
        print_json(
            {name: {"value": value, "from": origin} for name, (value, origin) in rows.items()}
        )
        return 0
    for name, (value, origin) in rows.items():
        suffix = f"  ({origin})" if origin else ""
        write_line(f"{name + ':':<9} {printable(value)}{printable(suffix)}")
    return 0


def completion_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``completion``."""
    parser.add_argument("shell", choices=shell_completion.SHELLS)


def completion(options: argparse.Namespace) -> int:
    """Print a script that teaches a shell the commands and their options."""
    parsers = {name: parser_of(name, argparse.ArgumentParser) for name in COMMANDS}
    write_line(shell_completion.script(options.shell, parsers))
    return 0
