"""The operators' command line: serve, demo, tokens, backup, check."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import config
import runtime
from agent.executors.slurm_submission import with_joined_values
from commands import administration, demo, serve, slurm_agents
from commands.serve import StartError
from config import AccessLog, ConfigError, LogFormat, Settings, SettingsInForce
from records import StoreError
from runtime import first_failure
from storage.tokens import read_agent_token
from telemetry import logs

_INTERRUPTED = 128 + signal.SIGINT  # as shells tell it


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line of ``orchestrator.py``; no command means ``serve``."""
    parser = argparse.ArgumentParser(
        prog="orchestrator",
        description="A job server for labs.",
        epilog="'orchestrator agent --help' says how to run jobs of a server on another machine.",
    )
    parser.add_argument("--version", action="version", version=config.VERSION)
    _add_serve_options(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    serve_parser = commands.add_parser("serve", help="run the server (the default)")
    _add_serve_options(serve_parser)
    slurm_agents.add_arguments(
        commands.add_parser("slurm-agents", help="keep agents in allocations of Slurm")
    )
    commands.add_parser("demo", help="run an example job on a throw-away server")
    token_parser = commands.add_parser("agent-token", help="show the token that agents need")
    token_parser.add_argument("--db", dest="DB_PATH", default=argparse.SUPPRESS, metavar="FILE")
    administration.add_token_commands(
        commands.add_parser("token", help="make, list, revoke tokens of the API")
    )
    backup_parser = commands.add_parser("backup", help="copy the database, also while it is used")
    backup_parser.add_argument("file", metavar="FILE", help="where to; must not exist yet")
    backup_parser.add_argument("--db", dest="DB_PATH", default=argparse.SUPPRESS, metavar="FILE")
    check_parser = commands.add_parser("check", help="look for damage in a database or a backup")
    check_parser.add_argument("file", metavar="FILE")
    return parser.parse_args(with_joined_values(arguments))


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    # SUPPRESS: an option that is not given must not hide the environment or the file
    for setting in config.SETTINGS:
        if setting.option is not None:
            meaning = setting.meaning.replace("`", "").replace("%", "%%")
            parser.add_argument(
                setting.option,
                dest=setting.name,
                default=argparse.SUPPRESS,
                metavar=setting.option.removeprefix("--").upper(),
                help=f"{meaning} (default: {setting.default})",
            )
    parser.add_argument("--config", default=argparse.SUPPRESS, metavar="FILE", help="TOML file")
    parser.add_argument(
        "--no-access-log",
        dest="ACCESS_LOG",
        action="store_const",
        const=AccessLog.OFF,
        default=argparse.SUPPRESS,
        help="no line in the log for any request",
    )
    parser.add_argument(
        "--no-agent", action="store_true", default=argparse.SUPPRESS, help="no embedded agent"
    )


def load_settings(options: argparse.Namespace) -> Settings:
    """Return the settings of this command line; raises :class:`config.ConfigError`."""
    given = vars(options)
    arguments = {
        setting.name: given[setting.name] for setting in config.SETTINGS if setting.name in given
    }
    file = Path(given["config"]) if "config" in given else None
    return config.load(os.environ, arguments, file)


def _run_command(options: argparse.Namespace) -> int:
    match options.command:
        case "demo":
            return demo.run()
        case "slurm-agents":
            return slurm_agents.run(options)
        case "agent-token":
            settings = load_settings(options)
            token = settings.agent_token or read_agent_token(settings.db_path)
            sys.stdout.write(f"{token}\n")
        case "token":
            administration.run_token_command(options, load_settings(options).db_path)
        case "backup":
            administration.run_backup(load_settings(options).db_path, options.file)
        case "check":
            return administration.run_check(options.file)
        case _:
            settings = load_settings(options)
            logs.configure(settings.log_format)
            server = serve.serve(
                SettingsInForce(settings),
                lambda: load_settings(options),
                with_agent="no_agent" not in options,
            )
            runtime.run(server)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; returns the exit status."""
    options = parse_arguments(arguments)
    logs.configure(LogFormat.TEXT)
    try:
        code = _run_command(options)
    except* (ConfigError, StartError, StoreError) as group:
        sys.stderr.write(f"orchestrator: {first_failure(group)}\n")
        code = 2
    except* KeyboardInterrupt:
        # not 0, which would say of a backup or a check that it was done
        sys.stderr.write("orchestrator: interrupted\n")
        code = _INTERRUPTED
    return code
