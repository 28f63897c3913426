"""The synchronous client of a server."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from orchestrator_client import operations
from orchestrator_client.address import parse_address
from orchestrator_client.blocking import BlockingTransport
from orchestrator_client.events import POSITION, follow_events
from orchestrator_client.lockstep import iterate, run
from orchestrator_client.operations import JobFilter
from orchestrator_client.records import BulkAnswer, Event, JobInfo
from orchestrator_client.retries import DEFAULT_PATIENCE_SECONDS, OnRetry, Sender
from orchestrator_client.settings import DEFAULT_URL

if TYPE_CHECKING:
    from orchestrator_client.jobs import Job
    from orchestrator_client.submissions import Submission
    from orchestrator_client.uploads import FileLike, Progress


class Client:
    """A server, as one user sees it. Safe from several threads; close it, or use it in ``with``.

    ``user_id`` is whose jobs are submitted; the Unix user id by default. ``patience`` is how many
    seconds a request is tried again for while the server can't be reached or is full;
    ``on_retry`` hears of each pause. All methods raise
    :class:`orchestrator_client.errors.OrchestratorError`.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        user_id: int | None = None,
        *,
        patience: float = DEFAULT_PATIENCE_SECONDS,
        on_retry: OnRetry | None = None,
    ) -> None:
        address = parse_address(url)
        self.url = address.url
        self.user_id = os.getuid() if user_id is None else user_id
        self._sender = Sender(BlockingTransport(address), address.url, token, patience, on_retry)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        run(self._sender.transport.close())

    # --- jobs

    def submit(
        self,
        service: str,
        files: Sequence[FileLike],
        *,
        user_id: int | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        timeout: int | None = None,
        cpus: int | None = None,
        memory: int | str | None = None,
        gpus: int | None = None,
        parameters: Mapping[str, object] | None = None,
        idempotency_key: str | None = None,
        progress: Progress | None = None,
    ) -> Job:
        """Upload files, one of them named ``run.sh``, as a new job; see :class:`Submission`."""
        from orchestrator_client.submissions import Submission

        submission = Submission(
            service, files, user_id, name, priority, timeout, tags or {},
            cpus, memory, gpus, parameters or {}, idempotency_key,
        )  # fmt: skip
        return self.submit_this(submission, progress)

    def submit_this(self, submission: Submission, progress: Progress | None = None) -> Job:
        """Upload a job that is described already."""
        from orchestrator_client import submissions

        user_id = self.user_id if submission.user_id is None else submission.user_id
        return self.job(run(submissions.submit(self._sender, submission, user_id, progress)))

    def job(self, job_id: int) -> Job:
        """Return a handle of a job, without asking whether there is one."""
        from orchestrator_client.jobs import Job

        return Job(self._sender, job_id)

    def find(self, wanted: JobFilter | None = None, limit: int | None = None) -> Iterator[JobInfo]:
        """Yield the jobs that a filter lets through, newest first, at most ``limit``."""
        return iterate(operations.find(self._sender, wanted or JobFilter(), limit))

    def counts(self, wanted: JobFilter | None = None) -> dict[str, int]:
        """Return how many jobs of a filter are in each state."""
        return run(operations.counts(self._sender, wanted or JobFilter()))

    def terminate(self, wanted: JobFilter) -> BulkAnswer:
        """End all jobs of a filter, which must not be empty."""
        return run(operations.terminate_many(self._sender, wanted))

    def rerun(self, wanted: JobFilter) -> BulkAnswer:
        """Submit all jobs of a filter, which must not be empty, once more."""
        return run(operations.rerun_many(self._sender, wanted))

    def delete(self, wanted: JobFilter) -> BulkAnswer:
        """Free the bytes of all jobs of a filter, which must not be empty, that have ended."""
        return run(operations.delete_many(self._sender, wanted))

    def map(
        self, submissions: Iterable[Submission], *, in_flight: int = 100
    ) -> Generator[tuple[int, Job], None, None]:
        """Submit many jobs, at most ``in_flight`` of them not ended; yield them as they end.

        Gives (index, job): which of the submissions, and the job, whose ``info`` says how it ended.
        """
        from orchestrator_client import jobs, mapping

        ended = mapping.run_all(self._sender, submissions, self.user_id, in_flight)
        for index, info in iterate(ended):
            yield index, jobs.Job(self._sender, info.id, info)

    def wait_all(
        self, job_ids: Iterable[int], *, user_id: int | None = None, timeout: float | None = None
    ) -> Iterator[JobInfo]:
        """Yield jobs as they end, over one connection; ``user_id`` if all are of one user.

        Ids without a job are left out. Raises :class:`WaitTimeout`.
        """
        from orchestrator_client import waiting

        return iterate(waiting.wait_for_all(self._sender, job_ids, user_id, timeout))

    # --- the server

    def agents(self) -> list[dict[str, Any]]:
        """Return the agents, as the API describes them."""
        return run(operations.agents(self._sender))

    def drain(self, agent: str) -> dict[str, Any]:
        """Give an agent nothing new."""
        return run(operations.drain(self._sender, agent))

    def resume(self, agent: str) -> dict[str, Any]:
        """Give a drained agent jobs again."""
        return run(operations.resume(self._sender, agent))

    def services(self) -> list[dict[str, Any]]:
        """Return the services, as the API describes them."""
        return run(operations.services(self._sender))

    def health(self) -> dict[str, Any]:
        """Return the server's health."""
        return run(operations.health(self._sender))

    def beats(self, *, user_id: int | None = None, service: str | None = None) -> Iterator[None]:
        """Yield when something happened, and every 15 seconds at least, without an end."""
        query = JobFilter(user_id=user_id, service=service).query()
        for _ in iterate(follow_events(self._sender, query, None)):
            yield None

    def events(
        self, *, user_id: int | None = None, service: str | None = None, after: str | None = None
    ) -> Iterator[Event]:
        """Yield what happens from now on, or after a position, without an end and without gaps."""
        query = JobFilter(user_id=user_id, service=service).query()
        for event in iterate(follow_events(self._sender, query, after)):
            if event.kind != POSITION:
                yield event
