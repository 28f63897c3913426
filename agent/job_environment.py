"""What tells a job in its environment which it is."""

from __future__ import annotations

from pathlib import Path

from wire.messages import Assign

DIRECTORY_VARIABLE = "ORCHESTRATOR_JOB_DIRECTORY"
"""Its value is unlike any other job's, so that a job's processes can be told by it."""


def variables_of(assign: Assign, directory: Path) -> dict[str, str]:
    """Return the variables of one attempt, whose working directory is ``directory``."""
    return {
        "ORCHESTRATOR_JOB_ID": str(assign.job_id),
        "ORCHESTRATOR_ATTEMPT": str(assign.number),
        "ORCHESTRATOR_USER_ID": str(assign.user_id),
        "ORCHESTRATOR_SERVICE": assign.service,
        DIRECTORY_VARIABLE: str(directory),
    }
