"""The command line's door: it loads the program that a command is for, and no other.

An agent does without the server's modules, so it starts sooner and stays smaller.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrator_client import main


def run(arguments: Sequence[str]) -> int:
    """Run what the command line says; returns the exit status."""
    match arguments:
        case ["agent", *rest]:
            from agent import command  # noqa: PLC0415

            return command.main(rest)
        case [_, *_] if main.is_for_users(arguments):
            return main.run_command(arguments)
        case _:
            from commands import operators  # noqa: PLC0415

            return operators.main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
