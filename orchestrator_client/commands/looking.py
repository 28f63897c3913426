"""Look at jobs: lists of them, and all about one."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator_client.arguments import (
    add_common_options,
    add_format_option,
    add_user_option,
    count,
    tag,
    time_or_age,
)
from orchestrator_client.identifiers import UsageError
from orchestrator_client.operations import JobFilter
from orchestrator_client.output import (
    STATE_STYLES,
    Cell,
    Column,
    console,
    duration,
    is_terminal,
    memory,
    moment,
    print_json,
    print_json_line,
    print_table,
    printable,
    say,
    size,
    table_of,
    write_line,
)
from orchestrator_client.records import JobInfo
from orchestrator_client.session import Session

if TYPE_CHECKING:
    from rich.table import Table

PATIENCE_SECONDS = 5.0
_DEFAULT_ROWS = 50
_REDRAW_SECONDS = 0.5

_COLUMNS = (
    Column("ID", is_right=True),
    Column("STATE"),
    Column("SERVICE"),
    Column("CREATED"),
    Column("TIME", is_right=True),
    Column("NAME", may_shrink=True),
    Column("MESSAGE", may_shrink=True),
)


def ls_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``ls``."""
    parser.add_argument("ids", nargs="*", metavar="ID", help="7, 3-7, last, @tag:value, -")
    group = parser.add_argument_group("which jobs")
    add_user_option(group)
    group.add_argument("-a", "--all", action="store_true", help="of all users")
    group.add_argument("-s", "--service")
    group.add_argument(
        "--status", metavar="STATE", action="append", default=[], help="may be repeated"
    )
    group.add_argument(
        "--tag", metavar="KEY:VALUE", type=tag, action="append", default=[], help="may be repeated"
    )
    group.add_argument("--agent", metavar="NAME")
    group.add_argument(
        "--since", metavar="TIME", type=time_or_age, help="submitted since then, or so long ago"
    )
    group.add_argument("--text", help="stands in the message")
    group.add_argument(
        "-n",
        "--limit",
        type=count,
        default=_DEFAULT_ROWS,
        metavar="N",
        help=f"the newest so many (default {_DEFAULT_ROWS}; 0 for all)",
    )
    parser.add_argument("--watch", action="store_true", help="keep the list up to date")
    add_format_option(parser)
    add_common_options(parser)


def ls(session: Session, options: argparse.Namespace) -> int:
    """List jobs, newest first."""
    wanted = _filter(session, options)
    limit = options.limit or None
    if options.watch:
        return _watch(session, wanted, limit)
    jobs = session.client.find(wanted, limit)
    if options.output == "json":
        print_json([dict(job.raw) for job in jobs])
    elif options.output == "jsonl":
        for job in jobs:
            print_json_line(job.raw)
    elif options.output == "id":
        for job in jobs:
            write_line(str(job.id))
    else:
        _print_jobs(options, jobs)
    return 0


def _filter(session: Session, options: argparse.Namespace) -> JobFilter:
    ids = session.ids(options.ids)
    is_of_all = options.all or ids
    return JobFilter(
        user_id=None if is_of_all else session.settings.user_id,
        service=options.service,
        states=[state[:1].upper() + state[1:].lower() for state in options.status],
        agent=options.agent,
        since=options.since,
        text=options.text,
        tags=dict(options.tag),
        ids=ids,
    )


def _print_jobs(options: argparse.Namespace, jobs: Iterable[JobInfo]) -> None:
    is_for_people = options.output == "table" or is_terminal(sys.stdout)
    first = list(itertools.islice(jobs, 1))
    if not first and is_terminal(sys.stderr) and not options.all:
        say("orchestrator: none of your jobs; --all lists those of all users")
    rows = (_row(job, is_for_people) for job in itertools.chain(first, jobs))
    if first:
        print_table(options.output, _COLUMNS, rows)


def _row(job: JobInfo, is_for_people: bool) -> Sequence[Cell]:
    seconds = _run_seconds(job)
    time_text = duration(seconds) if is_for_people else "" if seconds is None else f"{seconds:.3f}"
    return (
        str(job.id),
        (job.state, STATE_STYLES.get(job.state, "")),
        job.service,
        moment(job.created_at, is_short=is_for_people),
        time_text,
        job.name,
        job.message,
    )


