"""Durable state: what the rest of the server knows of the database.

One connection writes, with group commit (``database.py``). Readers have connections of
their own and never wait for the writer (WAL). What a commit brought about is published
on the store's feed once it is on the disk. The statements stand in the ``store_`` modules,
by what they are about, and here where one method needs them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import logging
import os
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar, cast

from events import AgentChange, AgentChangeKind, Feed, Transition
from jobs import ACTIVE_STATES, FileSpec, JobState
from records import (
    NO_OUTPUT,
    ActiveJob,
    Assignment,
    JobDetails,
    JobFilter,
    JobPage,
    JobRequest,
    JobStatus,
    JobTimes,
    KnownAgent,
    Line,
    Loss,
    NewOutput,
    OutputPiece,
    QueuedJob,
    ResultMismatch,
    StoredFile,
    StoredResult,
    Submission,
    Writing,
)
from storage.blobs import (
    CHUNK_INDEX_BITS,
    ERASE_CHUNKS,
    LITTLE_BYTES,
    doom_blobs,
    doom_what_a_crash_cut_short,
    drop_partial_result,
    files_of,
    first_free_blob_id,
    goes_with_short,
    has_result,
    insert_chunks,
    open_blob,
    read_stream,
    seal_result,
)
from storage.database import (
    HOW_TO_MAKE_WRITABLE,
    Connection,
    Database,
    StoreError,
    StoreFull,
    StoreRefused,
    StoreUnavailable,
    Writer,
    check_sqlite_version,
    checkpoint,
    connect,
    in_one_snapshot,
    lock_file,
    prepare_connection,
    prepare_reader,
    prepare_writer,
    translated,
    vacuum_some,
)
from storage.maintenance import tokens_by_digest
from storage.output import add_output, doom_output, drop_live_output, erase_some_output
from storage.queries import (
    HISTORY,
    LARGEST_ID,
    QUEUE_POSITION,
    active_job_of,
    find_jobs,
    job_details,
    transition_of,
)
from storage.results import LatestResults, ResultStored
from storage.schema import migrate
from storage.statuses import LatestStatuses
from storage.tokens import Token
from storage.transitions import (
    active_job_of_attempt,
    first_of_line,
    job_of,
    job_of_attempt,
    job_with_id,
    receiving_job_of_attempt,
    transition,
    write_agent_change,
)
from storage.uploads import (
    KEY_SECONDS,
    Upload,
    check_queue,
    insert_job,
    key_of,
    note_key,
    request_of,
    share_input,
    submission_before,
)
from telemetry import metrics
from wire.frames import CHUNK_BYTES, LIVE_STREAMS, Stream
from wire.messages import Finished

log = logging.getLogger("orchestrator.store")

T = TypeVar("T")

_READERS = 3
_OUTPUT_ROWS = 8
_CLEAN_JOBS = 100
_FORGET_KEYS = 1000
POSITION_LIMIT = 10_000
"""How far :meth:`Store.queue_position` counts: about a millisecond."""


_RETRY_SECONDS = 1.0
_RESERVE_BYTES = 64 * 1024 * 1024
_RESERVE_SHARE = 0.1


def _ensure_setting(db: Database, name: str, value: str) -> None:
    db.execute(
        "INSERT INTO setting (name, value) VALUES (?, ?) ON CONFLICT DO NOTHING", (name, value)
    )


def _doom_files_of(db: Database, job_id: int) -> None:
    # a rerun shares the input of its job
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id IN (SELECT blob_id FROM input_file WHERE job_id = ?1) AND NOT EXISTS"
        " (SELECT 1 FROM input_file WHERE blob_id = blob.id AND job_id <> ?1)",
        (job_id,),
    )
    db.execute("UPDATE input_file SET blob_id = NULL WHERE job_id = ?", (job_id,))
    db.execute(
        "UPDATE blob SET state = 'doomed'"
        " WHERE id IN (SELECT result_blob FROM attempt WHERE job_id = ?)",
        (job_id,),
    )
    db.execute("UPDATE attempt SET result_blob = NULL WHERE job_id = ?", (job_id,))
    doom_output(db, job_id)


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _advice(error: StoreError) -> str:
    """Say what to do about a file that can't be opened."""
    match getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                "; put the last backup in its place (README, Backup), or see what is damaged"
                " with 'orchestrator.py check FILE'"
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "; " + HOW_TO_MAKE_WRITABLE
        case sqlite3.SQLITE_FULL:
            return "; free some space there"
    return ""


