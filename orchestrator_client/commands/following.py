"""Wait for jobs, show what they print while they run, and explain those that failed."""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from orchestrator_client.arguments import (
    add_common_options,
    add_format_option,
    add_user_option,
    duration_seconds,
)
from orchestrator_client.errors import Conflict, NotFound, OrchestratorError, WaitTimeout
from orchestrator_client.exit_codes import DONE, FAILED
from orchestrator_client.identifiers import UsageError
from orchestrator_client.jobs import Job
from orchestrator_client.output import (
    STATE_STYLES,
    Cell,
    Column,
    print_json,
    print_json_line,
    print_table,
    printable,
    say,
    write_line,
)
from orchestrator_client.progress import counting
from orchestrator_client.records import JobInfo, JobState
from orchestrator_client.session import Interrupted, Session
from orchestrator_client.terminal import TerminalFilter

PATIENCE_SECONDS = 300.0
_SHOWN_LINES = 10
_LOOK_SECONDS, _LOOK_SELDOM_SECONDS = 1.5, 15.0
_NOT_YET_RUNNING = (JobState.QUEUED, JobState.PROCESSING, JobState.SUBMITTED)


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``logs``."""
    parser.add_argument("id", metavar="ID", help="a number, last, or @tag:value of one job")
    parser.add_argument("-f", "--follow", action="store_true", help="until the job has ended")
    parser.add_argument(
        "--stderr", dest="stream", action="store_const", const="stderr", default="stdout"
    )
    add_user_option(parser)
    add_common_options(parser)


def logs(session: Session, options: argparse.Namespace) -> int:
    """Print what a job printed."""
    ids = session.ids([options.id])
    if len(ids) != 1:
        raise UsageError(f"logs shows one job, and {options.id} names {len(ids)}")
    job = session.client.job(ids[0])
    _copy(job, options.stream, sys.stdout.fileno(), options.follow)
    return 0


def wait_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``wait``."""
    parser.add_argument("ids", nargs="+", metavar="ID", help="7, 3-7, last, @tag:value, -")
    parser.add_argument(
        "--timeout", metavar="TIME", type=duration_seconds, help="wait no longer than this (124)"
    )
    parser.add_argument(
        "--exit-code", action="store_true", help="end with the exit code of a job that failed"
    )
    add_format_option(parser)
    add_user_option(parser)
    add_common_options(parser)


def wait(session: Session, options: argparse.Namespace) -> int:
    """Wait for jobs to end."""
    ids = session.ids(options.ids)
    if len(ids) == 1:
        job = session.client.job(ids[0])
        info = wait_for(job, options.timeout)
        _print_ended(options.output, [info])
        if info.is_successful:
            return DONE
        return explain_failure(job, info, options.exit_code)
    has_failed = False

    def ended() -> Iterator[JobInfo]:
        nonlocal has_failed
        for info in wait_for_many(session, ids, options.timeout):
            has_failed = has_failed or not info.is_successful
            yield info

    _print_ended(options.output, ended())
    return FAILED if has_failed else DONE


def _print_ended(output: str | None, ended: Iterable[JobInfo]) -> None:
    """Print jobs, each as it ends unless it is to be one table or one JSON text."""
    if output == "id":
        for info in ended:
            write_line(str(info.id))
    elif output == "json":
        print_json([dict(info.raw) for info in ended])
    elif output == "jsonl":
        for info in ended:
            print_json_line(info.raw)
    else:
        columns = (
            *(Column("ID", is_right=True), Column("STATE")),
            *(Column("NAME", may_shrink=True), Column("MESSAGE", may_shrink=True)),
        )
        print_table(output, columns, map(_ended_row, ended))


def _ended_row(info: JobInfo) -> Sequence[Cell]:
    return (
        *(str(info.id), (info.state, STATE_STYLES.get(info.state, ""))),
        *(info.name, info.message),
    )


# --- waiting ----------------------------------------------------------------------


