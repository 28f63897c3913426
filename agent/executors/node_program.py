"""What runs on the nodes: a copy in the work directory of the part of this program that they need.

A job may wait in a cluster's queue for days. What it finds when it starts is what it was submitted
with, whatever has become of the program by then; and the nodes need nothing but a Python.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

_APPLICATION = Path(__file__).parents[2]
_PARTS = ("agent/__init__.py", "agent/supervision/*.py", "agent/isolation/*.py")
_DIGEST_CHARACTERS = 16


def install(directory: Path) -> Path:
    """Copy it, unless this version already exists; returns the program for a node.

    Raises :class:`OSError`.
    """
    sources = {
        str(path.relative_to(_APPLICATION)): path.read_bytes()
        for part in _PARTS
        for path in sorted(_APPLICATION.glob(part))
    }
    digest = hashlib.sha256(repr(sources).encode()).hexdigest()[:_DIGEST_CHARACTERS]
    target = directory / digest
    if not target.exists():
        unfinished = directory / f"{digest}.{os.getpid()}.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        for name, content in sources.items():
            (unfinished / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            (unfinished / name).write_bytes(content)
        unfinished.rename(target)
    return target / "agent" / "supervision" / "on_node.py"
