"""A client of Orchestrator, the job server for labs.

::

    from orchestrator_client import Client

    with Client("http://localhost:5000") as client:
        job = client.submit("example", files=["run.sh", "input.pdb"])
        job.result("out/")

What is named here is imported when it is first asked for: the command line starts without most.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator_client.asynchronous import AsyncClient as AsyncClient
    from orchestrator_client.asynchronous import AsyncJob as AsyncJob
    from orchestrator_client.client import Client as Client
    from orchestrator_client.errors import BadRequest as BadRequest
    from orchestrator_client.errors import Conflict as Conflict
    from orchestrator_client.errors import DamagedDownload as DamagedDownload
    from orchestrator_client.errors import Forbidden as Forbidden
    from orchestrator_client.errors import JobFailed as JobFailed
    from orchestrator_client.errors import NotFound as NotFound
    from orchestrator_client.errors import OrchestratorError as OrchestratorError
    from orchestrator_client.errors import QuotaExceeded as QuotaExceeded
    from orchestrator_client.errors import Refused as Refused
    from orchestrator_client.errors import ServerError as ServerError
    from orchestrator_client.errors import ServerUnavailable as ServerUnavailable
    from orchestrator_client.errors import SettingsError as SettingsError
    from orchestrator_client.errors import StorageFull as StorageFull
    from orchestrator_client.errors import TooLarge as TooLarge
    from orchestrator_client.errors import Unauthorized as Unauthorized
    from orchestrator_client.errors import UnexpectedAnswer as UnexpectedAnswer
    from orchestrator_client.errors import UnsafeArchive as UnsafeArchive
    from orchestrator_client.errors import UnusableFile as UnusableFile
    from orchestrator_client.errors import WaitTimeout as WaitTimeout
    from orchestrator_client.extraction import Extraction as Extraction
    from orchestrator_client.jobs import Job as Job
    from orchestrator_client.operations import JobFilter as JobFilter
    from orchestrator_client.records import BulkAnswer as BulkAnswer
    from orchestrator_client.records import Event as Event
    from orchestrator_client.records import JobFile as JobFile
    from orchestrator_client.records import JobInfo as JobInfo
    from orchestrator_client.records import JobState as JobState
    from orchestrator_client.submissions import Submission as Submission

_MODULES = {
    **dict.fromkeys(("AsyncClient", "AsyncJob"), "asynchronous"),
    "Client": "client",
    **dict.fromkeys(
        (
            *("BadRequest", "Conflict", "DamagedDownload", "Forbidden", "JobFailed", "NotFound"),
            *("OrchestratorError", "QuotaExceeded", "Refused", "ServerError", "ServerUnavailable"),
            *("SettingsError", "StorageFull", "TooLarge", "Unauthorized", "UnexpectedAnswer"),
            *("UnsafeArchive", "UnusableFile", "WaitTimeout"),
        ),
        "errors",
    ),
    "Extraction": "extraction",
    "Job": "jobs",
    "JobFilter": "operations",
    **dict.fromkeys(("BulkAnswer", "Event", "JobFile", "JobInfo", "JobState"), "records"),
    "Submission": "submissions",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - strings, all of them


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"orchestrator_client.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