class Store:
    """The durable state of one server. Make it with :meth:`open`; run :meth:`run` beside it.

    Every method that changes something returns once the change is committed and synced,
    and raises :class:`StoreFull` or :class:`StoreUnavailable` when it could not be. ``feed``
    tells of every transition once it is committed.
    """

    def __init__(self, path: str, lock: int) -> None:
        self.feed = Feed()
        self.uploaded_bytes = metrics.Counter(
            "orchestrator_uploaded_bytes_total", "Bytes of the files of jobs that were taken in."
        )
        self._result_bytes = metrics.Counter(
            "orchestrator_result_bytes_total", "Bytes of results that agents delivered."
        )
        self._statuses = LatestStatuses()
        self._results = LatestResults()
        self._path = path
        self._lock = lock
        self._connections: list[Connection] = []
        self._idle_readers: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
        self._writer: Writer
        self._blob_ids: Iterator[int]
        self._pinned: Counter[int] = Counter()
        self._orphans: set[int] = set()
        self._erase_wake = asyncio.Event()
        self._may_shrink = True  # a crash may have come between erasing and vacuum

    @classmethod
    async def open(cls, path: str) -> Store:
        """Lock, migrate and tidy the file. Raises :class:`StoreRefused` if it can't be used."""
        check_sqlite_version()
        store = cls(path, lock_file(path))
        try:
            with translated():
                await store._set_up()
        except (StoreRefused, StoreUnavailable, StoreFull) as error:
            await store.close()
            raise StoreRefused(f"{path}: {error}{_advice(error)}") from error
        except BaseException:
            await store.close()
            raise
        return store

    async def _set_up(self) -> None:
        connection = await connect(self._path)
        self._connections.append(connection)
        await connection.call(prepare_connection)
        await connection.call(migrate)
        await connection.call(prepare_writer)
        await connection.call(doom_what_a_crash_cut_short)
        token = secrets.token_urlsafe(32)
        await connection.call(lambda db: _ensure_setting(db, "agent_token", token))
        await connection.call(lambda db: _ensure_setting(db, "probe", ""))
        self._blob_ids = itertools.count(await connection.call(first_free_blob_id))
        self._writer = Writer(connection, self._before_commit, self._publish)
        for _ in range(_READERS):
            reader = await connect(self._path)
            self._connections.append(reader)
            await reader.call(prepare_reader)
            self._idle_readers.put_nowait(reader)
        self._erase_wake.set()

    async def run(self) -> None:
        """The store's background work: group commit and erasing. Ends by cancellation only."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._writer.run(), name="store writer")
            tasks.create_task(self._erase_for_ever(), name="store eraser")

    def _before_commit(self, events: Sequence[Any]) -> None:
        """For the writer, in its thread: readers may see from now on what this tells."""
        self._statuses.doubt(events)

    def _publish(self, events: Sequence[Any]) -> None:
        """For the writer: this is committed."""
        self._statuses.settle(events)
        self._results.settle(events)
        self.feed.publish([event for event in events if not isinstance(event, ResultStored)])

    async def close(self) -> None:
        """Close all connections, then the lock; the store can't be used after."""
        while self._connections:
            await self._connections.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def write_bytes(self, operation: Callable[[Database], T], size: int) -> T:
        """Write ``size`` bytes of files or results, unless that would use up the reserve.

        The reserve is what transitions, erasing and retention need when nothing else may be
        written any more: deleting takes space too, in the WAL.
        """
        self._check_room(size)
        return await self._writer.write(operation, 0 if goes_with_short(size) else size)

    def _check_room(self, size: int) -> None:
        volume = os.statvfs(self._path)
        reserve = min(_RESERVE_BYTES, _RESERVE_SHARE * volume.f_blocks * volume.f_frsize)
        # bytes stand in the WAL and, after the checkpoint, in the file; what is in the WAL now
        # will make the file grow, too
        needed = reserve + 2 * size + self._wal_size()
        if volume.f_bavail * volume.f_frsize < needed:
            # what takes the room may be a WAL that is carried over but not emptied, and if
            # nothing is written any more, nothing else will empty it
            self._may_shrink = True
            self._erase_wake.set()
            raise StoreFull("the disk that holds the database is full")

    def _wal_size(self) -> int:
        return _size_of(f"{self._path}-wal")

    def next_blob_id(self) -> int:
        """For :class:`Upload`: an id that no blob has."""
        return next(self._blob_ids)

    def erase_later(self, blob_ids: set[int]) -> None:
        """For :class:`Upload`: blobs that no job will ever refer to."""
        if blob_ids:
            self._orphans |= blob_ids
            self._erase_wake.set()

    async def _read(
        self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ()
    ) -> list[Any]:
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: db.execute(sql, parameters).fetchall())

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[Connection]:
        reader = await self._idle_readers.get()
        try:
            yield reader
        finally:
            self._idle_readers.put_nowait(reader)

    # --- settings and health

    async def agent_token(self) -> str:
        """Return the token that the database was given when it was made."""
        rows = await self._read("SELECT value FROM setting WHERE name = 'agent_token'")
        return str(rows[0][0])

    async def tokens(self) -> Mapping[str, Token]:
        """Return all API tokens, by the digests of their secrets."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(tokens_by_digest)

    async def probe(self) -> None:
        """Write something durably, to know whether that works and whether jobs can be taken."""
        self._check_room(0)
        stamp = str(time.time())
        await self._writer.write(
            lambda db: db.execute("UPDATE setting SET value = ? WHERE name = 'probe'", (stamp,))
        )

    def families(self) -> tuple[metrics.Family, ...]:
        """Return what there is to tell of the file, of commits and of bytes that came in."""
        return (
            metrics.gauge("orchestrator_database_bytes", "Size of the file.", _size_of(self._path)),
            metrics.gauge(
                "orchestrator_wal_bytes", "Size of the write-ahead log.", self._wal_size()
            ),
            self._writer.batch_sizes.family(),
            self._writer.commit_seconds.family(),
            self.uploaded_bytes.family(),
            self._result_bytes.family(),
        )

    # --- jobs

    def new_upload(self) -> Upload:
        """Begin to take in the files of a new job."""
        return Upload(self)

    async def job_status(self, job_id: int) -> JobStatus | None:
        """Return a job's state and message, None if there is no such job."""
        return await self._statuses.get(job_id, self._read_status)

    async def _read_status(self, job_id: int) -> JobStatus | None:
        rows = await self._read("SELECT id, state, message FROM job WHERE id = ?", (job_id,))
        return JobStatus(rows[0][0], JobState(rows[0][1]), rows[0][2]) if rows else None

    async def owner_of(self, job_id: int) -> int | None:
        """Return the user of a job, None if there is no such job."""
        rows = await self._read("SELECT user_id FROM job WHERE id = ?", (job_id,))
        return int(rows[0][0]) if rows else None

    async def history(self, job_id: int) -> list[Transition]:
        """Return all transitions of a job, oldest first."""
        return [transition_of(row) for row in await self._read(HISTORY, (job_id,))]

    async def transitions_after(self, last_id: int, limit: int) -> list[Transition]:
        """Return the transitions of all jobs that follow one, oldest first."""
        rows = await self._read(
            "SELECT history.id, job_id, user_id, service, attempt, at, from_state, to_state, reason"
            " FROM history JOIN job ON job.id = history.job_id"
            " WHERE history.id > ? ORDER BY history.id LIMIT ?",
            (last_id, limit),
        )
        return [transition_of(row) for row in rows]

    async def last_event_ids(self) -> tuple[int, int]:
        """Return the ids of the last transition and the last agent change, 0 for none."""
        rows = await self._read(
            "SELECT (SELECT coalesce(max(id), 0) FROM history),"
            " (SELECT coalesce(max(id), 0) FROM agent_history)"
        )
        return (rows[0][0], rows[0][1])

    async def find_jobs(self, wanted: JobFilter, before: int | None, limit: int) -> JobPage:
        """Return the newest jobs of those asked for whose id is below ``before`` (None: any).

        Looks at a bounded number of jobs, so a page may hold few or none and yet have a next.
        """
        top = LARGEST_ID if before is None else before
        async with self._reader() as reader:
            with translated():
                return await reader.call(
                    in_one_snapshot(lambda db: find_jobs(db, wanted, top, limit))
                )

    async def job_details(self, job_id: int) -> JobDetails | None:
        """Return all that is known of a job but its history, None if there is no such job."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(in_one_snapshot(lambda db: job_details(db, job_id)))

    async def job_request(self, job_id: int) -> JobRequest | None:
        """Return what the submitter of a job asked for, None if there is no such job."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: request_of(db, job_id))

    async def rerun(
        self, source_id: int, request: JobRequest, message: str, queue_limit: int
    ) -> Submission:
        """Make a job from ``request`` and the stored input of another, which both then share.

        Raises :class:`InputGone` if that is not there any more, and as :meth:`Upload.commit`.
        """
        key = key_of(request, (), source_id)

        def operation(db: Database) -> Submission:
            if repeated := submission_before(db, key):
                return repeated
            check_queue(db, request.user_id, queue_limit)
            job = insert_job(db, request, message, f"rerun of job {source_id}")
            share_input(db, source_id, job.id)
            note_key(db, key, job.id)
            return Submission(job)

        return await self.write_bytes(operation, 0)

    async def queued_lines(self) -> dict[Line, int]:
        """Return how many jobs wait in each line. Takes about 0.1 s for a million jobs."""
        rows = await self._read(
            "SELECT service, user_id, count(*) FROM job WHERE state = 'Queued'"
            " GROUP BY service, user_id"
        )
        return {Line(service, user_id): waiting for service, user_id, waiting in rows}

    async def queue_position(self, job_id: int) -> int | None:
        """Return a job's place in its line, the first being 1; None if it does not wait.

        Counts up to ``POSITION_LIMIT``, which also stands for every place further back.
        """
        rows = await self._read(QUEUE_POSITION, {"job": job_id, "limit": POSITION_LIMIT})
        return int(rows[0][0]) if rows else None

    async def active_jobs(self) -> list[ActiveJob]:
        """Return all jobs that an agent holds."""
        rows = await self._read(
            """SELECT job.id, job.user_id, job.service, attempt.id, attempt.number,
                      agent.id, agent.name, job.state
               FROM job JOIN attempt ON attempt.id = job.attempt_id
                        JOIN agent ON agent.id = attempt.agent_id
               WHERE job.state IN ('Processing', 'Submitted', 'Running') ORDER BY job.id"""
        )
        return [active_job_of(row) for row in rows]

    async def times_of_last_jobs(self, limit: int) -> list[JobTimes]:
        """Return the times of the jobs that ended last, oldest first."""
        rows = await self._read(
            """SELECT service, created_at, started_at, finished_at FROM job
               WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')
               ORDER BY changed_at DESC LIMIT ?""",
            (limit,),
        )
        return [JobTimes(*row) for row in reversed(rows)]

    # --- agents

    async def note_agent(self, agent_id: str, name: str) -> None:
        """Remember an agent's name and that it connected."""
        now = time.time()

        def operation(db: Database) -> None:
            db.execute(
                "INSERT INTO agent (id, name, seen_at) VALUES (?, ?, ?) ON CONFLICT (id)"
                " DO UPDATE SET name = excluded.name, seen_at = excluded.seen_at",
                (agent_id, name, now),
            )
            write_agent_change(db, agent_id, name, AgentChangeKind.CONNECTED)

        await self._writer.write(operation)

    async def note_agent_change(self, agent_id: str, name: str, kind: AgentChangeKind) -> None:
        """Write down what happened to an agent, if it has ever connected."""

        def operation(db: Database) -> None:
            if db.execute("SELECT 1 FROM agent WHERE id = ?", (agent_id,)).fetchone():
                write_agent_change(db, agent_id, name, kind)

        await self._writer.write(operation)

    async def agent_changes_after(self, last_id: int, limit: int) -> list[AgentChange]:
        """Return the agent changes that follow one, oldest first."""
        rows = await self._read(
            "SELECT id, agent_id, name, at, kind FROM agent_history WHERE id > ?"
            " ORDER BY id LIMIT ?",
            (last_id, limit),
        )
        return [AgentChange(*(*row[:4], AgentChangeKind(row[4]))) for row in rows]

    async def drained_agents(self) -> list[KnownAgent]:
        """Return the agents that get no jobs because an operator said so."""
        rows = await self._read("SELECT id, name FROM agent WHERE is_drained")
        return [KnownAgent(*row) for row in rows]

    async def set_drained(self, name: str, is_drained: bool) -> list[KnownAgent]:
        """Let the agents of this name or id get no jobs, or get them again.

        Returns all of them, the one that connected last first.
        """
        kind = AgentChangeKind.DRAINING if is_drained else AgentChangeKind.RESUMED

        def operation(db: Database) -> list[KnownAgent]:
            rows = db.execute(
                "SELECT id, name, is_drained FROM agent WHERE id = ?1 OR name = ?1"
                " ORDER BY seen_at DESC",
                (name,),
            ).fetchall()
            for agent_id, agent_name, was_drained in rows:
                if bool(was_drained) is not is_drained:
                    db.execute(
                        "UPDATE agent SET is_drained = ? WHERE id = ?", (is_drained, agent_id)
                    )
                    write_agent_change(db, agent_id, agent_name, kind)
            return [KnownAgent(row[0], row[1]) for row in rows]

        return await self._writer.write(operation)

    # --- attempts

    async def begin_next(self, line: Line, agent_id: str, reason: str) -> Assignment | None:
        """Give the first job of a line to an agent; returns None if no job waits there."""

        def operation(db: Database) -> Assignment | None:
            before = first_of_line(db, line)
            if before is None:
                return None
            job = dataclasses.replace(before, attempts=before.attempts + 1)
            attempt_id = cast(
                int,
                db.execute(
                    "INSERT INTO attempt (job_id, number, agent_id) VALUES (?, ?, ?)",
                    (job.id, job.attempts, agent_id),
                ).lastrowid,
            )
            db.execute(
                "UPDATE job SET attempts = ?, attempt_id = ? WHERE id = ?",
                (job.attempts, attempt_id, job.id),
            )
            transition(db, job, JobState.PROCESSING, reason, message="")
            row = db.execute("SELECT timeout FROM job WHERE id = ?", (job.id,)).fetchone()
            files = files_of(db, attempt_id)
            is_little = sum(file.spec.size for file in files) <= LITTLE_BYTES
            return Assignment(
                QueuedJob(job.id, job.user_id, job.service),
                attempt_id,
                job.attempts,
                row[0],
                files,
                read_stream(db, files, 0) if is_little else None,
            )

        return await self._writer.write(operation)

    async def input_files(self, attempt_id: int) -> tuple[StoredFile, ...]:
        """Return the input of an attempt's job, in upload order."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: files_of(db, attempt_id))

    async def advance(self, attempt_id: int, target: JobState, reason: str) -> None:
        """Move a job on to an active state; does nothing if it is there or further already.

        Raises :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> None:
            job = active_job_of_attempt(db, attempt_id)
            if ACTIVE_STATES.index(job.state) < ACTIVE_STATES.index(target):
                transition(db, job, target, reason)

        await self._writer.write(operation)

    async def result_size(self, attempt_id: int) -> int:
        """Return how many bytes of an attempt's result are safe."""
        rows = await self._read(
            "SELECT blob.size FROM attempt JOIN blob ON blob.id = attempt.result_blob"
            " WHERE attempt.id = ?",
            (attempt_id,),
        )
        return int(rows[0][0]) if rows else 0

    async def append_result(self, attempt_id: int, offset: int, chunks: Sequence[bytes]) -> None:
        """Add chunks to an attempt's result at ``offset``, which must be its present size.

        All chunks but the last of the whole result have the standard length. Raises
        :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> None:
            receiving_job_of_attempt(db, attempt_id)
            self._append(db, attempt_id, offset, chunks)

        size = sum(map(len, chunks))
        await self.write_bytes(operation, size)
        self._result_bytes.add(size)

    async def discard_result(self, attempt_id: int) -> None:
        """Forget what has arrived of an attempt's result, for a transfer that starts anew."""

        def operation(db: Database) -> None:
            receiving_job_of_attempt(db, attempt_id)
            drop_partial_result(db, attempt_id)

        await self._writer.write(operation)
        self._erase_wake.set()

    async def finish(
        self,
        report: Finished,
        offset: int,
        tail: Sequence[bytes],
        output: NewOutput = NO_OUTPUT,
    ) -> None:
        """End a job with its result, whole, and the last of its output in one transaction.

        ``tail`` are the last chunks, from ``offset`` on. A job that was killed while its agent
        was away stays so, and gets the result as what it left. A repeated call for a job that
        this very attempt has ended does nothing. Raises :class:`Superseded` if the attempt no
        longer counts, :class:`ResultMismatch` if the lengths don't add up.
        """
        size = sum(map(len, tail))

        def operation(db: Database) -> None:
            job = job_of_attempt(db, report.attempt_id)
            is_killed = job.state is JobState.KILLED and not has_result(db, report.attempt_id)
            if job.state not in ACTIVE_STATES and not is_killed:
                return
            add_output(db, job, report.attempt_id, output)
            drop_live_output(db, report.attempt_id)
            blob_id = self._append(db, report.attempt_id, offset, tail)
            seal_result(db, report)
            if offset == 0 and size <= LITTLE_BYTES:
                result = StoredResult(blob_id, size, report.result_sha256, b"".join(tail))
                db.announce(ResultStored(job.id, result))
            db.execute(
                "UPDATE attempt SET exit_code = ? WHERE id = ?",
                (report.exit_code, report.attempt_id),
            )
            if not is_killed:
                reason = report.message or "finished"
                transition(db, job, report.state, reason, report.message)

        await self.write_bytes(operation, size + output.size)
        self._result_bytes.add(size)

    async def append_output(self, attempt_id: int, output: NewOutput) -> None:
        """Add to what is kept of an attempt's output, and tell its followers.

        What is there already is passed over. Raises :class:`Superseded` if the attempt no
        longer counts.
        """

        def operation(db: Database) -> None:
            job = receiving_job_of_attempt(db, attempt_id)
            add_output(db, job, attempt_id, output)

        await self.write_bytes(operation, output.size)

    async def output_end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is stored."""
        rows = await self._read(
            "SELECT start + length(data) FROM output WHERE attempt_id = ? AND stream = ?"
            " ORDER BY start DESC LIMIT 1",
            (attempt_id, stream),
        )
        return int(rows[0][0]) if rows else 0

    async def latest_output_end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is there, the latest of it included."""
        stored = await self.output_end(attempt_id, stream)
        return max(stored, await self.output_end(attempt_id, LIVE_STREAMS[stream]))

    async def read_output(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        """Return the next pieces that are kept of a stream, from ``start`` on; none at its end."""
        # what is stored for good first: at the end of a job it takes the place of the other
        return await self._read_pieces(attempt_id, stream, start) or await self._read_pieces(
            attempt_id, LIVE_STREAMS[stream], start
        )

    async def _read_pieces(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        rows = await self._read(
            "SELECT start, data FROM output WHERE attempt_id = ?1 AND stream = ?2"
            " AND start >= coalesce((SELECT max(start) FROM output"
            "  WHERE attempt_id = ?1 AND stream = ?2 AND start <= ?3), 0)"
            " ORDER BY start LIMIT ?4",
            (attempt_id, stream, start, _OUTPUT_ROWS),
        )
        pieces = (OutputPiece(stream, row[0], row[1]) for row in rows)
        cut = (piece.after(start) for piece in pieces)
        return [piece for piece in cut if piece.data]

    async def writing(self, job_id: int) -> Writing | None:
        """Return a job as the source of output, None if there is no such job."""
        rows = await self._read(
            "SELECT state, attempt_id, attempts FROM job WHERE id = ?", (job_id,)
        )
        return Writing(JobState(rows[0][0]), *rows[0][1:]) if rows else None

    async def requeue(
        self, attempt_id: int, loss: Loss, reason: str, max_attempts: int
    ) -> JobState:
        """Take a job from an agent that lost it; returns Queued, or Failed if it was the last try.

        An attempt that was lost on its way to the agent is not held against the job. Raises
        :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> JobState:
            job = active_job_of_attempt(db, attempt_id)
            is_undelivered = loss is Loss.AGENT_AWAY and job.state is JobState.PROCESSING
            lost_starts = job.lost_starts + (not is_undelivered)
            drop_partial_result(db, attempt_id)
            if lost_starts >= max_attempts:
                message = f"{reason}; given up after {lost_starts} attempts"
                transition(db, job, JobState.FAILED, message, message)
                return JobState.FAILED
            db.execute(
                "UPDATE job SET attempt_id = NULL, lost_starts = ? WHERE id = ?",
                (lost_starts, job.id),
            )
            doom_output(db, job.id)
            transition(db, job, JobState.QUEUED, reason, f"{reason}; queued again")
            return JobState.QUEUED

        state = await self._writer.write(operation)
        self._erase_wake.set()
        return state

    async def kill(self, job_id: int, message: str) -> None:
        """End a job that has not ended. Raises :class:`IllegalTransition` if it has.

        Its attempt, if it has one, may still deliver what the job left.
        """

        def operation(db: Database) -> None:
            transition(db, job_with_id(db, job_id), JobState.KILLED, message, message)

        await self._writer.write(operation)

    async def killed_without_result(self, attempt_id: int) -> ActiveJob | None:
        """Return the job if it was killed in this attempt, which has not delivered it yet."""
        rows = await self._read(
            """SELECT job.id, job.user_id, job.service, attempt.id,
                      attempt.number, agent.id, agent.name, job.state
               FROM attempt JOIN job ON job.id = attempt.job_id AND job.attempt_id = attempt.id
                        JOIN agent ON agent.id = attempt.agent_id
                        LEFT JOIN blob ON blob.id = attempt.result_blob
               WHERE attempt.id = ? AND job.state = 'Killed' AND blob.state IS NOT 'sealed'""",
            (attempt_id,),
        )
        return active_job_of(rows[0]) if rows else None

    async def withdraw(self, job_id: int, message: str) -> bool:
        """Kill a job if it waits in line; returns whether it did."""

        def operation(db: Database) -> bool:
            job = job_with_id(db, job_id)
            if job.state is not JobState.QUEUED:
                return False
            transition(db, job, JobState.KILLED, message, message)
            return True

        return await self._writer.write(operation)

    async def reject(self, attempt_id: int, reason: str) -> None:
        """End a job that an agent found can never run. Raises :class:`Superseded`."""

        def operation(db: Database) -> None:
            job = active_job_of_attempt(db, attempt_id)
            transition(db, job, JobState.INVALID, reason, reason)

        await self._writer.write(operation)

    def _append(self, db: Database, attempt_id: int, offset: int, chunks: Sequence[bytes]) -> int:
        """Add chunks to an attempt's result; returns the id of its blob."""
        row = db.execute(
            "SELECT blob.id, blob.size FROM attempt JOIN blob ON blob.id = attempt.result_blob"
            " WHERE attempt.id = ?",
            (attempt_id,),
        ).fetchone()
        if row is None:
            row = (self.next_blob_id(), 0)
            open_blob(db, row[0])
            db.execute("UPDATE attempt SET result_blob = ? WHERE id = ?", (row[0], attempt_id))
        blob_id, size = row
        if offset != size:
            raise ResultMismatch(f"attempt {attempt_id}: bytes at {offset}, {size} stored")
        insert_chunks(db, blob_id, offset // CHUNK_BYTES, chunks)
        size += sum(map(len, chunks))
        db.execute("UPDATE blob SET size = ? WHERE id = ?", (size, blob_id))
        return int(blob_id)

    # --- blobs

    async def result(self, job_id: int) -> StoredResult | None:
        """Return what an ended job left, whole, None if there is nothing (any more).

        A little one comes with its content: to read that alone would be another hop.
        """
        if latest := self._results.get(job_id):
            return latest
        rows = await self._read(
            "SELECT blob.id, blob.size, blob.sha256, chunk.data"
            " FROM job JOIN attempt ON attempt.id = job.attempt_id"
            " JOIN blob ON blob.id = attempt.result_blob"
            " LEFT JOIN chunk ON chunk.id = blob.id << ? AND blob.size <= ?"
            " WHERE job.id = ? AND blob.state = 'sealed'",
            (CHUNK_INDEX_BITS, LITTLE_BYTES, job_id),
        )
        return StoredResult(*rows[0]) if rows else None

    async def input_of_job(self, job_id: int) -> tuple[StoredFile, ...]:
        """Return a job's input in upload order; nothing once retention has removed it."""
        rows = await self._read(
            "SELECT name, size, sha256, blob_id FROM input_file"
            " WHERE job_id = ? AND blob_id IS NOT NULL ORDER BY position",
            (job_id,),
        )
        return tuple(StoredFile(FileSpec(*row[:3]), row[3]) for row in rows)

    @contextmanager
    def pinned(self, blob_id: int) -> Iterator[None]:
        """Keep the eraser from a blob while it is read."""
        self._pinned[blob_id] += 1
        try:
            yield
        finally:
            self._pinned[blob_id] -= 1
            if not self._pinned[blob_id]:
                del self._pinned[blob_id]
                self._erase_wake.set()

    async def read_chunk(self, blob_id: int, offset: int) -> bytes:
        """Return the bytes from ``offset`` to the end of the chunk that holds it."""
        index, within = divmod(offset, CHUNK_BYTES)
        rows = await self._read(
            "SELECT data FROM chunk WHERE id = ?", ((blob_id << CHUNK_INDEX_BITS) + index,)
        )
        if not rows:
            raise StoreUnavailable(f"blob {blob_id} has no chunk {index}")
        return cast(bytes, rows[0][0][within:])

    async def read_blob(self, blob_id: int, offset: int, size: int) -> bytes:
        """Return ``size`` bytes of a blob from ``offset`` on, all within it, in one hop."""
        return b"".join(await self.read_pieces(blob_id, offset, size))

    async def read_pieces(self, blob_id: int, offset: int, size: int) -> list[bytes]:
        """Return the same as :meth:`read_blob` in the pieces in which it is stored, not copied."""
        first, within = divmod(offset, CHUNK_BYTES)
        last = (offset + size - 1) // CHUNK_BYTES
        base = blob_id << CHUNK_INDEX_BITS
        rows = await self._read(
            "SELECT data FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id",
            (base + first, base + last),
        )
        pieces: list[bytes] = [row[0] for row in rows]
        excess = sum(map(len, pieces)) - within - size
        if excess < 0:
            raise StoreUnavailable(f"blob {blob_id} has not {size} bytes at {offset}")
        if pieces:
            pieces[-1] = pieces[-1][: len(pieces[-1]) - excess]
            pieces[0] = pieces[0][within:]
        return pieces

    async def read_files(self, files: Sequence[StoredFile], offset: int) -> bytes:
        """Return some chunks of the files' bytes, taken as one stream, from ``offset``."""
        async with self._reader() as reader:
            with translated():
                return await reader.call(lambda db: read_stream(db, files, offset))

    async def result_digest(self, attempt_id: int, size: int) -> Any:
        """Return a SHA-256 object fed with the stored start of an attempt's result."""
        rows = await self._read("SELECT result_blob FROM attempt WHERE id = ?", (attempt_id,))
        digest = hashlib.sha256()
        offset = 0
        while offset < size:
            data = await self.read_chunk(rows[0][0], offset)
            digest.update(data)
            offset += len(data)
        return digest

    # --- retention

    async def oldest_final_change(self) -> float | None:
        """Return when the job that retention reaches first became final, in Unix seconds."""
        rows = await self._read(
            "SELECT min(changed_at) FROM job"
            " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
        )
        return cast("float | None", rows[0][0])

    async def clean_jobs_final_since(self, cutoff: float) -> int:
        """Mark some jobs that became final before ``cutoff`` as Cleaned, and doom their bytes.

        Returns how many; the caller asks again until it gets none.
        """

        def operation(db: Database) -> int:
            rows = db.execute(
                "SELECT id, user_id, service, state, attempts, lost_starts FROM job"
                " WHERE state IN ('Completed', 'Failed', 'Invalid', 'Killed')"
                " AND changed_at <= ? ORDER BY changed_at LIMIT ?",
                (cutoff, _CLEAN_JOBS),
            ).fetchall()
            for row in rows:
                job = job_of(row)
                _doom_files_of(db, job.id)
                message = f"files of the {job.state} job removed by retention"
                transition(db, job, JobState.CLEANED, "retention", message)
            return len(rows)

        cleaned = await self._writer.write(operation)
        self._erase_wake.set()
        return cleaned

    async def forget_old_keys(self) -> int:
        """Remove some idempotency keys that count no more; returns how many, to be repeated."""
        cutoff = time.time() - KEY_SECONDS
        return await self._writer.write(
            lambda db: (
                db.execute(
                    "DELETE FROM idempotency WHERE (user_id, key) IN"
                    " (SELECT user_id, key FROM idempotency WHERE created_at <= ?"
                    " ORDER BY created_at LIMIT ?)",
                    (cutoff, _FORGET_KEYS),
                ).rowcount
            )
        )

    async def _erase_for_ever(self) -> None:
        while True:
            await self._erase_wake.wait()
            self._erase_wake.clear()
            try:
                await self._erase_all()
            except (StoreFull, StoreUnavailable) as error:
                log.warning("event=erase_failed error=%r retry_s=%g", str(error), _RETRY_SECONDS)
                self._may_shrink = True
            if self._may_shrink:
                await asyncio.sleep(_RETRY_SECONDS)
                self._erase_wake.set()

    async def _erase_all(self) -> None:
        orphans = frozenset(self._orphans)
        if orphans:
            await self._writer.write(lambda db: doom_blobs(db, orphans))
            self._orphans -= orphans
        erased = 0
        while await self._writer.write(self._erase_some, 1):
            erased += 1
        while await self._writer.write(erase_some_output, 1):
            erased += 1
        if erased or self._may_shrink:
            self._may_shrink = False
            while await self._writer.write(vacuum_some, 1):
                pass
            if not await self._writer.outside_transaction(checkpoint):
                self._may_shrink = True

    def _erase_some(self, db: Database) -> bool:
        """Erase a few chunks of one doomed blob; returns whether there was one."""
        rows = db.execute("SELECT id FROM blob WHERE state = 'doomed' ORDER BY id")
        blob_id = next((row[0] for row in rows if row[0] not in self._pinned), None)
        if blob_id is None:
            return False
        first = blob_id << CHUNK_INDEX_BITS
        last = first + (1 << CHUNK_INDEX_BITS) - 1
        erased = db.execute(
            "DELETE FROM chunk WHERE id IN"
            " (SELECT id FROM chunk WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?)",
            (first, last, ERASE_CHUNKS),
        ).rowcount
        if erased < ERASE_CHUNKS:
            db.execute("DELETE FROM blob WHERE id = ?", (blob_id,))
        return True
