"""The embedded agent comes back, whatever kept it from being started."""

from __future__ import annotations

import os
import resource
import signal

from tests.harness import Server, eventually


async def test_a_server_without_descriptors_for_its_agent_starts_it_when_there_are_some(
    server: Server,
) -> None:
    agent = await server.agent_pid()
    limits = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{server.pid}/fd"))
    # what is below the highest and free is less than the pipes and the fork of a process take
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (used, limits[1]))
    try:
        os.kill(agent, signal.SIGKILL)
        await eventually(
            lambda: "event=embedded_agent_not_started" in server.log(), "it could not be started"
        )
        assert not server.has_ended()
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, limits)
    await server.result(await server.upload("true"))
    assert await server.stop() == 0
