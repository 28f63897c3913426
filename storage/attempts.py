"""Attempts: a job is given to an agent, goes on, and ends with its result or is given back."""

from __future__ import annotations

import dataclasses
import hashlib
import sqlite3
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from events import SmallResult
from jobs import ACTIVE_STATES, FINAL_STATES, Demand, FileSpec, JobState, Step, Usage, steps_beyond
from records import (
    NO_OUTPUT,
    ActiveJob,
    Assignment,
    JobIdentity,
    KnownAgent,
    Loss,
    NewOutput,
    ResultMismatch,
    StoreDamaged,
    StoredFile,
    Superseded,
    UserQueue,
)
from storage.blobs import (
    SMALL_BYTES,
    Blobs,
    drop_partial_result,
    has_result,
    insert_chunks,
    open_blob,
    read_stream,
    seal_result,
)
from storage.checksums import stored_state
from storage.database import Database
from storage.file import DatabaseFile
from storage.output import add_output, doom_output, drop_live_output
from storage.transitions import (
    JobRow,
    active_job_of_attempt,
    demand_of,
    first_of_queue,
    job_of_attempt,
    pass_through,
    receiving_job_of_attempt,
    transition,
)
from telemetry import metrics
from wire.frames import CHUNK_BYTES
from wire.messages import Finished

EARLY_LOSSES_OF_A_START = 8
"""How many attempts that were lost before their process started count as one that was not."""

_MAX_AVOIDED = 4


