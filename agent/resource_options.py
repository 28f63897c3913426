"""The options that say what of a machine is for jobs."""

from __future__ import annotations

import argparse
import os
from typing import Any

from agent.resources import (
    Machine,
    detected_cpus,
    detected_gpus,
    detected_memory,
    parse_gpus,
)
from config import ConfigError
from jobs import MAX_CPUS, parse_count, parse_memory


def add_resource_options(parser: argparse.ArgumentParser) -> None:
    """Add what tells an agent how much of its machine is for jobs."""
    parser.add_argument(
        "--cpus", metavar="N", help="cores for its jobs (default: those that it may use itself)"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory for its jobs, such as 64G (default: all)"
    )
    parser.add_argument(
        "--gpus", metavar="none|N|0,2,3", help="GPUs for its jobs (default: all of NVIDIA's)"
    )
    parser.add_argument(
        "--no-affinity",
        action="store_true",
        help="let jobs run on all cores, not only on as many as they have (as it is where --cpus or"
        " --slots is more than the machine's cores)",
    )


def resource_options_given(options: argparse.Namespace) -> list[str]:
    """Return those of the options that were given."""
    values = {
        "--cpus": options.cpus is not None,
        "--memory": options.memory is not None,
        "--gpus": options.gpus is not None,
        "--no-affinity": options.no_affinity,
    }
    return [name for name, is_given in values.items() if is_given]


def machine_of(options: argparse.Namespace) -> Machine:
    """Return what the agent has: what it was told, else what it finds.

    Raises :class:`ConfigError` with the sentence for who told it.
    """
    given: dict[str, Any] = {}
    for name, parse in (
        ("cpus", lambda text: parse_count(text, 1, MAX_CPUS)),
        ("memory", parse_memory),
        ("gpus", parse_gpus),
    ):
        if (text := getattr(options, name)) is not None:
            try:
                given[name] = parse(text)
            except ValueError as error:
                raise ConfigError(f"--{name} {error}") from None
    cpus = given.get("cpus") or max(detected_cpus(), options.slots or 1)
    memory = given["memory"] if "memory" in given else detected_memory()
    gpus = given["gpus"] if "gpus" in given else detected_gpus(os.environ)
    cores = tuple(sorted(os.sched_getaffinity(0)))
    # more is promised than there is: bound jobs would share one core while another has nothing
    is_bound = not options.no_affinity and cpus <= len(cores)
    return Machine(cpus, memory, gpus, cores if is_bound else ())