@contextlib.contextmanager
def _jobs_go_on(ids: Sequence[int]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if len(ids) == 1:
            text = f"job {ids[0]} goes on; 'orchestrator cancel {ids[0]}' ends it"
        else:
            text = f"{len(ids)} jobs go on; 'orchestrator cancel ID…' ends them"
        raise Interrupted(text) from None


def wait_for(job: Job, seconds: float | None) -> JobInfo:
    """Return a job once it has ended."""
    with _jobs_go_on([job.id]), counting(f"job {job.id}", 1):
        return job.wait(seconds)


def wait_for_many(session: Session, ids: Sequence[int], seconds: float | None) -> Iterator[JobInfo]:
    """Yield jobs as they end. Raises :class:`WaitTimeout`, and :class:`NotFound` at the end."""
    missing = set(ids)
    with _jobs_go_on(ids), counting("jobs ended", len(ids)) as progress:
        ended = session.client.wait_all(ids, timeout=seconds)
        for done, info in enumerate(ended, 1):
            missing.discard(info.id)
            progress(done, len(ids))
            yield info
    if missing:
        some = ", ".join(map(str, sorted(missing)[:5]))
        raise NotFound(f"there are no jobs {some}{'…' if len(missing) > 5 else ''}")


# --- what jobs print --------------------------------------------------------------


def follow_job(job: Job, seconds: float | None) -> JobInfo:
    """Show what a job prints, on both streams, until it has ended; return it then."""
    with _jobs_go_on([job.id]):
        ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for stream, number in (("stdout", 1), ("stderr", 2)):
            threading.Thread(
                target=_copy_in_thread, args=(job, stream, number, ends), daemon=True
            ).start()
        deadline = None if seconds is None else time.monotonic() + seconds
        _tell_why_it_waits(job, ends, deadline)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return job.wait(left)


def _copy_in_thread(
    job: Job, stream: str, number: int, ends: queue.SimpleQueue[BaseException | None]
) -> None:
    try:
        _copy(job, stream, number, follow=True)
    except Conflict:
        ends.put(None)  # it could not be run and has no output; its end says why
    except BaseException as error:  # noqa: BLE001 - raised again by the main thread
        ends.put(error)
    else:
        ends.put(None)


def _tell_why_it_waits(
    job: Job, ends: queue.SimpleQueue[BaseException | None], deadline: float | None
) -> None:
    """Wait for both streams to end; meanwhile say why a job does not run yet."""
    running, said = 2, ""
    pause: float | None = _LOOK_SECONDS
    while running:
        try:
            error = ends.get(timeout=_until(pause, deadline))
        except queue.Empty:
            if deadline is not None and time.monotonic() >= deadline:
                raise WaitTimeout(f"job {job.id} has not ended in time; it goes on") from None
            info = job.show()
            if info.waiting and info.waiting != said:
                said = info.waiting
                say(f"orchestrator: job {job.id} waits: {printable(said)}")
            is_waiting = info.state in _NOT_YET_RUNNING
            pause = min(2 * (pause or _LOOK_SECONDS), _LOOK_SELDOM_SECONDS) if is_waiting else None
            continue
        if error is not None:
            raise error
        running -= 1


def _until(pause: float | None, deadline: float | None) -> float | None:
    """Return how long to wait: for a pause (None: for ever), and not beyond a deadline."""
    if deadline is None:
        return pause
    left = max(0.0, deadline - time.monotonic())
    return left if pause is None else min(pause, left)


def _copy(job: Job, stream: str, number: int, follow: bool) -> None:
    """Write a stream of a job to a file descriptor, byte for byte unless it is a terminal."""
    filtered = TerminalFilter() if os.isatty(number) else None
    for piece in job.output(stream, follow=follow):
        data = piece if filtered is None else filtered.feed(piece)
        while data:
            data = data[os.write(number, data) :]


# --- failures ---------------------------------------------------------------------


def explain_failure(
    job: Job, info: JobInfo, with_exit_code: bool, has_seen_output: bool = False
) -> int:
    """Say why a job failed, with the end of what it printed; return the exit code for that."""
    state = info.outcome or info.state
    where = f" (agent {info.agent})" if info.agent else ""
    say(f"orchestrator: job {info.id} is {state}: {printable(info.message)}{where}")
    if not has_seen_output:
        for stream in ("stderr", "stdout"):
            if _show_end(job, stream):
                break
    if info.state is not JobState.CLEANED:
        say(f"orchestrator: 'orchestrator get {info.id} --partial' fetches what it left")
    return exit_code_of(info) if with_exit_code else FAILED


def _show_end(job: Job, stream: str) -> bool:
    """Show the last lines of what a job printed; returns False if there are none."""
    try:
        end = job.output_end(stream)
    except OrchestratorError:
        return False  # the failure itself matters more than why its output can't be had
    lines = end.decode("utf-8", "replace").splitlines()[-_SHOWN_LINES:]
    if not lines:
        return False
    say(f"orchestrator: the end of its {stream}:")
    for line in lines:
        say(f"  {printable(line)}")
    return True


def exit_code_of(info: JobInfo) -> int:
    """Return the exit code of a job that failed, as a shell would tell it; 1 if it has none."""
    code = info.exit_code
    if not code:
        return 1
    return 128 - code if code < 0 else code & 0xFF or 1


# --- events -----------------------------------------------------------------------


def events_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``events``."""
    parser.add_argument("-s", "--service", help="only of this service")
    parser.add_argument("-a", "--all", action="store_true", help="of all users, and of agents")
    parser.add_argument("--after", metavar="POSITION", help="begin after an earlier position")
    parser.add_argument("-o", "--output", choices=("text", "jsonl"), default="text")
    add_user_option(parser)
    add_common_options(parser)


def events(session: Session, options: argparse.Namespace) -> int:
    """Print what happens, as it happens, until interrupted."""
    user_id = None if options.all else session.settings.user_id
    for event in session.client.events(
        user_id=user_id, service=options.service, after=options.after
    ):
        data = event.data
        if options.output == "jsonl":
            print_json_line({"position": event.position, "kind": event.kind, **data})
        elif event.kind == "job":
            words = (data["at"], f"job {data['id']}", data["status"], data["message"])
            write_line("\t".join(map(printable, words)))
        else:
            words = (data["at"], f"agent {data['name']}", data["status"], "")
            write_line("\t".join(map(printable, words)))
    return 0
