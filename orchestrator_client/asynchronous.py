"""The asynchronous client: the same as the synchronous one, on the running event loop."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator_client import downloads, job_output, mapping, operations, results, waiting
from orchestrator_client.address import parse_address
from orchestrator_client.events import POSITION, follow_events
from orchestrator_client.extraction import Extraction
from orchestrator_client.nonblocking import NonblockingTransport
from orchestrator_client.operations import JobFilter
from orchestrator_client.records import BulkAnswer, Event, JobFile, JobInfo
from orchestrator_client.retries import DEFAULT_PATIENCE_SECONDS, OnRetry, Sender
from orchestrator_client.settings import DEFAULT_URL
from orchestrator_client.submissions import Submission, submit
from orchestrator_client.uploads import FileLike, Progress


class AsyncClient:
    """A server, as one user sees it; see :class:`orchestrator_client.Client`. Of one event loop."""

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
        transport = NonblockingTransport(address)
        self._sender = Sender(transport, address.url, token, patience, on_retry)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connections."""
        await self._sender.transport.close()

    # --- jobs

    async def submit(
        self,
        service: str,
        files: Sequence[FileLike],
        *,
        user_id: int | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        priority: int | None = None,
        timeout: int | None = None,  # noqa: ASYNC109 - of the job, at the server
        cpus: int | None = None,
        memory: int | str | None = None,
        gpus: int | None = None,
        parameters: Mapping[str, object] | None = None,
        idempotency_key: str | None = None,
        progress: Progress | None = None,
    ) -> AsyncJob:
        """Upload files, one of them named ``run.sh``, as a new job; see :class:`Submission`."""
        submission = Submission(
            service, files, user_id, name, priority, timeout, tags or {},
            cpus, memory, gpus, parameters or {}, idempotency_key,
        )  # fmt: skip
        return await self.submit_this(submission, progress)

    async def submit_this(
        self, submission: Submission, progress: Progress | None = None
    ) -> AsyncJob:
        """Upload a job that is described already."""
        user_id = self.user_id if submission.user_id is None else submission.user_id
        job_id = await submit(self._sender, submission, user_id, progress)
        return AsyncJob(self._sender, job_id)

    def job(self, job_id: int) -> AsyncJob:
        """Return a handle of a job, without asking whether there is one."""
        return AsyncJob(self._sender, job_id)

    def find(
        self, wanted: JobFilter | None = None, limit: int | None = None
    ) -> AsyncGenerator[JobInfo, None]:
        """Yield the jobs that a filter lets through, newest first, at most ``limit``."""
        return operations.find(self._sender, wanted or JobFilter(), limit)

    async def counts(self, wanted: JobFilter | None = None) -> dict[str, int]:
        """Return how many jobs of a filter are in each state."""
        return await operations.counts(self._sender, wanted or JobFilter())

    async def terminate(self, wanted: JobFilter) -> BulkAnswer:
        """End all jobs of a filter, which must not be empty."""
        return await operations.terminate_many(self._sender, wanted)

    async def rerun(self, wanted: JobFilter) -> BulkAnswer:
        """Submit all jobs of a filter, which must not be empty, once more."""
        return await operations.rerun_many(self._sender, wanted)

    async def delete(self, wanted: JobFilter) -> BulkAnswer:
        """Free the bytes of all jobs of a filter, which must not be empty, that have ended."""
        return await operations.delete_many(self._sender, wanted)

    async def map(
        self, submissions: Iterable[Submission], *, in_flight: int = 100
    ) -> AsyncGenerator[tuple[int, AsyncJob], None]:
        """Submit many jobs, at most ``in_flight`` of them not ended; yield them as they end."""
        ended = mapping.run_all(self._sender, submissions, self.user_id, in_flight)
        async with aclosing(ended):
            async for index, info in ended:
                yield index, AsyncJob(self._sender, info.id, info)

    def wait_all(
        self, job_ids: Iterable[int], *, user_id: int | None = None, timeout: float | None = None
    ) -> AsyncGenerator[JobInfo, None]:
        """Yield jobs as they end, over one connection; ``user_id`` if all are of one user."""
        return waiting.wait_for_all(self._sender, job_ids, user_id, timeout)

    # --- the server

    async def agents(self) -> list[dict[str, Any]]:
        """Return the agents, as the API describes them."""
        return await operations.agents(self._sender)

    async def drain(self, agent: str) -> dict[str, Any]:
        """Give an agent nothing new."""
        return await operations.drain(self._sender, agent)

    async def resume(self, agent: str) -> dict[str, Any]:
        """Give a drained agent jobs again."""
        return await operations.resume(self._sender, agent)

    async def services(self) -> list[dict[str, Any]]:
        """Return the services, as the API describes them."""
        return await operations.services(self._sender)

    async def health(self) -> dict[str, Any]:
        """Return the server's health."""
        return await operations.health(self._sender)

    async def events(
        self, *, user_id: int | None = None, service: str | None = None, after: str | None = None
    ) -> AsyncGenerator[Event, None]:
        """Yield what happens from now on, or after a position, without an end and without gaps."""
        query = JobFilter(user_id=user_id, service=service).query()
        async with aclosing(follow_events(self._sender, query, after)) as events:
            async for event in events:
                if event.kind != POSITION:
                    yield event


