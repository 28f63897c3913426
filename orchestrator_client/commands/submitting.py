"""Submit jobs: files with a script, or a command line; wait for them, follow and fetch them."""

from __future__ import annotations

import argparse
import glob
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from orchestrator_client.arguments import (
    add_common_options,
    add_user_option,
    count,
    duration_seconds,
    parameter,
    tag,
    whole_seconds,
)
from orchestrator_client.commands.fetching import fetch_result
from orchestrator_client.commands.following import (
    explain_failure,
    follow_job,
    wait_for,
    wait_for_many,
)
from orchestrator_client.identifiers import UsageError
from orchestrator_client.jobs import Job
from orchestrator_client.output import print_json_line, printable, say, write_line
from orchestrator_client.progress import counting, transfers
from orchestrator_client.records import JobInfo
from orchestrator_client.session import Session, for_people
from orchestrator_client.submissions import Submission
from orchestrator_client.uploads import FileLike

PATIENCE_SECONDS = 60.0
_BATCH_TAG = "batch"


def submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``submit``."""
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILES",
        help="files and directories; one is run.sh, unless --script names it",
    )
    parser.add_argument("--script", metavar="FILE", help="upload this file as run.sh")
    parser.add_argument(
        "--each",
        metavar="PATTERN",
        help="make one job for each file that matches, all of them one batch (quote the pattern)",
    )
    _add_job_options(parser)
    after = parser.add_mutually_exclusive_group()
    after.add_argument("--wait", action="store_true", help="wait until it has ended")
    after.add_argument("--follow", action="store_true", help="show what it prints, to its end")
    after.add_argument("--get", metavar="DIR", help="wait, and unpack the result into a directory")
    _add_ending_options(parser)
    parser.add_argument("-o", "--output", choices=("id", "json", "jsonl"), default="id")
    add_common_options(parser)


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``run``; what follows ``--`` was taken off before."""
    parser.usage = "orchestrator run [FILES] [options] -- COMMAND [ARGUMENTS]"
    parser.add_argument(
        "files", nargs="*", metavar="FILES", help="files and directories that the command needs"
    )
    _add_job_options(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="where the result goes (default: job-ID)"
    )
    parser.add_argument("--no-get", action="store_true", help="leave the result at the server")
    _add_ending_options(parser)
    add_common_options(parser)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the job")
    group.add_argument(
        "-s", "--service", help="ORCHESTRATOR_SERVICE; default: the only one that there is"
    )
    add_user_option(group)
    group.add_argument("--name", metavar="TEXT", help="a name for people")
    group.add_argument(
        "--tag", metavar="KEY:VALUE", type=tag, action="append", default=[], help="may be repeated"
    )
    group.add_argument("--priority", type=int, metavar="N", help="-100 to 100, among your own jobs")
    group.add_argument(
        "--timeout", type=whole_seconds, metavar="TIME", help="end it after so long, as 90s or 2h"
    )
    group.add_argument("--cpus", type=count, metavar="N", help="cores that it needs")
    group.add_argument("--memory", metavar="SIZE", help="memory that it needs, as 512M or 8G")
    group.add_argument("--gpus", type=count, metavar="N", help="GPUs that it needs")
    group.add_argument(
        *("-p", "--parameter"),
        metavar="NAME=VALUE",
        type=parameter,
        action="append",
        default=[],
        help="goes into parameters.json beside the files; may be repeated",
    )


def _add_ending_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exit-code", action="store_true", help="end with the exit code of a job that failed"
    )
    parser.add_argument(
        "--within", metavar="TIME", type=duration_seconds, help="wait no longer than this (124)"
    )


# --- submit -----------------------------------------------------------------------


def submit(session: Session, options: argparse.Namespace) -> int:
    """Submit a job, or one for each match."""
    common = _files_of(options)
    if options.each is None:
        return _submit_one(session, options, common)
    if options.follow:
        raise UsageError("--follow is for one job; use --wait or --get with --each")
    return _submit_each(session, options, common)


def _files_of(options: argparse.Namespace) -> list[FileLike]:
    files: list[FileLike] = list(options.files)
    if options.script is not None:
        files.append(("run.sh", Path(options.script)))
    if not files and options.each is None:
        raise UsageError("no files: name those to upload, one of them run.sh")
    return files


def _submit_one(session: Session, options: argparse.Namespace, files: list[FileLike]) -> int:
    submission = _submission(session, options, files)
    with transfers("upload") as (progress,):
        job = session.client.submit_this(submission, progress)
    if options.output == "id":
        write_line(str(job.id))
    else:
        print_json_line({"id": job.id})
    return _after_submission(session, options, job)


