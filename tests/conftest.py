"""Fixtures: a running server, and agents beside it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import AgentProcess, Server, running_server
from tests.slurm_cluster import SlurmCluster, missing_program, running_slurm


def pytest_configure() -> None:
    """Heed SIGINT even where a shell started the tests with ``&``.

    Such a shell has its children ignore it (POSIX, Shell Command Language, 2.11), and they would
    hand that on to the servers and agents under test.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with its embedded agent of four slots."""
    async with running_server(tmp_path / "server", "--slots", "4") as server:
        yield server


@pytest.fixture
async def bare_server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Server]:
    """A server without an agent of its own.

    An agent that comes back on a busy machine comes back within its lease; a test that waits for
    the end of one is marked ``lease(seconds)``.
    """
    mark = request.node.get_closest_marker("lease")
    lease = 60 if mark is None else mark.args[0]
    environment = {"LEASE": str(lease), "KILL_GRACE": "1"}
    async with running_server(tmp_path / "server", "--no-agent", environment=environment) as server:
        yield server


@pytest.fixture
async def new_agent(bare_server: Server) -> AsyncIterator[Callable[[str], AgentProcess]]:
    """Makes agents for ``bare_server``; those still alive at the end are killed."""
    made: list[AgentProcess] = []

    def make(name: str) -> AgentProcess:
        made.append(AgentProcess(bare_server, name))
        return made[-1]

    yield make
    for agent in made:
        if agent.process is not None:
            await agent.kill()


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A real Slurm of one node; one for each process of the tests."""
    if program := missing_program():
        pytest.skip(f"{program} is not installed (Debian: slurm-wlm, munge)")
    # not pytest's own directory: a socket's path must be short
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as directory,
        running_slurm(Path(directory) / "slurm") as cluster,
    ):
        yield cluster
