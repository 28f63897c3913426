"""A wrapper of the operator's own: a command line that is put before ``bash run.sh``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from agent.isolation.base import Confinement, Enclosure

PLACEHOLDERS = ("directory", "cpus", "memory", "gpus")


def problem_with(wrapper: Sequence[str]) -> str | None:
    """Say why a wrapper can't be used here, or None if it may."""
    if shutil.which(wrapper[0]) is None:
        return f"the wrapper {wrapper[0]} is not installed"
    return None


def enclose(confinement: Confinement) -> Enclosure:
    """Say how a job is started behind its service's wrapper.

    ``{directory}``, ``{cpus}``, ``{memory}`` (bytes) and ``{gpus}`` (indices with commas) are
    replaced; what is not limited is the empty text. Nothing goes through a shell.
    """
    allotment, user = confinement.allotment, confinement.user
    values = {
        "directory": str(confinement.place.job),
        "cpus": _text(allotment.cpus),
        "memory": _text(allotment.memory),
        "gpus": ",".join(str(index) for index in allotment.gpus or ()),
    }
    argv = [_filled(part, values) for part in confinement.isolation.wrapper]
    return Enclosure(
        argv=(*argv, *confinement.argv),
        variables={**confinement.variables, "TMPDIR": str(confinement.place.temporary)},
        # a setuid program among wrappers, as some are, needs its privileges
        preparation=None if user is None else {"own": {"user": user.ids()}},
    )


def _filled(part: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        part = part.replace(f"{{{name}}}", value)
    return part


def _text(amount: int | None) -> str:
    return "" if amount is None else str(amount)
