"""Change jobs: end them, run them again, free what they hold."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from orchestrator_client.arguments import add_common_options, add_format_option, add_user_option
from orchestrator_client.errors import Conflict, NotFound
from orchestrator_client.exit_codes import DONE, REFUSED, USAGE
from orchestrator_client.operations import JobFilter
from orchestrator_client.output import print_json, print_json_line, printable, say, write_line
from orchestrator_client.progress import counting
from orchestrator_client.records import BulkAnswer
from orchestrator_client.session import Session

PATIENCE_SECONDS = 60.0
_MANY = 20  # ids that are printed one by one; more are changed by one request


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help="7, 3-7, last, @tag:value, -")
    add_format_option(parser)
    add_user_option(parser)
    add_common_options(parser)


cancel_arguments = rerun_arguments = delete_arguments = _arguments


def cancel(session: Session, options: argparse.Namespace) -> int:
    """End jobs that have not ended."""
    ids = session.ids(options.ids)
    if len(ids) > _MANY and options.output is None:
        return _tell(session.client.terminate(JobFilter(ids=ids)), "ended")
    return _one_by_one(ids, options, lambda job_id: _terminate(session, job_id))


def rerun(session: Session, options: argparse.Namespace) -> int:
    """Submit jobs once more."""
    ids = session.ids(options.ids)
    return _one_by_one(ids, options, lambda job_id: session.client.job(job_id).rerun().id)


def delete(session: Session, options: argparse.Namespace) -> int:
    """Free the bytes of jobs that have ended."""
    ids = session.ids(options.ids)
    if len(ids) > _MANY and options.output is None:
        return _tell(session.client.delete(JobFilter(ids=ids)), "deleted")
    return _one_by_one(ids, options, lambda job_id: _delete(session, job_id))


def _terminate(session: Session, job_id: int) -> int:
    session.client.job(job_id).terminate()
    return job_id


def _delete(session: Session, job_id: int) -> int:
    session.client.job(job_id).delete()
    return job_id


def _one_by_one(
    ids: Sequence[int], options: argparse.Namespace, change: Callable[[int], int]
) -> int:
    """Change each; those that can't be changed are told, and fail the command if no other could.

    Prints the id of each job that it worked for, of a new one for a rerun.
    """
    done: list[int] = []
    missing = 0
    with counting("jobs", len(ids)) as progress:
        for number, job_id in enumerate(ids):
            progress(number, len(ids))
            try:
                done.append(change(job_id))
            except (Conflict, NotFound) as error:
                say(f"orchestrator: job {job_id}: {printable(error)}")
                missing += isinstance(error, NotFound)
                continue
            if options.output == "jsonl":
                print_json_line({"id": done[-1]})
            elif options.output != "json":
                write_line(str(done[-1]))
    if options.output == "json":
        print_json([{"id": job_id} for job_id in done])
    return USAGE if missing else DONE if done else REFUSED


def _tell(answer: BulkAnswer, word: str) -> int:
    """Tell of many in one line."""
    say(f"orchestrator: {answer.done} {word}, {answer.skipped} left as they were")
    return DONE if answer.done else REFUSED
