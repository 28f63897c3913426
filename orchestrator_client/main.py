"""The program ``orchestrator`` as pip installs it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def application() -> Path:
    """Return the folder of the server and agent: beside this package, or the clone it is in."""
    beside = Path(__file__).parent.parent
    installed = beside / "orchestrator_app"
    return installed if installed.is_dir() else beside


def main() -> int:
    """Hand over to the server's and the agent's command line; does not return."""
    program = application() / "orchestrator.py"
    os.execv(sys.executable, [sys.executable, str(program), *sys.argv[1:]])
