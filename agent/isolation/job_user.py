"""Giving up root: whom jobs run as where the agent is root, and handing files over to them."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.isolation.base import CannotIsolate, JobUser, Place

_RANGE = re.compile(r"(\d+)-(\d+)")
_LARGEST_UID = 2**32 - 2
_OPEN_TO_PASS, _PRIVATE = 0o711, 0o700


@dataclass(frozen=True, slots=True)
class JobUsers:
    """One account for all jobs, or a range of user ids of which each job has its own."""

    account: JobUser | None = None
    first: int = 0
    last: int = 0

    @property
    def has_range(self) -> bool:
        """Whether each job has a user id of its own."""
        return self.account is None

    def some(self) -> JobUser:
        """Return one of them."""
        return self.account or JobUser(self.last, self.last)

    def free(self, taken: Iterable[int]) -> JobUser:
        """Return the user of a new job; ``taken`` are the user ids of those that are here.

        Raises :class:`CannotIsolate` if there is no other.
        """
        if self.account is not None:
            return self.account
        held = set(taken)
        for uid in range(self.first, self.last + 1):
            if uid not in held:
                return JobUser(uid, uid)
        raise CannotIsolate(f"the jobs that are here have all user ids of {self.first}-{self.last}")

    def covers(self, uid: int) -> bool:
        """Whether a user id is one of jobs."""
        return uid == self.account.uid if self.account else self.first <= uid <= self.last


def parsed(text: str, slots: int) -> JobUsers:
    """Return the users that ``NAME`` or ``FIRST-LAST`` means.

    Raises :class:`ValueError` that says what is wrong with it.
    """
    if match := _RANGE.fullmatch(text):
        first, last = int(match[1]), int(match[2])
        if not 1 <= first <= last <= _LARGEST_UID:
            raise ValueError(f"{text}: a range of user ids goes from a smaller one, not 0, up")
        if last - first + 1 <= slots:
            raise ValueError(f"{text}: {slots} jobs at a time need more user ids than that")
        for account in pwd.getpwall():
            if first <= account.pw_uid <= last:
                raise ValueError(f"{text}: {account.pw_uid} is the user {account.pw_name}")
        return JobUsers(first=first, last=last)
    try:
        account = pwd.getpwnam(text)
    except KeyError:
        raise ValueError(f"{text}: there is no such user; a range is written 60000-60999") from None
    if account.pw_uid == 0:
        raise ValueError(f"{text}: is root, which jobs are to give up")
    groups = tuple(os.getgrouplist(text, account.pw_gid))
    home = account.pw_dir if os.path.isdir(account.pw_dir) else None
    return JobUsers(JobUser(account.pw_uid, account.pw_gid, groups, text, home))


def open_to_pass(workdir: Path) -> None:
    """Let job users pass through the work directory, where they can list and read nothing."""
    for directory in (workdir, workdir / "attempts"):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(_OPEN_TO_PASS)


def closed_to(user: JobUser, directory: Path) -> Path | None:
    """Return the highest directory on the way to one that a user can't pass, if any."""
    real = Path(os.path.realpath(directory))
    for above in (*reversed(real.parents), real):
        status = above.stat()
        if status.st_uid == user.uid:
            needed = 0o100
        elif status.st_gid in (user.gid, *user.groups):
            needed = 0o010
        else:
            needed = 0o001
        if not status.st_mode & needed:
            return above
    return None


def hand_over(place: Place, user: JobUser) -> None:
    """Give an attempt's files to the user of its job, before anything of that user's runs.

    Everything here was made by the agent. Even so, no path is followed and nothing is given away
    that has another name elsewhere, should a job run here already against all precautions.
    """
    place.attempt.chmod(_OPEN_TO_PASS)
    for top in (place.job, place.temporary):
        _give(top, user)
        top.chmod(_PRIVATE)
    for log in place.logs:
        os.close(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        os.chown(log, user.uid, user.gid, follow_symlinks=False)


def _give(top: Path, user: JobUser) -> None:
    for _, _, names, directory in os.fwalk(top, follow_symlinks=False):
        os.fchown(directory, user.uid, user.gid)
        for name in names:
            if os.stat(name, dir_fd=directory, follow_symlinks=False).st_nlink == 1:
                os.chown(name, user.uid, user.gid, dir_fd=directory, follow_symlinks=False)


def owner_of(place: Place) -> int | None:
    """Return the user id to which an attempt was handed over, if there is one."""
    try:
        return place.job.lstat().st_uid
    except OSError:
        return None
