"""Fixtures of the client's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.program import Program
from tests.harness import Server


@pytest.fixture
def program(server: Server, tmp_path: Path) -> Program:
    """The command line, in a directory of its own, beside a running server."""
    directory = tmp_path / "user"
    directory.mkdir()
    return Program(server.url, directory)