def _run_seconds(job: JobInfo) -> float | None:
    if job.started_at is None:
        return None
    return ((job.finished_at or datetime.now(UTC)) - job.started_at).total_seconds()


def _watch(session: Session, wanted: JobFilter, limit: int | None) -> int:
    """Show the list anew whenever something happens; ends with Ctrl-C."""
    if not is_terminal(sys.stdout):
        raise UsageError("--watch is for a terminal; 'orchestrator events' tells what happens")
    from rich.live import Live

    screen = console()
    rows = max(1, screen.height - 3)
    limit = rows if limit is None else min(limit, rows)
    with Live(console=screen, screen=True, auto_refresh=False) as live:
        live.update(_table(session, wanted, limit), refresh=True)
        for _ in session.client.beats(user_id=wanted.user_id, service=wanted.service):
            live.update(_table(session, wanted, limit), refresh=True)
            time.sleep(_REDRAW_SECONDS)  # a reader can't follow faster, and the server has rest
    return 0


def _table(session: Session, wanted: JobFilter, limit: int) -> Table:
    jobs = session.client.find(wanted, limit)
    return table_of(_COLUMNS, [_row(job, is_for_people=True) for job in jobs])


# --- one job ----------------------------------------------------------------------


def show_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``show``."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="7, 3-7, last, @tag:value, -")
    parser.add_argument("-o", "--output", choices=("text", "json", "jsonl", "id"), default="text")
    add_user_option(parser)
    add_common_options(parser)


def show(session: Session, options: argparse.Namespace) -> int:
    """Show all about jobs."""
    for number, job_id in enumerate(session.ids(options.ids)):
        job = session.client.job(job_id)
        info = job.show()
        if options.output == "json":
            print_json(dict(info.raw))
        elif options.output == "jsonl":
            print_json_line(info.raw)
        elif options.output == "id":
            write_line(str(info.id))
        else:
            if number:
                write_line("")
            _describe(info, job.history())
    return 0


def _describe(info: JobInfo, history: Sequence[Mapping[str, Any]]) -> None:
    for name, value in _facts(info):
        if value:
            write_line(f"{name + ':':<10} {printable(value)}")
    files = info.raw.get("files") or []
    for number, file in enumerate(files):
        name = "files:" if number == 0 else ""
        write_line(f"{name:<10} {printable(file['name'])} ({size(file['size'])})")
    for number, line in enumerate(history):
        name = "history:" if number == 0 else ""
        at = moment(datetime.fromisoformat(line["at"]), is_short=is_terminal(sys.stdout))
        write_line(f"{name:<10} {at} {line['status']}: {printable(line['message'])}")


def _facts(info: JobInfo) -> Iterable[tuple[str, str]]:
    is_short = is_terminal(sys.stdout)
    yield "job", str(info.id)
    yield "name", info.name
    outcome = f" (was {info.outcome})" if info.outcome not in (None, info.state) else ""
    yield "state", f"{info.state}{outcome}"
    yield "message", info.message
    yield "waits", info.waiting or ""
    yield "exit code", "" if info.exit_code is None else str(info.exit_code)
    yield "service", info.service
    yield "user", str(info.user_id)
    yield "agent", info.agent or ""
    yield "priority", str(info.priority) if info.priority else ""
    yield "timeout", duration(info.timeout)
    yield "tags", ", ".join(f"{key}:{value}" for key, value in info.tags.items())
    yield "created", moment(info.created_at, is_short)
    yield "started", moment(info.started_at, is_short)
    yield "finished", moment(info.finished_at, is_short)
    yield "ran for", duration(_run_seconds(info))
    yield "needs", _resources(info.raw.get("resources"))
    yield "used", _usage(info.raw.get("usage"))
    yield "result", size(info.result_size)


def _resources(resources: Mapping[str, Any] | None) -> str:
    if not resources:
        return ""
    words = [f"{resources.get('cpus', 1)} cpus"]
    words += [memory(resources["memory"])] if resources.get("memory") else []
    words += [f"{resources['gpus']} gpus"] if resources.get("gpus") else []
    return ", ".join(words)


def _usage(usage: Mapping[str, Any] | None) -> str:
    if not usage:
        return ""
    words = []
    if usage.get("cpu_seconds") is not None:
        words.append(f"{duration(usage['cpu_seconds'])} of CPU time")
    if usage.get("peak_memory") is not None:
        words.append(f"{memory(usage['peak_memory'])} at its peak")
    return ", ".join(words)
