"""Submitting jobs: uploads, how many of them may be open, and running a job again."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aiohttp import hdrs, web

from api.answers import job_answer
from api.callers import check_user, user_restriction
from api.errors import (
    BadRequest,
    TooManyUploads,
    TooManyUploadsOfUser,
    UnknownJob,
    UnsupportedMedia,
    UploadTooLarge,
)
from api.form import read_form
from api.parameters import idempotency_key_of, service_from
from api.routes import job_id_of
from config import MAX_UPLOAD_BYTES, SettingsInForce
from dispatch import Dispatcher
from jobs import JobState
from records import JobRequest, JobStatus, Submission
from store import Store, Upload
from telemetry.logs import event

log = logging.getLogger("orchestrator.api")


class OpenUploads:
    """Counts the uploads that arrive, of each user and of all: each holds memory and disk."""

    def __init__(self, settings: SettingsInForce) -> None:
        self._settings = settings
        self._of_all = 0
        self._of_users: Counter[int] = Counter()

    @contextmanager
    def one_more(self) -> Iterator[Callable[[int], None]]:
        """Count an upload until the end of the block; raises :class:`TooManyUploads`.

        Call what it gives with the upload's user, once that is known; it raises likewise.
        """
        if self._of_all >= self._settings.current.max_open_uploads_total:
            raise TooManyUploads(f"{self._of_all} uploads are arriving, which is the limit")
        users: list[int] = []

        def count_for(user_id: int) -> None:
            count = self._of_users[user_id]
            if count >= self._settings.current.max_open_uploads:
                raise TooManyUploadsOfUser(
                    f"{count} uploads of user {user_id} are arriving, which is the limit"
                )
            self._of_users[user_id] += 1
            users.append(user_id)

        self._of_all += 1
        try:
            yield count_for
        finally:
            self._of_all -= 1
            self._of_users -= Counter(users)  # drops what comes to zero


class SubmitHandlers:
    """The handlers that make jobs."""

    def __init__(self, store: Store, dispatcher: Dispatcher, settings: SettingsInForce) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._settings = settings
        self._open_uploads = OpenUploads(settings)

    async def upload(self, request: web.Request) -> web.StreamResponse:
        """POST /upload."""
        if (request.content_length or 0) > MAX_UPLOAD_BYTES:
            raise UploadTooLarge
        if not request.content_type.startswith("multipart/form-data"):
            raise BadRequest("Content-Type: must be multipart/form-data")
        if request.headers.get(hdrs.CONTENT_ENCODING, "identity").lower() != "identity":
            raise UnsupportedMedia("Content-Encoding: send the form as it is")
        message = "Job successfully uploaded"
        upload = self._store.uploads.new()
        try:
            job = await self._receive(request, upload)
            submission = await self._dispatcher.submit(upload, job, message)
        finally:
            if upload.leaves_bytes():
                await asyncio.shield(upload.abandon())
        return self._answer(submission, message)

    async def _receive(self, request: web.Request, upload: Upload) -> JobRequest:
        bound_user = user_restriction(request)
        with self._open_uploads.one_more() as count_for:
            if bound_user is not None:
                count_for(bound_user)

            def admit(user_id: int) -> None:
                check_user(request, user_id)
                if bound_user is None:
                    count_for(user_id)

            return await read_form(request, upload, self._settings.current, admit)

    async def rerun(self, request: web.Request) -> web.StreamResponse:
        """POST /jobs/{id}/rerun."""
        source_id = job_id_of(request)
        job = await self._store.jobs.request(source_id)
        if job is None:
            raise UnknownJob
        service_from(job.service, self._settings.current.services)
        job = dataclasses.replace(job, idempotency_key=idempotency_key_of(request))
        message = f"Job {source_id} successfully submitted again"
        submission = await self._dispatcher.rerun(source_id, job, message)
        return self._answer(submission, message)

    def _answer(self, submission: Submission, message: str) -> web.Response:
        job = submission.job
        if submission.is_repeated:
            event(log, "upload_repeated", job=job.id, user=job.user_id)
        else:
            event(log, "uploaded", job=job.id, user=job.user_id, service=job.service)
        return job_answer(JobStatus(job.id, JobState.QUEUED, message), status=201)