class AsyncJob:
    """A handle of one job; see :class:`orchestrator_client.Job`."""

    def __init__(self, sender: Sender, job_id: int, info: JobInfo | None = None) -> None:
        self.id = job_id
        self.info = info
        self._sender = sender

    def __repr__(self) -> str:
        return f"AsyncJob({self.id})"

    async def show(self) -> JobInfo:
        """Ask for all about it."""
        self.info = await operations.show(self._sender, self.id)
        return self.info

    async def history(self) -> list[dict[str, Any]]:
        """Return the changes of its state, oldest first."""
        return await operations.history(self._sender, self.id)

    async def wait(self, timeout: float | None = None) -> JobInfo:  # noqa: ASYNC109 - as of Client
        """Wait until it has ended, however; raises :class:`WaitTimeout`."""
        self.info = await waiting.wait_for_end(self._sender, self.id, timeout)
        return self.info

    async def check(self, timeout: float | None = None) -> JobInfo:  # noqa: ASYNC109 - as of Client
        """Wait for it, and raise :class:`JobFailed` if it did not end as ``Completed``."""
        return waiting.check_success(await self.wait(timeout))

    def logs(self, stream: str = "stdout", *, follow: bool = False) -> AsyncGenerator[str, None]:
        """Yield the lines that it printed; with ``follow`` until it has ended."""
        return job_output.lines_of(self.output(stream, follow=follow))

    def output(
        self, stream: str = "stdout", *, follow: bool = False
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes that it printed, as they come; with ``follow`` until it has ended."""
        read = job_output.follow_output if follow else job_output.read_output
        return read(self._sender, self.id, stream)

    async def output_end(self, stream: str = "stdout", size: int = 65536) -> bytes:
        """Return the last bytes that it printed so far, ``size`` of them at most."""
        return await job_output.read_end(self._sender, self.id, stream, size)

    async def terminate(self) -> None:
        """End it. Raises :class:`Conflict` if it has ended already."""
        await operations.terminate(self._sender, self.id)

    async def rerun(self, *, idempotency_key: str | None = None) -> AsyncJob:
        """Submit it once more, as a new job."""
        job_id = await operations.rerun(self._sender, self.id, idempotency_key)
        return AsyncJob(self._sender, job_id)

    async def delete(self) -> None:
        """Free its bytes. Raises :class:`Conflict` if it has not ended."""
        await operations.delete(self._sender, self.id)

    # --- files

    async def files(self) -> list[JobFile]:
        """List its files: the result, or the input before there is one."""
        return [file async for file in operations.list_files(self._sender, self.id)]

    async def read(self, path: str) -> bytes:
        """Return one of its files."""
        where = operations.file_path(self.id, path)
        return b"".join([piece async for piece in downloads.read_pieces(self._sender, where)])

    def stream(self, path: str) -> AsyncGenerator[bytes, None]:
        """Yield one of its files in pieces, as they come."""
        return downloads.read_pieces(self._sender, operations.file_path(self.id, path))

    async def save(
        self, path: str, target: str | os.PathLike[str], progress: Progress | None = None
    ) -> None:
        """Save one of its files as ``target``, in one step."""
        where = operations.file_path(self.id, path)
        await downloads.download(self._sender, where, Path(target), progress)

    async def download(
        self,
        target: str | os.PathLike[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - as of Client
        progress: Progress | None = None,
    ) -> None:
        """Wait for it, and save its result as a ZIP. Raises :class:`JobFailed`."""
        waiting.check_result(await self.wait(timeout))
        where = f"/download/{self.id}"
        await downloads.download(self._sender, where, Path(target), progress)

    async def download_partial(
        self, target: str | os.PathLike[str], progress: Progress | None = None
    ) -> None:
        """Save a ZIP of its files as they are now, whatever its state."""
        where = f"/download_partial/{self.id}"
        await downloads.download(self._sender, where, Path(target), progress)

    async def result(
        self,
        directory: str | os.PathLike[str],
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - as of Client
        progress: Progress | None = None,
        unpack_progress: Progress | None = None,
    ) -> Extraction:
        """Wait for it, and unpack its result into a directory. Raises :class:`JobFailed`."""
        waiting.check_result(await self.wait(timeout))
        where = f"/download/{self.id}"
        return await results.unpack(self._sender, where, directory, progress, unpack_progress)

    async def partial_result(
        self,
        directory: str | os.PathLike[str],
        *,
        progress: Progress | None = None,
        unpack_progress: Progress | None = None,
    ) -> Extraction:
        """Unpack its files as they are now, whatever its state: also what a failed job left."""
        where = f"/download_partial/{self.id}"
        return await results.unpack(self._sender, where, directory, progress, unpack_progress)
