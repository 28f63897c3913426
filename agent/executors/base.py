"""The seam between an attempt and what runs its job.

An executor is made once for an agent and gives one :class:`Execution` for each attempt, a new
one as well as one that an earlier process of the agent left. What an execution must know after a
restart lies in the attempt's directory, which says from its beginning whose it is
(:attr:`Executor.name`); who starts something there leaves its own mark first. So a crash at any
instant leaves either nothing started, or a record by which the next process finds what was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.attempt_directory import AttemptDirectory
from agent.outcomes import Exit
from jobs import DEFAULT_RESOURCES, Isolation, IsolationKind, IsolationOffer, Resources, Usage


@dataclass(frozen=True, slots=True)
class Command:
    """What is to run in the directory ``job`` of an attempt, and within which limits.

    ``variables`` are added to what all jobs inherit. ``preparation`` is for the process between
    fork and exec; nobody on the way looks into it. ``timeout_seconds`` None means no limit;
    ``grace_seconds`` lie between SIGTERM and SIGKILL. ``resources`` are what the job may use.
    """

    argv: Sequence[str]
    variables: Mapping[str, str]
    timeout_seconds: float | None
    grace_seconds: float
    resources: Resources = DEFAULT_RESOURCES
    preparation: Mapping[str, object] | None = None


class Execution(ABC):
    """One attempt's job: started once, waited for, ended, adopted."""

    @abstractmethod
    def is_started(self) -> bool:
        """Whether the job was started, perhaps by an earlier process of the agent.

        Answered from the attempt's directory alone, at once.
        """

    def is_handed_on(self) -> bool:
        """Whether somebody else has taken the job, and runs it when its turn comes."""
        return False

    @abstractmethod
    def check_adopted(self) -> None:
        """Raise :class:`~agent.outcomes.JobLost` if what an earlier process left can't be trusted.

        Asked of every attempt without a result, new or found, before anything else.
        """

    @abstractmethod
    async def start(self, command: Command, on_reason: Callable[[str], None]) -> Exit | None:
        """Start the job; returns when it runs, which may take as long as it takes.

        Returns how it ended if somebody else ended it before it ran, else None.

        Starts it once however often asked, also by different processes of the agent, and also
        if a call is cancelled at any point. ``on_reason`` is told why it does not run yet,
        whenever that changes. Raises :class:`~agent.outcomes.JobLost` if it can't be started
        here.
        """

    @abstractmethod
    async def wait(self) -> Exit:
        """Wait until the job and all its processes are gone, and say how it ended.

        Works as well for a job that another process of the agent started: so it is adopted.
        Raises :class:`~agent.outcomes.JobLost` if it vanished and left no exit record.
        """

    @abstractmethod
    async def kill(self) -> Exit:
        """End the job with all its processes, whatever its state; returns when they are gone.

        Says how the job ended, which may have been by itself, just before. A job that was not
        started is never started after this.
        """

    def usage(self, ended: Exit) -> Usage | None:
        """Return what the job has used that ended so; None if that is not known."""
        return None

    @abstractmethod
    def forget(self) -> None:
        """Remove what is left of the job outside its directory, which is removed next."""


class Executor(ABC):
    """One way to run jobs."""

    name: str
    """What stands in the directory of an attempt that this executor is to run."""

    is_remote = False
    """Whether jobs write their files on other machines, so that nobody is told of it here."""

    @abstractmethod
    async def run(self) -> None:
        """Do what all executions have need of; cancelled when the agent ends.

        May return at once. Called before the first attempt is taken up.
        """

    async def make_ready(self) -> None:  # noqa: B027 many have nothing to find out
        """Find out what this machine can do; comes before everything else.

        Raises :class:`~agent.settings.AgentRefused` if it can't do what it was told to.
        """

    def resources(self) -> Resources | None:
        """Return what it has for jobs; None if it does not know: a core for each slot."""
        return None

    def isolation_offers(self) -> tuple[IsolationOffer, ...]:
        """Return what is made of each kind of isolation."""
        return ()

    def default_isolation(self) -> IsolationKind:
        """Return what ``auto`` means."""
        return IsolationKind.NONE

    def problem_with(self, isolation: Isolation) -> str | None:
        """Say why jobs can't be isolated so; None if they can. May take seconds."""
        if isolation.is_default() or isolation.kind is IsolationKind.NONE:
            return None
        return f"this agent can't isolate its jobs: it hands them on ({self.name})"

    def problem(self) -> str | None:
        """Say what keeps this executor from starting any job at all; None if nothing does."""
        return None

    @abstractmethod
    def execution(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of a new attempt."""

    def adopt(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt that an earlier process has left."""
        return self.execution(directory)

    @abstractmethod
    async def end_abandoned(self, attempt: Path) -> None:
        """End what runs of an attempt of which only the path of its directory is known.

        Its record can't be read, but this executor may have started it. Raises
        :class:`OSError` if that can't be done now.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; jobs go on."""
