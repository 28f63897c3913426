"""What is known of all our jobs in Slurm: one squeue for all, and the notices of the nodes.

A node says that there is something to look at by a file in the directory of notices: one
directory to read for all jobs, however many there are. Where the file system tells of changes
by other machines only when asked, it is asked every second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.executors.slurm_commands import SlurmCommands, SlurmJob, SlurmSilent
from agent.inotify import DirectoryWatch
from telemetry.logs import event

log = logging.getLogger("orchestrator.slurm")

_FIRST_PAUSE = 2.0  # between two questions to slurmctld, at least
_LAST_PAUSE = 30.0
_PAUSE_GROWTH = 1.5
_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Listing:
    """What squeue said; ``begun`` is when it was asked, by the loop's clock."""

    begun: float
    jobs: Mapping[str, tuple[SlurmJob, ...]]

    def named(self, name: str) -> tuple[SlurmJob, ...]:
        """Return the jobs of a name: one, as a rule."""
        return self.jobs.get(name, ())


class SlurmWatch:
    """Asks Slurm, and wakes those whom the answer concerns."""

    def __init__(self, commands: SlurmCommands, notices: Path) -> None:
        self._commands = commands
        self._notices = notices
        self._listing = Listing(float("-inf"), {})
        self._listed = asyncio.Condition()
        self._watchers: dict[str, asyncio.Event] = {}
        self._is_watched = asyncio.Event()
        self._is_hurried = asyncio.Event()
        self._is_noticed = asyncio.Event()
        self._problem: str | None = None
        self._silent_since = 0.0

    @property
    def listing(self) -> Listing:
        """What squeue said last; may be old."""
        return self._listing

    def problem(self) -> str | None:
        """Say since when and how Slurm gives no answer; None if it does."""
        if self._problem is None:
            return None
        since = time.strftime("%H:%M:%S", time.localtime(self._silent_since))
        return f"Slurm has not answered since {since}: {self._problem}"

    @contextmanager
    def watching(self, attempt: str) -> Iterator[asyncio.Event]:
        """Have the event set whenever there may be news of an attempt."""
        news = asyncio.Event()
        self._watchers[attempt] = news
        self._is_watched.set()
        try:
            yield news
        finally:
            if self._watchers.get(attempt) is news:
                del self._watchers[attempt]
            if not self._watchers:
                self._is_watched.clear()

    def hurry(self) -> None:
        """Ask Slurm as soon as it may be asked again: something is about to change."""
        self._is_hurried.set()

    async def listing_after(self, moment: float) -> Listing:
        """Wait for an answer to a question that was asked after a moment of the loop's clock.

        Takes as long as Slurm gives no answer. To be called while :meth:`watching`.
        """
        async with self._listed:
            while self._listing.begun <= moment:
                self.hurry()
                await self._listed.wait()
            return self._listing

    async def run(self) -> None:
        """Keep asking and looking; ends by cancellation."""
        self._notices.mkdir(mode=0o700, parents=True, exist_ok=True)
        watch = DirectoryWatch(self._notices, self._is_noticed.set)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._ask(), name="squeue")
                tasks.create_task(self._look(), name="notices")
        finally:
            watch.close()

    # --- squeue

    async def _ask(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            await self._is_watched.wait()
            self._is_hurried.clear()
            has_changed = await self._ask_once()
            await asyncio.sleep(_FIRST_PAUSE)
            pause = _FIRST_PAUSE if has_changed else min(pause * _PAUSE_GROWTH, _LAST_PAUSE)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_hurried.wait(), pause - _FIRST_PAUSE)

    async def _ask_once(self) -> bool:
        """Ask; returns whether the answer differs from the one before."""
        begun = asyncio.get_running_loop().time()
        try:
            answer = await self._commands.jobs()
        except SlurmSilent as error:
            self._note_silence(str(error))
            return False
        if self._problem is not None:
            event(log, "slurm_answers_again")
            self._problem = None
        jobs: dict[str, tuple[SlurmJob, ...]] = {}
        for job in answer:
            jobs[job.name] = (*jobs.get(job.name, ()), job)
        has_changed = jobs != self._listing.jobs
        async with self._listed:
            self._listing = Listing(begun, jobs)
            self._listed.notify_all()
        for news in self._watchers.values():
            news.set()
        return has_changed

    def _note_silence(self, message: str) -> None:
        if self._problem is None:
            self._silent_since = time.time()
            event(log, "slurm_silent", level=logging.WARNING, error=message)
        self._problem = message
        for news in self._watchers.values():
            news.set()

    # --- notices

    async def _look(self) -> None:
        while True:
            await self._is_watched.wait()
            self._is_noticed.clear()
            try:
                names = await asyncio.to_thread(_take_names, self._notices)
            except OSError as error:
                event(log, "notices_unreadable", level=logging.WARNING, error=str(error))
                names = list(self._watchers)  # then everybody must look for themselves
            for name in names:
                if news := self._watchers.get(name):
                    news.set()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_noticed.wait(), _LOOK_SECONDS)


def _take_names(directory: Path) -> list[str]:
    """Return and remove the files of a directory.

    They are removed first: a notice that comes after that is seen the next time.
    """
    names = os.listdir(directory)
    for name in names:
        with suppress(FileNotFoundError):
            os.unlink(directory / name)
    return names
