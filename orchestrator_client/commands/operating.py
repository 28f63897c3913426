"""Look at the server: its agents and services, and its page for people."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator_client.arguments import add_common_options
from orchestrator_client.output import (
    Cell,
    Column,
    duration,
    is_terminal,
    memory,
    print_json,
    print_json_line,
    print_table,
    printable,
    say,
    write_line,
)
from orchestrator_client.session import Session

PATIENCE_SECONDS = 5.0
_FORMATS = ("table", "json", "jsonl", "id")

_AGENT_COLUMNS = (
    Column("NAME"),
    Column("STATE"),
    Column("BUSY", is_right=True),
    Column("SLOTS", is_right=True),
    Column("LOAD", is_right=True),
    Column("CPUS", is_right=True),
    Column("MEMORY", is_right=True),
    Column("GPUS", is_right=True),
    Column("SERVICES", may_shrink=True),
)

_SERVICE_COLUMNS = (
    Column("NAME"),
    Column("ACTIVE", is_right=True),
    Column("QUEUED", is_right=True),
    Column("LIMIT", is_right=True),
    Column("PER USER", is_right=True),
    Column("TIMEOUT", is_right=True),
    Column("WAIT", is_right=True),
    Column("RUN", is_right=True),
    Column("AGENTS", may_shrink=True),
)


def agents_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``agents``."""
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--drain", metavar="NAME", help="give this agent nothing new (admin)")
    action.add_argument("--resume", metavar="NAME", help="give it jobs again (admin)")
    parser.add_argument("-o", "--output", choices=_FORMATS)
    add_common_options(parser)


def agents(session: Session, options: argparse.Namespace) -> int:
    """List the agents."""
    if options.drain is not None:
        found = [session.client.drain(options.drain)]
    elif options.resume is not None:
        found = [session.client.resume(options.resume)]
    else:
        found = session.client.agents()
    rows = [_agent_row(agent) for agent in found]
    _print(options.output, "agents", found, _AGENT_COLUMNS, rows)
    return 0


def _agent_row(agent: Mapping[str, Any]) -> Sequence[Cell]:
    services = agent["services"]
    total = (agent.get("resources") or {}).get("total") or {}
    load = agent["load"]
    return (
        agent["name"],
        _agent_state(agent),
        str(agent["busy"]),
        str(agent["slots"]),
        "" if load is None else f"{load:.2f}",
        str(total.get("cpus") or ""),
        memory(total.get("memory")),
        str(total.get("gpus") or ""),
        "all" if services is None else ",".join(services),
    )


def _agent_state(agent: Mapping[str, Any]) -> Cell:
    if not agent["is_connected"]:
        return ("away", "red")
    if agent.get("set_aside"):
        return (f"set aside: {agent['set_aside']}", "red")
    if agent.get("problem"):
        return (f"problem: {agent['problem']}", "red")
    if aside := agent.get("services_set_aside"):
        return (f"set aside for {', '.join(each['service'] for each in aside)}", "yellow")
    return ("draining", "yellow") if agent["is_drained"] else ("connected", "green")


def services_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``services``."""
    parser.add_argument("-o", "--output", choices=_FORMATS)
    add_common_options(parser)


def services(session: Session, options: argparse.Namespace) -> int:
    """List the services."""
    found = session.client.services()
    rows = [_service_row(service) for service in found]
    _print(options.output, "services", found, _SERVICE_COLUMNS, rows)
    return 0


def _service_row(service: Mapping[str, Any]) -> Sequence[Cell]:
    is_configured = service["is_configured"]
    return (
        service["name"] if is_configured else (f"{service['name']} (not configured)", "red"),
        str(service["active"]),
        str(service["queued"]),
        str(service["max_runs"] or ""),
        str(service["runs_per_user"] or ""),
        duration(service["timeout"]),
        duration(service["median_wait"]),
        duration(service["median_run"]),
        ",".join(service["agents"]),
    )


def _print(
    wanted: str | None,
    kind: str,
    found: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
) -> None:
    if wanted == "json":
        print_json(found)
    elif wanted == "jsonl":
        for item in found:
            print_json_line(item)
    elif wanted == "id":
        for item in found:
            write_line(printable(item["name"]))
    elif found:
        print_table(wanted, columns, rows)
    elif is_terminal(sys.stderr):
        say(f"orchestrator: there are no {kind}")


def open_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``open``."""
    parser.add_argument("id", nargs="?", metavar="ID", help="the page of this job")
    parser.add_argument("--print", action="store_true", help="print the address, open nothing")
    add_common_options(parser)


def open(session: Session, options: argparse.Namespace) -> int:
    """Open the dashboard in a browser, or print its address where there is none."""
    address = f"{session.client.url}/ui/"
    if options.id is not None:
        (job_id,) = session.ids([options.id])
        address += f"#/jobs/{job_id}"
    if not options.print:
        import webbrowser

        if webbrowser.open(address):
            return 0
    write_line(address)
    return 0
