"""Jobs run by a Slurm cluster: one batch job for each attempt, in it our own supervisor.

The agent is on a machine that may submit; the work directory is on a file system that the nodes
share with it.
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from pathlib import Path

from agent import plain_files
from agent.attempt_directory import AttemptDirectory
from agent.executors.base import Execution, Executor
from agent.executors.slurm_commands import SlurmSilent, Standing
from agent.executors.slurm_execution import SlurmExecution
from agent.executors.slurm_host import SubmitHost
from agent.executors.slurm_records import name_in
from jobs import (
    MAX_CPUS,
    MAX_GPUS,
    MAX_MEMORY_BYTES,
    Isolation,
    IsolationKind,
    IsolationOffer,
    Resources,
)

_LOOK_SECONDS = 2.0
_ABANDONED_SECONDS = 120.0
_NO_CONTAINERS = "containers are not started through Slurm; a wrapper can do it"


class SlurmExecutor(Executor):
    """Runs jobs on the nodes of a cluster."""

    name = "slurm"
    is_remote = True

    def __init__(self, host: SubmitHost) -> None:
        self._host = host

    async def make_ready(self) -> None:
        """Lay out the work directory, and try out how jobs can be isolated."""
        await asyncio.to_thread(self._host.make_ready)

    def isolation_offers(self) -> tuple[IsolationOffer, ...]:
        """Return what is made of each kind of isolation."""
        return tuple(
            replace(offer, is_given=False, notes=(_NO_CONTAINERS,))
            if offer.kind is IsolationKind.PODMAN
            else offer
            for offer in self._host.isolator.offers()
        )

    def default_isolation(self) -> IsolationKind:
        """Return what ``auto`` means."""
        return self._host.isolator.default

    def problem_with(self, isolation: Isolation) -> str | None:
        """Say why jobs can't be isolated so; None if they can. May take seconds."""
        if isolation.kind is IsolationKind.PODMAN:
            return _NO_CONTAINERS
        return self._host.isolator.problem_with(isolation)

    async def run(self) -> None:
        """Ask Slurm about all jobs, and look for the notices of the nodes."""
        await self._host.watch.run()

    def resources(self) -> Resources:
        """Return what no job exceeds: Slurm knows what the cluster has."""
        return Resources(MAX_CPUS, MAX_MEMORY_BYTES, MAX_GPUS)

    def problem(self) -> str | None:
        """Say since when Slurm gives no answer."""
        return self._host.watch.problem()

    def execution(self, directory: AttemptDirectory) -> Execution:
        """Return the execution of an attempt in Slurm."""
        return SlurmExecution(directory, self._host)

    async def end_abandoned(self, attempt: Path) -> None:
        """Cancel what was submitted for an attempt of which nothing else is known."""
        plain_files.mark(attempt / "kill")
        name = name_in(attempt)
        if name is None:
            return
        try:
            async with asyncio.timeout(_ABANDONED_SECONDS):
                while await self._is_listed(name):
                    await self._host.commands.cancel_named(name)
                    await asyncio.sleep(_LOOK_SECONDS)
        except SlurmSilent as error:
            raise OSError(errno.EAGAIN, f"Slurm does not answer: {error}") from None
        except TimeoutError:
            raise OSError(errno.ETIMEDOUT, f"Slurm has not ended the job {name}") from None

    async def _is_listed(self, name: str) -> bool:
        jobs = await self._host.commands.jobs()
        return any(job.name == name and job.standing is not Standing.ENDED for job in jobs)

    def close(self) -> None:
        """Do nothing: jobs in Slurm need nobody."""
