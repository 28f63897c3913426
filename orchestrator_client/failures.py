"""How a command tells that it failed: a sentence on standard error, and an exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from orchestrator_client.errors import (
    BadRequest,
    JobFailed,
    NotFound,
    OrchestratorError,
    Refused,
    ServerError,
    ServerUnavailable,
    SettingsError,
    Unauthorized,
    UnexpectedAnswer,
    UnusableFile,
    WaitTimeout,
)
from orchestrator_client.exit_codes import (
    FAILED,
    INTERRUPTED,
    REFUSED,
    UNAUTHORIZED,
    UNREACHABLE,
    USAGE,
    WAITED_TOO_LONG,
)
from orchestrator_client.identifiers import UsageError
from orchestrator_client.output import printable, say
from orchestrator_client.session import Interrupted

_DEBUG_VARIABLE = "ORCHESTRATOR_DEBUG"
_CODES: Mapping[type[Exception], int] = {
    JobFailed: FAILED,
    BadRequest: USAGE,
    NotFound: USAGE,
    SettingsError: USAGE,
    UnusableFile: USAGE,
    Refused: REFUSED,
    Unauthorized: UNAUTHORIZED,
    ServerError: UNREACHABLE,
    ServerUnavailable: UNREACHABLE,
    UnexpectedAnswer: UNREACHABLE,
    WaitTimeout: WAITED_TOO_LONG,
    OrchestratorError: FAILED,
}


def told(command: Callable[[], int]) -> int:
    """Run a command; an error that it raises is told in words, and becomes its exit code."""
    try:
        return command()
    except UsageError as error:
        say(f"orchestrator: {_lines(str(error))}")
        return USAGE
    except Interrupted as error:
        say(f"orchestrator: interrupted; {printable(error)}")
        return INTERRUPTED
    except OrchestratorError as error:
        say(f"orchestrator: {printable(error)}{_advice(error)}")
        return next(code for kind, code in _CODES.items() if isinstance(error, kind))
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{printable(error.filename)}: " if error.filename else ""
        say(f"orchestrator: {where}{printable(error.strerror or error)}")
        return FAILED
    except Exception as error:
        if os.environ.get(_DEBUG_VARIABLE):
            raise
        what = printable(f"{type(error).__name__}: {error}")
        say(f"orchestrator: this is a defect, please report it: {what}")
        say(f"orchestrator: {_DEBUG_VARIABLE}=1 shows where it is")
        return FAILED


def _lines(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _advice(error: OrchestratorError) -> str:
    """Say what may help, where that is known."""
    if isinstance(error, Unauthorized) and error.status == 401:
        return "; set ORCHESTRATOR_TOKEN_FILE, or --token-file"
    if isinstance(error, ServerUnavailable) and error.status is None:
        return "; is the server running, and is the address right (--url, ORCHESTRATOR_URL)?"
    return ""
