"""Statements on live output: pieces of what a job prints, the middle left out over the limit."""

from __future__ import annotations

from typing import cast

from events import Output
from records import JobRow, NewOutput, OutputPiece
from storage.blobs import ERASE_CHUNKS
from storage.database import Database
from wire.frames import LIVE_STREAMS

_OUTPUT_ROW_BYTES = 64 * 1024
_OUTPUT_GROWING_BYTES = 8 * 1024  # a row grows to about a page, which is written as a whole anyway
_LIVE_BYTES = 1024 * 1024


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
        db.execute(
            "INSERT INTO output (attempt_id, stream, start, data) VALUES (?, ?, ?, ?)",
            (attempt_id, piece.stream, start, data[:length]),
        )
        data, start = data[length:], start + length
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
        "SELECT data FROM output WHERE attempt_id = ? AND stream = ? AND start = ?", key
    ).fetchone()
    db.execute("DELETE FROM output WHERE attempt_id = ? AND stream = ? AND start = ?", key)
    return cast(bytes, row[0])


def erase_some_output(db: Database) -> bool:
    """Erase a few rows of one attempt's doomed output; returns whether there was any."""
    row = db.execute("SELECT id FROM attempt WHERE is_output_doomed = 1 LIMIT 1").fetchone()
    if row is None:
        return False
    erased = db.execute(
        "DELETE FROM output WHERE rowid IN (SELECT rowid FROM output WHERE attempt_id = ? LIMIT ?)",
        (row[0], ERASE_CHUNKS),
    ).rowcount
    if erased < ERASE_CHUNKS:
        db.execute("UPDATE attempt SET is_output_doomed = 0 WHERE id = ?", row)
    return True
