"""What a job finds in its environment, and nothing else of the agent's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wire.messages import Assign

DIRECTORY_VARIABLE = "ORCHESTRATOR_JOB_DIRECTORY"
"""Its value is unlike any other job's, so that a job's processes can be told by it."""

_PASSED_VARIABLES = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "MODULEPATH",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    ]
)
_PASSED_PREFIXES = ("LC_",)


def inherited_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return what jobs may see of the agent's environment."""
    return {
        name: value
        for name, value in own.items()
        if name in _PASSED_VARIABLES or name.startswith(_PASSED_PREFIXES)
    }


def variables_of(assign: Assign, directory: Path) -> dict[str, str]:
    """Return the variables of one attempt, whose working directory is ``directory``."""
    return {
        "ORCHESTRATOR_JOB_ID": str(assign.job_id),
        "ORCHESTRATOR_ATTEMPT": str(assign.number),
        "ORCHESTRATOR_USER_ID": str(assign.user_id),
        "ORCHESTRATOR_SERVICE": assign.service,
        DIRECTORY_VARIABLE: str(directory),
    }
