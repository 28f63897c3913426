"""What jobs print: pieces of it, the middle left out over the limit."""

from __future__ import annotations

from events import Output
from records import NewOutput, OutputPiece, OutputSource, StoreDamaged
from storage.checksums import checksum_of_bytes, stored_state
from storage.database import Database
from storage.file import DatabaseFile
from storage.transitions import JobRow, receiving_job_of_attempt
from wire.frames import LIVE_STREAMS, Stream

_OUTPUT_ROW_BYTES = 64 * 1024
_OUTPUT_GROWING_BYTES = 8 * 1024  # a row grows to about a page, which is written as a whole anyway
_LIVE_BYTES = 1024 * 1024
_READ_ROWS = 8
_ERASE_ROWS = 64


class JobOutput:
    """Adding to what is kept of the output of attempts, and reading it."""

    def __init__(self, file: DatabaseFile) -> None:
        self._file = file

    async def append(self, attempt_id: int, output: NewOutput) -> None:
        """Add to what is kept of an attempt's output, and tell its followers.

        What is stored already is ignored. Raises :class:`Superseded` if the attempt no longer
        counts.
        """

        def operation(db: Database) -> None:
            job = receiving_job_of_attempt(db, attempt_id)
            add_output(db, job, attempt_id, output)

        await self._file.write_bytes(operation, output.size)

    async def end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is stored."""
        rows = await self._file.rows(
            "SELECT start + length(data) FROM output WHERE attempt_id = ? AND stream = ?"
            " ORDER BY start DESC LIMIT 1",
            (attempt_id, stream),
        )
        return int(rows[0][0]) if rows else 0

    async def latest_end(self, attempt_id: int, stream: Stream) -> int:
        """Return up to where a stream of an attempt is known, the latest of it included."""
        stored = await self.end(attempt_id, stream)
        return max(stored, await self.end(attempt_id, LIVE_STREAMS[stream]))

    async def read(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        """Return the next pieces that are kept of a stream, from ``start`` on; none at its end."""
        # what is stored for good first: at the end of a job it takes the place of the other
        return await self._read_pieces(attempt_id, stream, start) or await self._read_pieces(
            attempt_id, LIVE_STREAMS[stream], start
        )

    async def _read_pieces(self, attempt_id: int, stream: Stream, start: int) -> list[OutputPiece]:
        rows = await self._file.rows(
            "SELECT start, data, crc32 FROM output WHERE attempt_id = ?1 AND stream = ?2"
            " AND start >= coalesce((SELECT max(start) FROM output"
            "  WHERE attempt_id = ?1 AND stream = ?2 AND start <= ?3), 0)"
            " ORDER BY start LIMIT ?4",
            (attempt_id, stream, start, _READ_ROWS),
        )
        pieces = (OutputPiece(stream, row[0], _checked(attempt_id, *row)) for row in rows)
        cut = (piece.after(start) for piece in pieces)
        return [piece for piece in cut if piece.data]

    async def source(self, job_id: int) -> OutputSource | None:
        """Return a job as the source of output, None if there is no such job."""
        rows = await self._file.rows(
            "SELECT state, attempt_id, attempts FROM job WHERE id = ?", (job_id,)
        )
        return OutputSource(stored_state(rows[0][0]), *rows[0][1:]) if rows else None


def doom_output(db: Database, job_id: int) -> None:
    """Have the output of all attempts of a job erased."""
    db.execute(
        "UPDATE attempt SET is_output_doomed = 1 WHERE job_id = ?"
        " AND EXISTS (SELECT 1 FROM output WHERE attempt_id = attempt.id)",
        (job_id,),
    )


def add_output(db: Database, job: JobRow, attempt_id: int, output: NewOutput) -> None:
    """Store pieces of an attempt's output and have them published."""
    for piece in output.pieces:
        _add_piece(db, attempt_id, piece, output.limit)
        # a follower cuts off what it has, as is done here
        stream = _STREAM_OF_LIVE.get(piece.stream, piece.stream)
        db.announce(Output(job.id, job.attempts, stream, piece.start, piece.data))


_STREAM_OF_LIVE = {live: stream for stream, live in LIVE_STREAMS.items()}


def _add_piece(db: Database, attempt_id: int, piece: OutputPiece, limit: int) -> None:
    row = db.execute(
        "SELECT start, length(data) FROM output WHERE attempt_id = ? AND stream = ?"
        " ORDER BY start DESC LIMIT 1",
        (attempt_id, piece.stream),
    ).fetchone()
    last_start, last_length = row or (0, 0)
    end = last_start + last_length
    data = piece.data[max(0, end - piece.start) :]  # without what is repeated
    start = piece.start + len(piece.data) - len(data)
    if row and start == end and last_length + len(data) <= _OUTPUT_GROWING_BYTES:
        key = (attempt_id, piece.stream, last_start)
        data = _take_row(db, key) + data
        start = last_start
    # what stands before the half is never removed
    half = 0 if piece.stream in _STREAM_OF_LIVE else limit // 2
    kept = min(_LIVE_BYTES, limit) if piece.stream in _STREAM_OF_LIVE else limit - half
    while data:
        # no row on both sides of the half
        length = min(_OUTPUT_ROW_BYTES, half - start if start < half else len(data))
        part = data[:length]
        db.execute(
            "INSERT INTO output (attempt_id, stream, start, data, crc32) VALUES (?, ?, ?, ?, ?)",
            (attempt_id, piece.stream, start, part, checksum_of_bytes(start, part)),
        )
        data, start = data[length:], start + length
    if start - kept > half:
        db.execute(
            "DELETE FROM output WHERE attempt_id = ? AND stream = ?"
            " AND start >= ? AND start + length(data) <= ?",
            (attempt_id, piece.stream, half, start - kept),
        )


def drop_live_output(db: Database, attempt_id: int) -> None:
    """Forget what was only for those who look on while a job runs."""
    db.executemany(
        "DELETE FROM output WHERE attempt_id = ? AND stream = ?",
        ((attempt_id, stream) for stream in _STREAM_OF_LIVE),
    )


def _take_row(db: Database, key: tuple[int, int, int]) -> bytes:
    row = db.execute(
        "SELECT start, data, crc32 FROM output WHERE attempt_id = ? AND stream = ? AND start = ?",
        key,
    ).fetchone()
    db.execute("DELETE FROM output WHERE attempt_id = ? AND stream = ? AND start = ?", key)
    return _checked(key[0], *row)


def _checked(attempt_id: int, start: int, data: object, crc32: int | None) -> bytes:
    """Return a piece if it is what was stored; raises :class:`StoreDamaged`."""
    if not isinstance(data, bytes) or (
        crc32 is not None and crc32 != checksum_of_bytes(start, data)
    ):
        raise StoreDamaged(f"the output of attempt {attempt_id} is damaged at {start}")
    return data


def erase_some_output(db: Database) -> bool:
    """Erase a bounded number of rows of doomed output; returns whether there was any."""
    attempts = db.execute(
        "SELECT id FROM attempt WHERE is_output_doomed = 1 LIMIT ?", (_ERASE_ROWS,)
    ).fetchall()
    room = _ERASE_ROWS
    for (attempt_id,) in attempts:
        erased = db.execute(
            "DELETE FROM output WHERE rowid IN"
            " (SELECT rowid FROM output WHERE attempt_id = ? LIMIT ?)",
            (attempt_id, room),
        ).rowcount
        if erased < room:
            db.execute("UPDATE attempt SET is_output_doomed = 0 WHERE id = ?", (attempt_id,))
        room -= erased
        if room <= 0:
            break
    return bool(attempts)
