"""What tells a job in its environment which it is."""

from __future__ import annotations

from collections.abc import Sequence
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
        "ORCHESTRATOR_CPUS": str(assign.resources.cpus),
        "ORCHESTRATOR_MEMORY": str(assign.resources.memory or ""),
        "ORCHESTRATOR_GPUS": str(assign.resources.gpus),
        "OMP_NUM_THREADS": str(assign.resources.cpus),
        DIRECTORY_VARIABLE: str(directory),
    }


def gpu_variables(names: Sequence[str]) -> dict[str, str]:
    """Return what makes a job see these GPUs and no others (CUDA's environment variables)."""
    return {"CUDA_VISIBLE_DEVICES": ",".join(names), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