def _after_submission(session: Session, options: argparse.Namespace, job: Job) -> int:
    if options.follow:
        info = follow_job(job, options.within)
    elif options.wait or options.get is not None:
        info = wait_for(job, options.within)
    else:
        if for_people():
            say(f"'orchestrator logs -f {job.id}' shows what it prints")
            say(f"'orchestrator get {job.id}' fetches the result")
        return 0
    if not info.is_successful:
        return explain_failure(job, info, options.exit_code, has_seen_output=options.follow)
    if options.get is not None:
        fetch_result(job, Path(options.get))
    return 0


def _submit_each(session: Session, options: argparse.Namespace, common: list[FileLike]) -> int:
    matches = sorted(
        path for path in glob.glob(options.each, recursive=True) if not Path(path).is_dir()
    )
    if not matches:
        raise UsageError(f"no file matches {options.each!r}")
    batch = uuid.uuid4().hex[:10]
    ids = []
    with counting("submit", len(matches)) as progress:
        for done, path in enumerate(matches):
            progress(done, len(matches))
            submission = _submission(
                session, options, [*common, path], options.name or Path(path).name, batch
            )
            ids.append(session.client.submit_this(submission).id)
    _print_batch(options.output, batch, ids)
    if not options.wait and options.get is None:
        if for_people():
            say(f"{len(ids)} jobs: 'orchestrator wait @batch:{batch}' waits for them all")
        return 0
    return _end_batch(session, options, ids)


def _print_batch(output: str, batch: str, ids: Sequence[int]) -> None:
    if output == "id":
        write_line(f"@{_BATCH_TAG}:{batch}")
    elif output == "json":
        print_json_line({"batch": batch, "jobs": list(ids)})
    else:
        for job_id in ids:
            print_json_line({"id": job_id, "batch": batch})


def _end_batch(session: Session, options: argparse.Namespace, ids: Sequence[int]) -> int:
    code = 0
    for info in wait_for_many(session, ids, options.within):
        job = session.client.job(info.id)
        if not info.is_successful:
            say(f"job {info.id} ({printable(info.name)}): {info.state}: {printable(info.message)}")
            code = 1
        elif options.get is not None:
            fetch_result(job, Path(options.get, str(info.id)))
    return code


def _submission(
    session: Session,
    options: argparse.Namespace,
    files: Sequence[FileLike],
    name: str | None = None,
    batch: str | None = None,
) -> Submission:
    tags = dict(options.tag)
    if len(tags) != len(options.tag):
        raise UsageError("--tag: a key is given more than once")
    if batch is not None:
        tags[_BATCH_TAG] = batch
    return Submission(
        service=_service(session),
        files=files,
        user_id=session.settings.user_id,
        name=name or options.name,
        priority=options.priority,
        timeout=options.timeout,
        tags=tags,
        cpus=options.cpus,
        memory=options.memory,
        gpus=options.gpus,
        parameters=dict(options.parameter),
    )


def _service(session: Session) -> str:
    """Return the service that is wanted, or the only one that the server has."""
    if session.service is None:
        if session.settings.service is not None:
            session.service = session.settings.service
        else:
            names = [s["name"] for s in session.client.services() if s["is_configured"]]
            if len(names) != 1:
                there = ", ".join(map(printable, names)) or "none"
                raise UsageError(f"say which service with -s (there: {there})")
            session.service = names[0]
    return session.service


# --- run --------------------------------------------------------------------------


def run(session: Session, options: argparse.Namespace) -> int:
    """Run a command as a job: submit it, show what it prints, fetch the result."""
    files: list[FileLike] = [*options.files, ("run.sh", _script(options.command_line))]
    submission = _submission(session, options, files, _name_of(options.command_line))
    with transfers("upload") as (progress,):
        job = session.client.submit_this(submission, progress)
    say(f"orchestrator: job {job.id}")
    info: JobInfo = follow_job(job, options.within)
    if not info.is_successful:
        return explain_failure(job, info, options.exit_code, has_seen_output=True)
    if not options.no_get:
        fetch_result(job, Path(options.output or f"job-{job.id}"))
    return 0


def _script(words: Sequence[str]) -> bytes:
    """Return a run.sh: one word is a line of shell, several are a command and its arguments."""
    line = words[0] if len(words) == 1 else shlex.join(words)
    try:
        return f"{line}\n".encode()
    except UnicodeEncodeError:
        return f"{line}\n".encode(sys.getfilesystemencoding(), "surrogateescape")


def _name_of(words: Sequence[str]) -> str:
    text = " ".join(words)
    return "".join(c if c.isprintable() else " " for c in text)[:80]
