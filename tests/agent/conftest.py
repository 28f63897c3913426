"""Fixtures for tests in which agents die."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness import Server, running_server


@pytest.fixture
async def patient_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server that gives an agent all the time it needs to come back."""
    environment = {"LEASE": "300", "KILL_GRACE": "60"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server
