"""Fetch results: unpacked, as ZIPs, or some of their files."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestrator_client.arguments import add_common_options, add_user_option
from orchestrator_client.commands.following import explain_failure, wait_for
from orchestrator_client.errors import NotFound
from orchestrator_client.identifiers import UsageError
from orchestrator_client.jobs import Job
from orchestrator_client.output import is_terminal, printable, say, size
from orchestrator_client.progress import transfers
from orchestrator_client.session import Session
from orchestrator_client.uploads import checked_name

PATIENCE_SECONDS = 300.0


def get_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe ``get``."""
    parser.add_argument("id", metavar="ID", help="7, 3-7, last, @tag:value, -")
    parser.add_argument(
        "paths", nargs="*", metavar="PATH", help="only these files, directories or patterns"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="where to (default: job-ID; for PATHs the current directory; - prints one file)",
    )
    parser.add_argument(
        "--partial", action="store_true", help="what is there now, or what a failed job left"
    )
    parser.add_argument("--zip", action="store_true", help="keep the ZIP, as job-ID.zip")
    add_user_option(parser)
    add_common_options(parser)


def get(session: Session, options: argparse.Namespace) -> int:
    """Fetch the results of jobs."""
    if options.paths and options.zip:
        raise UsageError("--zip keeps a whole result, and PATHs name parts of it")
    if options.output == "-" and not options.paths:
        raise UsageError("-o - prints one file of a job: name it")
    ids = session.ids([options.id])
    code = 0
    for job_id in ids:
        code = max(code, _get_one(session.client.job(job_id), options, is_one=len(ids) == 1))
    return code


def _get_one(job: Job, options: argparse.Namespace, is_one: bool) -> int:
    if not options.partial:
        info = job.show()
        if not info.state.has_ended:
            if is_terminal(sys.stderr):
                say(f"orchestrator: job {job.id} is {info.state}; waiting for its end")
            info = wait_for(job, None)
        if not info.is_successful:
            return explain_failure(job, info, with_exit_code=False)
    base = Path(options.output or ".")
    if options.paths:
        _get_paths(job, options, base if is_one else base / f"job-{job.id}")
    elif options.zip:
        _get_zip(job, base, options.partial)
    elif options.output is None or not is_one:
        fetch(job, base / f"job-{job.id}", options.partial)
    else:
        fetch(job, base, options.partial)
    return 0


def _get_zip(job: Job, directory: Path, is_partial: bool) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"job-{job.id}.zip"
    with transfers("download") as (progress,):
        if is_partial:
            job.download_partial(target, progress)
        else:
            job.download(target, progress=progress)
    _tell(f"{target}: {size(target.stat().st_size)}")


def _get_paths(job: Job, options: argparse.Namespace, directory: Path) -> None:
    paths = _matching(job, options.paths)
    if options.output == "-":
        if len(paths) != 1:
            raise UsageError(f"-o - prints one file, and these are {len(paths)}")
        for piece in job.stream(paths[0]):
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    for path in paths:
        target = directory / checked_name(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with transfers(path) as (progress,):
            job.save(path, target, progress)
        _tell(str(target))


def _matching(job: Job, patterns: Sequence[str]) -> list[str]:
    """Return the files of a job that are named, lie in a named directory, or match."""
    files = [file.path for file in job.files() if file.kind == "file"]
    found: dict[str, None] = {}
    for pattern in patterns:
        prefix = pattern.rstrip("/") + "/"
        matches = [
            path
            for path in files
            if path == pattern or path.startswith(prefix) or fnmatch.fnmatchcase(path, pattern)
        ]
        if not matches:
            raise NotFound(f"job {job.id} has no file {pattern!r}")
        found |= dict.fromkeys(matches)
    return list(found)


def fetch_result(job: Job, directory: Path) -> None:
    """Unpack the result of a job that is done."""
    fetch(job, directory, is_partial=False)


def fetch(job: Job, directory: Path, is_partial: bool) -> None:
    """Unpack a result, or what there is of it."""
    with transfers("download", "unpack") as (progress, unpacking):
        if is_partial:
            done = job.partial_result(directory, progress=progress, unpack_progress=unpacking)
        else:
            done = job.result(directory, progress=progress, unpack_progress=unpacking)
    _tell(f"{directory}: {done.files} files, {size(done.size)}")
    for name in done.left_out:
        say(f"orchestrator: left out {printable(name)}: it leads out of the directory")


def _tell(text: str) -> None:
    say(f"orchestrator: {printable(text)}")
