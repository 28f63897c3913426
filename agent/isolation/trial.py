"""Trying an isolation out: a tiny job that reports whether it holds.

It is started as any job is, by a thread that has given up what a job gives up.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from agent.isolation import before_exec
from agent.isolation.base import Enclosure, JobUser, Place
from agent.isolation.job_user import hand_over, open_to_pass
from jobs import RUN_SCRIPT

_SECONDS = 60.0
_SECRET = "ORCHESTRATOR_TRIAL_SECRET"
_CANNOT_ENTER, _CANNOT_WRITE, _CAN_READ_SECRET = 41, 42, 43
_SCRIPT = f"""\
cd "$PWD" || exit {_CANNOT_ENTER}
echo ok > written || exit {_CANNOT_WRITE}
echo ok > "$TMPDIR/written" || exit {_CANNOT_WRITE}
if read -r line < "${_SECRET}"; then exit {_CAN_READ_SECRET}; fi
exit 0
"""
_MEANINGS = {
    _CANNOT_ENTER: "its job can't enter its own directory",
    _CANNOT_WRITE: "its job can't write in its own directory",
    _CAN_READ_SECRET: "its job can read what it must not",
}


@contextmanager
def trial_place(workdir: Path, user: JobUser | None) -> Iterator[Place]:
    """Make a place such as attempts have, with the trial as its job; removed in the end."""
    place = Place(workdir / "trials" / "1")
    shutil.rmtree(place.attempt.parent, ignore_errors=True)
    for directory in (place.job, place.temporary):
        directory.mkdir(parents=True)
    try:
        (place.job / RUN_SCRIPT).write_text(_SCRIPT, encoding="ascii")
        secret_of(place).write_text("secret\n", encoding="ascii")
        if user is not None:
            # as it would be if all that is in the way were the isolation
            secret_of(place).chmod(0o644)
            place.attempt.parent.chmod(0o711)
            open_to_pass(workdir)
            hand_over(place, user)
        yield place
    finally:
        shutil.rmtree(place.attempt.parent, ignore_errors=True)


def secret_of(place: Place) -> Path:
    """Return what the trial tries to read: a file beside the attempt."""
    return place.attempt.parent / "secret"


def problem_of(place: Place, enclosure: Enclosure, environment: Mapping[str, str]) -> str | None:
    """Run the trial; says why the isolation does not hold here, or None if it does."""
    variables = {**environment, **enclosure.variables, _SECRET: str(secret_of(place))}
    for log in place.logs:
        log.touch()

    def run() -> subprocess.CompletedProcess[bytes]:
        for steps in (enclosure.preparation or {}).values():
            before_exec.prepare(steps)
        return subprocess.run(
            enclosure.argv,
            cwd=place.job,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
        )

    try:
        ended = _in_thread_of_its_own(run)
    except (OSError, subprocess.SubprocessError) as error:
        return f"it can't be started: {error}"
    if ended.returncode == 0:
        return None
    said = " ".join(ended.stdout.decode(errors="replace").split())[-300:]
    meaning = _MEANINGS.get(ended.returncode, f"its trial ended with status {ended.returncode}")
    return f"{meaning}: {said}" if said else meaning


def _in_thread_of_its_own(
    function: Callable[[], subprocess.CompletedProcess[bytes]],
) -> subprocess.CompletedProcess[bytes]:
    """Call a function in a thread that ends with it, and what it has given up with it."""
    results: list[subprocess.CompletedProcess[bytes]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except (OSError, subprocess.SubprocessError) as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="trial of an isolation")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
