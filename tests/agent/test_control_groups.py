"""Where the agent may make control groups, the kernel keeps the memory of jobs within limits."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import control_groups
from agent.control_groups import Delegated
from tests.harness import AgentProcess, Server, curl, eventually, lines, running_server

_FLAG = "trusted.delegate"
_LIMIT = {"SERVICE_TIGHT_MEMORY": "128M"}
_GREEDY = 'python3 -c "x = bytearray(300 << 20)"'
_ENTER = ("bash", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"')


def mounts(root: Path) -> str:
    return f"29 22 0:26 / {root} rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory with the files of a group that was delegated to its owner."""
    top = tmp_path / "service"
    (top / "agent").mkdir(parents=True)
    (top / "cgroup.procs").touch()
    (top / "cgroup.controllers").write_text("cpu memory pids\n")
    (top / "cgroup.subtree_control").touch()
    (tmp_path / "mounts").write_text(mounts(tmp_path))
    (tmp_path / "membership").write_text("9:memory:/x\n0::/service/agent\n")
    monkeypatch.setattr(control_groups, "_is_delegated", lambda top: os.access(top, os.W_OK))
    return tmp_path


def found(root: Path) -> Delegated | None:
    return control_groups.delegated(root / "mounts", root / "membership")


@pytest.mark.quick
def test_a_group_that_was_delegated_is_used(pretended: Path) -> None:
    top = pretended / "service"
    assert found(pretended) == Delegated(top, top / "agent")
    assert (top / "cgroup.subtree_control").read_text() == "+memory"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("service/cgroup.procs", "17\n"),  # another process would be in the way
        ("service/cgroup.controllers", "cpu pids\n"),
        ("membership", "0::/\n"),
        ("membership", "9:memory:/x\n"),
        ("mounts", "29 22 0:26 / /sys/fs/cgroup rw - cgroup cgroup rw,memory\n"),
    ],
)
def test_one_that_can_not_be_used_is_left_alone(pretended: Path, name: str, content: str) -> None:
    (pretended / name).write_text(content)
    assert found(pretended) is None
    assert (pretended / "service" / "cgroup.subtree_control").read_text() == ""


@pytest.mark.quick
@pytest.mark.skipif(os.geteuid() != 0, reason="another user may write only what is theirs")
def test_root_does_not_take_what_systemd_has_not_marked(tmp_path: Path) -> None:
    assert not control_groups._is_delegated(tmp_path)


# --- with a real one --------------------------------------------------------------


@pytest.fixture
def delegated_group() -> Iterator[Path]:
    """Make a group as systemd does for a unit, with one in it for the agent; returns the top."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a control group here")
    point = control_groups._mount_point(Path("/proc/self/mountinfo").read_text().splitlines())
    controllers = (point / "cgroup.controllers").read_text() if point else ""
    if point is None or "memory" not in controllers.split():
        pytest.skip("version 2 of control groups does not count memory on this machine")
    top = point / f"orchestrator-test-{os.getpid()}"
    try:
        (point / "cgroup.subtree_control").write_text("+memory")
        (top / "agent").mkdir(parents=True)
        os.setxattr(top, _FLAG, b"1")
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield top
    for path in (*top.iterdir(), top):
        if path.is_dir():
            path.rmdir()


def agent_in(group: Path, server: Server) -> AgentProcess:
    agent = AgentProcess(server, "delegated")
    agent.prefix = (*_ENTER, str(group / "agent"))
    return agent


def job_groups(top: Path) -> list[Path]:
    return list(top.glob("agent-job-*"))


@pytest.mark.parametrize("isolation", ["none", "auto"])
async def test_the_kernel_ends_a_job_that_wants_more_memory_than_its_own(
    delegated_group: Path, tmp_path: Path, isolation: str
) -> None:
    async with running_server(tmp_path / "server", "--no-agent", environment=_LIMIT) as server:
        agent = agent_in(delegated_group, server)
        await agent.start("--isolation", isolation)
        script = f"({_GREEDY}) & wait; sleep 1000"
        answer = await server.wait(await server.upload(script, service="tight"), seconds=120)
        assert (answer["status"], answer["message"]) == (
            "Failed",
            "needed more memory than its 128 MB",
        )
        modest = f"grep -c agent-job /proc/self/cgroup; {_GREEDY.replace('300', '30')}"
        archive = await server.result(await server.upload(modest, service="tight"), seconds=120)
        assert archive.read("stdout.log") == b"1\n"
        outside = await server.upload("grep 0::/ /proc/self/cgroup")
        assert (await server.result(outside, seconds=120)).read("stdout.log").endswith(b"/agent\n")
        await eventually(lambda: job_groups(delegated_group) == [], "their groups are gone")
        await agent.kill()


async def test_the_group_of_a_job_outlives_the_agent_and_not_the_job(
    delegated_group: Path, tmp_path: Path
) -> None:
    async with running_server(tmp_path / "server", "--no-agent", environment=_LIMIT) as server:
        agent = agent_in(delegated_group, server)
        await agent.start("--isolation", "none")
        witness, go = tmp_path / "witness", tmp_path / "go"
        job_id = await server.upload(
            f"echo $PPID >> {witness}; until [ -e {go} ]; do sleep 0.05; done; {_GREEDY}",
            service="tight",
        )
        await eventually(lambda: len(lines(witness)) == 1, "it runs", 60)
        await agent.kill()
        await agent.start("--isolation", "none")
        assert len(job_groups(delegated_group)) == 1
        go.touch()
        answer = await server.wait(job_id, seconds=120)
        assert answer["message"] == "needed more memory than its 128 MB"
        # what a supervisor can no longer remove, since it was killed, the agent does
        second = await server.upload(f"echo $PPID >> {witness}; sleep 1000", service="tight")
        await eventually(lambda: len(lines(witness)) == 2, "it runs", 60)
        os.kill(int(lines(witness)[1]), signal.SIGKILL)
        await eventually(lambda: len(lines(witness)) == 3, "it is lost, and runs again", 60)
        await curl("-X", "POST", f"{server.url}/terminate/{second}")
        await eventually(lambda: job_groups(delegated_group) == [], "their groups are gone", 60)
        await agent.kill()
