"""Cleaning: a job that has ended loses its files and keeps what is known of it."""

from __future__ import annotations

from jobs import JobState
from storage.blobs import doom_files_of_job
from storage.database import Database
from storage.output import doom_output
from storage.transitions import JobRow, transition


def clean_job(db: Database, job: JobRow, reason: str) -> None:
    """Doom all bytes of a job that has ended and mark it Cleaned."""
    doom_files_of_job(db, job.id)
    doom_output(db, job.id)
    transition(db, job, JobState.CLEANED, reason, f"files {reason}")
