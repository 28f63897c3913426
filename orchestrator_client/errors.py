"""What can go wrong, as one small tree: one class for each thing that a caller can act on."""

from __future__ import annotations


class OrchestratorError(Exception):
    """Base of all errors of this package; ``str()`` is a sentence to show to people.

    ``status`` is the HTTP status of the server's answer, None if it was not an answer.
    ``after_retry`` says that the same request was sent before without an answer, so that the
    server may have obeyed that one.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.after_retry = False


class ServerUnavailable(OrchestratorError):
    """The server can't be reached, or asks to come later, for longer than the patience."""


class ServerError(OrchestratorError):
    """The server failed (5xx); the message is the server's."""


class UnexpectedAnswer(OrchestratorError):
    """The answer is none of this API: something else listens at that address."""


class BadRequest(OrchestratorError):
    """The server does not understand the request (400); the message names the field."""


class Unauthorized(OrchestratorError):
    """There is no valid token in the request, and one is needed (401)."""


class Forbidden(Unauthorized):
    """The token does not allow this (403)."""


class NotFound(OrchestratorError):
    """There is no such job or file, or none that the token may see (404)."""


class Refused(OrchestratorError):
    """The server understands the request and does not obey it."""


class QuotaExceeded(Refused):
    """A limit of the user or the service is reached (429), for longer than the patience."""


class Conflict(Refused):
    """The state of things does not allow it (409), as to delete a job that runs."""


class TooLarge(Refused):
    """The upload is larger than the server takes (413)."""


class StorageFull(Refused):
    """The server's disk is full (507)."""


class JobFailed(OrchestratorError):
    """The job ended, but not as ``Completed``.

    ``job_id`` and ``state`` say which and how; ``exit_code`` is that of its script, None if it
    did not come so far.
    """

    def __init__(self, message: str, job_id: int, state: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.job_id = job_id
        self.state = state
        self.exit_code = exit_code


class WaitTimeout(OrchestratorError, TimeoutError):
    """The job has not ended in the time that it was waited for. It goes on."""


class UnusableFile(OrchestratorError):
    """A file can't be uploaded: it is not there, changes meanwhile, or has no usable name."""


class DamagedDownload(OrchestratorError):
    """What was downloaded is not what the server has: length or SHA-256 differ."""


class UnsafeArchive(OrchestratorError):
    """An archive holds what would be written outside of the directory, or can't be."""


class SettingsError(OrchestratorError):
    """A setting, or the file that holds it, can't be used; the message says what to do."""