class Attempts:
    """What changes with an attempt, and what is stored of it."""

    def __init__(self, file: DatabaseFile, blobs: Blobs) -> None:
        self._file = file
        self._blobs = blobs
        self.result_bytes = metrics.Counter(
            "orchestrator_result_bytes_total", "Bytes of results that agents delivered."
        )

    async def begin_next(
        self, queue: UserQueue, offers: Mapping[Demand, KnownAgent]
    ) -> Assignment | None:
        """Give the first job of a queue to the agent that is offered for what it demands.

        Returns None if no job waits there that demands one of these things.
        """

        def operation(db: Database) -> Assignment | None:
            first = first_of_queue(db, queue, offers)
            if first is None:
                return None
            before, demand = first
            agent = offers[demand]
            job = dataclasses.replace(before, attempts=before.attempts + 1)
            attempt_id = cast(
                int,
                db.execute(
                    "INSERT INTO attempt (job_id, number, agent_id) VALUES (?, ?, ?)",
                    (job.id, job.attempts, agent.id),
                ).lastrowid,
            )
            db.execute(
                "UPDATE job SET attempts = ?, attempt_id = ? WHERE id = ?",
                (job.attempts, attempt_id, job.id),
            )
            transition(db, job, JobState.PROCESSING, f"to agent {agent.name}", message="")
            row = db.execute("SELECT timeout FROM job WHERE id = ?", (job.id,)).fetchone()
            files = files_of(db, attempt_id)
            is_small = sum(file.spec.size for file in files) <= SMALL_BYTES
            return Assignment(
                JobIdentity(job.id, job.user_id, job.service),
                attempt_id,
                job.attempts,
                row[0],
                files,
                _content_of(db, files) if is_small else None,
                agent.id,
                demand,
            )

        return await self._file.write(operation)

    async def input_files(self, attempt_id: int) -> tuple[StoredFile, ...]:
        """Return the input of an attempt's job, in upload order."""
        return await self._file.read(lambda db: files_of(db, attempt_id))

    async def advance(self, attempt_id: int, steps: Sequence[Step]) -> None:
        """Move a job on; a step to where it is, or behind that, does nothing.

        Raises :class:`Superseded` if the attempt no longer counts.
        """

        def operation(db: Database) -> None:
            job = active_job_of_attempt(db, attempt_id)
            if new := steps_beyond(job.state, steps):
                pass_through(db, job, new)

        await self._file.write(operation)

    async def result_size(self, attempt_id: int) -> int:
        """Return how many bytes of an attempt's result are safe."""
        rows = await self._file.rows(
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
            blob_id, stored = self._append(db, attempt_id, offset, chunks)
            db.execute("UPDATE blob SET size = ? WHERE id = ?", (stored, blob_id))
            db.execute("UPDATE attempt SET result_blob = ? WHERE id = ?", (blob_id, attempt_id))

        size = sum(map(len, chunks))
        await self._file.write_bytes(operation, size)
        self.result_bytes.add(size)

    async def discard_result(self, attempt_id: int) -> None:
        """Forget what has arrived of an attempt's result, for a transfer that starts anew."""

        def operation(db: Database) -> None:
            receiving_job_of_attempt(db, attempt_id)
            drop_partial_result(db, attempt_id)

        await self._file.write(operation)
        self._blobs.to_erase.set()

    async def finish(
        self,
        agent_id: str,
        report: Finished,
        offset: int,
        tail: Sequence[bytes],
        output: NewOutput = NO_OUTPUT,
        steps: Sequence[Step] = (),
    ) -> None:
        """End a job with its result, whole, and what came just before, in one transaction.

        ``tail`` are the last chunks, from ``offset`` on; ``output`` and ``steps`` are what was
        not stored yet. A job that was killed while its agent was away stays so, and gets the
        result as what it left. A repeated call for a job that this very attempt has ended does
        nothing. Raises :class:`Superseded` if the attempt no longer counts or is another agent's,
        :class:`ResultMismatch` if the report does not end a job, the lengths don't add up, or the
        bytes are no whole archive.
        """
        size = sum(map(len, tail))

        def operation(db: Database) -> None:
            job = job_of_attempt(db, report.attempt_id)
            _demand_holder(db, report.attempt_id, agent_id)
            is_killed = job.state is JobState.KILLED and not has_result(db, report.attempt_id)
            if job.state not in ACTIVE_STATES and not is_killed:
                return
            if report.state not in FINAL_STATES:
                raise ResultMismatch(f"attempt {report.attempt_id}: {report.state} is no end")
            add_output(db, job, report.attempt_id, output)
            drop_live_output(db, report.attempt_id)
            self._end_result(db, job, report, offset, tail)
            if not is_killed:
                end = Step(report.state, report.message or "finished", time.time())
                way = [*steps_beyond(job.state, steps), end]
                pass_through(db, job, way, report.message, report.usage)

        await self._file.write_bytes(operation, size + output.size)
        self.result_bytes.add(size)

    def _end_result(
        self, db: Database, job: JobRow, report: Finished, offset: int, tail: Sequence[bytes]
    ) -> None:
        """Store the end of a result and what is reported along with it."""
        blob_id, size = self._append(db, report.attempt_id, offset, tail)
        seal_result(db, blob_id, size, report)
        if offset == 0 and size <= SMALL_BYTES:
            content = b"".join(tail)
            db.announce(SmallResult(job.id, blob_id, report.result_sha256, content))
        usage = report.usage or Usage(None, None, None)
        db.execute(
            "UPDATE attempt SET result_blob = ?, exit_code = ?, cpu_seconds = ?, peak_memory = ?,"
            " wall_seconds = ? WHERE id = ?",
            (
                *(blob_id, report.exit_code),
                *(usage.cpu_seconds, usage.peak_memory, usage.wall_seconds),
                report.attempt_id,
            ),
        )

    async def requeue(
        self, attempt_id: int, loss: Loss, reason: str, max_attempts: int
    ) -> JobState:
        """Take a job from an agent that lost it; returns Queued, or Failed if it was the last try.

        An attempt that was lost before its process started counts an eighth. An agent that
        reported the loss is avoided from now on. Raises :class:`Superseded` if the attempt no
        longer counts.
        """

        def operation(db: Database) -> JobState:
            job = active_job_of_attempt(db, attempt_id)
            early_losses, avoided, agent_id = db.execute(
                "SELECT early_losses, avoided, attempt.agent_id FROM job"
                " JOIN attempt ON attempt.id = job.attempt_id WHERE job.id = ?",
                (job.id,),
            ).fetchone()
            is_early = job.state in loss.early_states
            early_losses += is_early
            counts = not is_early or early_losses % EARLY_LOSSES_OF_A_START == 0
            lost_starts = job.lost_starts + counts
            if loss is not Loss.AGENT_AWAY:
                others = [other for other in avoided.split() if other != agent_id]
                avoided = " ".join(sorted([agent_id, *others[-(_MAX_AVOIDED - 1) :]]))
            drop_partial_result(db, attempt_id)
            if lost_starts >= max_attempts:
                message = f"{reason}; given up after {lost_starts} attempts"
                transition(db, job, JobState.FAILED, message, message)
                return JobState.FAILED
            db.execute(
                "UPDATE job SET attempt_id = NULL, lost_starts = ?, early_losses = ?, avoided = ?"
                " WHERE id = ?",
                (lost_starts, early_losses, avoided, job.id),
            )
            doom_output(db, job.id)
            transition(db, job, JobState.QUEUED, reason, f"{reason}; queued again")
            return JobState.QUEUED

        state = await self._file.write(operation)
        self._blobs.to_erase.set()
        return state

    async def reject(self, attempt_id: int, reason: str) -> None:
        """End a job that an agent found can never run. Raises :class:`Superseded`."""

        def operation(db: Database) -> None:
            job = active_job_of_attempt(db, attempt_id)
            transition(db, job, JobState.INVALID, reason, reason)

        await self._file.write(operation)

    async def fail(self, attempt_id: int, message: str) -> None:
        """End a job that can't go on, whoever has it. Raises :class:`Superseded`."""

        def operation(db: Database) -> None:
            job = active_job_of_attempt(db, attempt_id)
            drop_partial_result(db, attempt_id)
            transition(db, job, JobState.FAILED, message, message)

        await self._file.write(operation)
        self._blobs.to_erase.set()

    async def killed_without_result(self, attempt_id: int, agent_id: str) -> ActiveJob | None:
        """Return the job if it was killed in this agent's attempt, which has not delivered yet."""
        rows = await self._file.rows(
            """SELECT job.id, job.user_id, job.service, attempt.id,
                      attempt.number, agent.id, agent.name, job.state,
                      needed_cpus, needed_memory, needed_gpus, avoided
               FROM attempt JOIN job ON job.id = attempt.job_id AND job.attempt_id = attempt.id
                        JOIN agent ON agent.id = attempt.agent_id
                        LEFT JOIN blob ON blob.id = attempt.result_blob
               WHERE attempt.id = ? AND attempt.agent_id = ? AND job.state = 'Killed'
                 AND blob.state IS NOT 'sealed'""",
            (attempt_id, agent_id),
        )
        return _active_job(rows[0]) if rows else None

    async def active(self) -> list[ActiveJob]:
        """Return all jobs that an agent holds."""
        rows = await self._file.rows(
            """SELECT job.id, job.user_id, job.service, attempt.id, attempt.number,
                      agent.id, agent.name, job.state,
                      needed_cpus, needed_memory, needed_gpus, avoided
               FROM job JOIN attempt ON attempt.id = job.attempt_id
                        JOIN agent ON agent.id = attempt.agent_id
               WHERE job.state IN ('Processing', 'Submitted', 'Running') ORDER BY job.id"""
        )
        return [_active_job(row) for row in rows]

    async def result_digest(self, attempt_id: int, size: int) -> Any:
        """Return a SHA-256 object fed with the stored start of an attempt's result."""
        rows = await self._file.rows("SELECT result_blob FROM attempt WHERE id = ?", (attempt_id,))
        digest = hashlib.sha256()
        offset = 0
        while offset < size:
            for data in await self._blobs.read(rows[0][0], offset, min(CHUNK_BYTES, size - offset)):
                digest.update(data)
                offset += len(data)
        return digest

    def _append(
        self, db: Database, attempt_id: int, offset: int, chunks: Sequence[bytes]
    ) -> tuple[int, int]:
        """Add chunks to an attempt's result; returns its id and how many bytes that has now."""
        row = db.execute(
            "SELECT blob.id, blob.size FROM attempt JOIN blob ON blob.id = attempt.result_blob"
            " WHERE attempt.id = ?",
            (attempt_id,),
        ).fetchone()
        if row is None:
            row = (self._blobs.next_id(), 0)
            open_blob(db, row[0])
        blob_id, size = row
        if offset != size:
            raise ResultMismatch(f"attempt {attempt_id}: bytes at {offset}, {size} stored")
        insert_chunks(db, blob_id, offset // CHUNK_BYTES, chunks)
        return blob_id, size + sum(map(len, chunks))


def _active_job(row: Sequence[Any]) -> ActiveJob:
    return ActiveJob(*(JobIdentity(*row[:3]), *row[3:7], stored_state(row[7]), demand_of(row[8:])))


def _content_of(db: Database, files: Sequence[StoredFile]) -> bytes | None:
    """Return all bytes of small files; None if they can't be read, which their transfer tells."""
    try:
        return read_stream(db, files, 0)
    except (StoreDamaged, sqlite3.DatabaseError):
        return None


def _demand_holder(db: Database, attempt_id: int, agent_id: str) -> None:
    """Raise :class:`Superseded` if the attempt is not this agent's."""
    row = db.execute("SELECT agent_id FROM attempt WHERE id = ?", (attempt_id,)).fetchone()
    if row is None or row[0] != agent_id:
        raise Superseded(f"attempt {attempt_id} is not the agent's")


def files_of(db: Database, attempt_id: int) -> tuple[StoredFile, ...]:
    """Return the input of an attempt's job, in upload order."""
    rows = db.execute(
        "SELECT name, size, sha256, blob_id FROM input_file"
        " WHERE job_id = (SELECT job_id FROM attempt WHERE id = ?) ORDER BY position",
        (attempt_id,),
    )
    return tuple(StoredFile(FileSpec(row[0], row[1], row[2]), row[3]) for row in rows)
