"""The program ``orchestrator``: commands of users here, all others by the server's program."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator_client.command_table import (
    COMMANDS,
    OPERATOR_COMMANDS,
    module_of,
    overview,
    parser_of,
)
from orchestrator_client.exit_codes import BROKEN_PIPE, DONE, INTERRUPTED, USAGE

_OTHER_NAMES = {
    **{"list": "ls", "ps": "ls", "status": "show", "info": "show", "kill": "cancel"},
    **{"stop": "cancel", "terminate": "cancel", "rm": "delete", "download": "get"},
    **{"upload": "submit", "log": "logs", "tail": "logs"},
}
_LEADING_OPTIONS = ("--url", "--profile", "--token-file", "--patience")


def main() -> int:
    """Entry point of the installed program."""
    arguments = sys.argv[1:]
    if not is_for_users(arguments):
        _hand_over(arguments)
    return run_command(arguments)


def is_for_users(arguments: Sequence[str]) -> bool:
    """Whether a command line is one of those that :func:`run_command` runs."""
    if not arguments:
        return False
    if arguments[0] in ("-h", "--help", "help") or arguments[0] in COMMANDS:
        return True
    if arguments[0].partition("=")[0] in _LEADING_OPTIONS:
        return True
    return bool(_nearest(arguments[0]))


def _nearest(word: str) -> list[str]:
    """Return the command for users that was perhaps meant by a word that is no command."""
    if word.startswith("-") or word in OPERATOR_COMMANDS:
        return []
    import difflib

    return difflib.get_close_matches(_OTHER_NAMES.get(word, word), COMMANDS, 1, 0.7)


def application() -> Path:
    """Return the folder of the server and agent: beside this package, or the clone it is in."""
    beside = Path(__file__).parent.parent
    installed = beside / "orchestrator_app"
    return installed if installed.is_dir() else beside


def _hand_over(arguments: Sequence[str]) -> None:
    """Become the server's and the agent's command line; does not return."""
    program = application() / "orchestrator.py"
    os.execv(sys.executable, [sys.executable, str(program), *arguments])


def run_command(arguments: Sequence[str]) -> int:
    """Run a command for users; returns the exit code."""
    try:
        code = _run_command(_reordered(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read the output has enough of it; nothing more can be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        sys.stderr.write("orchestrator: interrupted\n")
        return INTERRUPTED
    return code


def _reordered(arguments: Sequence[str]) -> list[str]:
    """Put options that stand before the command behind it."""
    rest = list(arguments)
    leading: list[str] = []
    while rest and rest[0].partition("=")[0] in _LEADING_OPTIONS:
        leading += [rest.pop(0)]
        if "=" not in leading[-1] and rest:
            leading += [rest.pop(0)]
    return [*rest[:1], *leading, *rest[1:]]


def _run_command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if len(arguments) > 1 and arguments[1] in COMMANDS:
            return _run_command([arguments[1], "--help"])
        sys.stdout.write(f"{overview()}\n")
        return DONE
    name, *rest = arguments
    if name not in COMMANDS:
        meant = "".join(f"; did you mean {word}?" for word in _nearest(name))
        sys.stderr.write(f"orchestrator: there is no command {name!r}{meant}\n")
        return USAGE
    from orchestrator_client import failures

    return failures.told(lambda: _run_user_command(name, rest))


def _run_user_command(name: str, arguments: list[str]) -> int:
    from orchestrator_client.arguments import Parser
    from orchestrator_client.identifiers import UsageError
    from orchestrator_client.output import use_streams_safely

    use_streams_safely()
    command_line: list[str] | None = None
    if name == "run" and "--" in arguments:
        split = arguments.index("--")
        arguments, command_line = arguments[:split], arguments[split + 1 :]
    parser = parser_of(name, Parser)
    options = parser.parse_intermixed_args(arguments)
    if name == "run":
        if not command_line:
            raise UsageError("say what to run after --, as in: orchestrator run -- hostname")
        options.command_line = command_line
    module = module_of(name)
    run = getattr(module, name)
    if not COMMANDS[name].asks_server:
        return int(run(options))
    from orchestrator_client.session import Session

    session = Session(options, module.PATIENCE_SECONDS)
    try:
        return int(run(session, options))
    finally:
        session.client.close()


if __name__ == "__main__":
    sys.exit(main())
