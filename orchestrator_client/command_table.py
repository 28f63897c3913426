"""Which commands there are for users, and where each is; a module is imported when it is needed."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

P = TypeVar("P", bound=argparse.ArgumentParser)

_EXIT_CODES = """exit codes:
  0  done                                 4    not authorised
  1  a job failed, or a local file did    5    the server can't be reached, or fails
  2  usage, or there is no such job       124  waited too long
  3  refused: quota, conflict, too large  130  interrupted; the job goes on
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module, what it does in a line, and examples for its help."""

    module: str
    summary: str
    examples: str
    asks_server: bool = True


COMMANDS: Mapping[str, Command] = {
    "run": Command(
        "submitting",
        "run a command as a job, show what it prints, fetch the result",
        """
  orchestrator run -- hostname
  orchestrator run input.pdb -- awk '/^ATOM/' input.pdb
  orchestrator run data/ -o results --timeout 2h -- 'wc -l data/*.csv | sort -n > lines.txt'
""",
    ),
    "submit": Command(
        "submitting",
        "upload files as a new job",
        """
  orchestrator submit run.sh input.pdb
  orchestrator submit run.sh input.pdb --tag project:kinase --wait
  orchestrator submit --script dock.sh ligands/ -s docking --cpus 4 --memory 8G --get out
  orchestrator submit run.sh --each 'data/*.pdb'
""",
    ),
    "ls": Command(
        "looking",
        "list jobs",
        """
  orchestrator ls
  orchestrator ls --status failed --since 1d
  orchestrator ls @project:kinase -o jsonl
  orchestrator ls --watch
""",
    ),
    "show": Command(
        "looking",
        "show all about a job: why it waits, why it failed",
        """
  orchestrator show 7
  orchestrator show last -o json
""",
    ),
    "logs": Command(
        "following",
        "show what a job prints",
        """
  orchestrator logs -f last
  orchestrator logs 7 --stderr
""",
    ),
    "wait": Command(
        "following",
        "wait until jobs have ended",
        """
  orchestrator wait 7
  orchestrator wait 3-7 9 --timeout 1h
  orchestrator wait @batch:0a1b2c3d4e
""",
    ),
    "get": Command(
        "fetching",
        "fetch results, or some of their files",
        """
  orchestrator get 7
  orchestrator get 7 table.txt 'plots/*.png' -o results
  orchestrator get last --partial
  orchestrator get @batch:0a1b2c3d4e -o results
""",
    ),
    "cancel": Command(
        "changing",
        "end jobs",
        """
  orchestrator cancel 7
  orchestrator cancel @project:kinase
""",
    ),
    "rerun": Command(
        "changing",
        "submit jobs once more, with the same input",
        """
  orchestrator rerun 7
  orchestrator ls --status failed -o id | orchestrator rerun -
""",
    ),
    "delete": Command(
        "changing",
        "free the files of jobs that have ended",
        """
  orchestrator delete 7
  orchestrator delete @batch:0a1b2c3d4e
""",
    ),
    "events": Command(
        "following",
        "show what happens, as it happens",
        """
  orchestrator events
  orchestrator events --all -o jsonl
""",
    ),
    "agents": Command(
        "operating",
        "list the agents; drain and resume them",
        """
  orchestrator agents
  orchestrator agents --drain node7
""",
    ),
    "services": Command(
        "operating",
        "list the services, their limits and queues",
        """
  orchestrator services
  orchestrator services -o id
""",
    ),
    "open": Command(
        "operating",
        "open the dashboard in a browser",
        """
  orchestrator open
  orchestrator open 7 --print
""",
    ),
    "config": Command(
        "configuring",
        "show the settings in force, and where they come from",
        """
  orchestrator config
  orchestrator config --profile lab
""",
    ),
    "completion": Command(
        "configuring",
        "print a script that completes commands in bash, zsh or fish",
        """
  source <(orchestrator completion bash)
  orchestrator completion zsh > ~/.zfunc/_orchestrator
  orchestrator completion fish > ~/.config/fish/completions/orchestrator.fish
""",
        asks_server=False,
    ),
}

OPERATOR_COMMANDS: Mapping[str, str] = {
    "serve": "run the server",
    "agent": "run jobs of a server on this machine",
    "slurm-agents": "keep agents in allocations of a Slurm cluster",
    "demo": "run an example job on a throw-away server",
    "token": "make, list, revoke tokens of the API",
    "agent-token": "show the token that agents need",
    "backup": "copy the database, also while it is used",
    "check": "look for damage in a database or a backup",
}


def module_of(name: str) -> Any:
    """Import and return the module of a command."""
    return importlib.import_module(f"orchestrator_client.commands.{COMMANDS[name].module}")


def parser_of(name: str, parser_type: type[P]) -> P:
    """Return a parser of a command's arguments, with all of its help."""
    command = COMMANDS[name]
    parser = parser_type(
        prog=f"orchestrator {name}",
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=f"examples:{command.examples}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add: Callable[[argparse.ArgumentParser], None] = getattr(module_of(name), f"{name}_arguments")
    add(parser)
    return parser


def overview() -> str:
    """Return the help of the whole program."""
    lines = [
        "usage: orchestrator COMMAND ...",
        "",
        "A job server for labs: upload files and a script, fetch the result.",
        "",
    ]
    lines += [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "for operators:", ""]
    lines += [f"  {name:<12} {summary}" for name, summary in OPERATOR_COMMANDS.items()]
    lines += [
        "",
        "Jobs are named by 7, 3-7, last, @tag:value, or - for ids on standard input.",
        "'orchestrator COMMAND --help' explains a command, with examples.",
        "Without a command the server is started.",
    ]
    return "\n".join(lines)
