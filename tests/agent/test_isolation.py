"""Jobs that try to get out, for every isolation that this machine can give.

Each world has a server, an agent and a job to be spied on, all of one ordinary user; or an agent
that is root and gives root up for its jobs. One more world has no isolation: there the ways out
lead out, so that they are known to be ways.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import socket
import stat
import subprocess
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from agent.isolation import ruleset
from tests.agent import escapes
from tests.harness import (
    POLL_SECONDS,
    AgentProcess,
    Server,
    curl,
    eventually,
    running_server,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

IS_ROOT = os.geteuid() == 0
KINDS = ("none", "landlock", "bubblewrap", "podman")
WORLDS = [
    *((kind, "ordinary") for kind in KINDS),
    *((kind, "job-user") for kind in KINDS if kind != "none"),
]
PYTHON = escapes.python_for_jobs()
_MARK = "MARK_OF_THIS_TEST"
_KEY = "the private key of this test"
_SECRET = "the secret of another job"
_IMAGE = "localhost/orchestrator-test:1"
_SLEEP = f"4242.{os.getpid()}"
_LEFT_BEHIND = f"4343.{os.getpid()}"


@dataclass
class World:
    """A server, an agent with one kind of isolation, what they hide, and a job to spy on."""

    kind: str
    user: str
    directory: Path
    outside: Path
    server: Server
    agent: AgentProcess
    targets: dict[str, str]
    listener: socket.socket

    @property
    def home(self) -> Path:
        """The home of the agent's user, in which secrets lie."""
        return self.directory / "home"

    @property
    def python(self) -> str | None:
        """A Python that jobs have; the image of podman has none."""
        return None if self.kind == "podman" else PYTHON


# --- the worlds -------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=WORLDS, ids="-".join)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Make a world; skipped, with the reason, where the machine can't give it."""
    kind, user = request.param
    if not IS_ROOT and user == "job-user":
        pytest.skip("only root can give up root")
    program = {"bubblewrap": "bwrap", "podman": "podman"}.get(kind)
    if program is not None and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    # elsewhere than in /tmp, all of which is hidden: what lies there must be hidden by itself
    directory = Path(tempfile.mkdtemp(prefix="isolation-", dir="/var/lib" if IS_ROOT else None))
    outside = Path(tempfile.mkdtemp(prefix="isolation-", dir="/tmp"))
    try:
        async with _world(directory, outside, kind, user) as made:
            yield made
    finally:
        _remove(directory)
        _remove(outside)


@contextlib.asynccontextmanager
async def _world(directory: Path, outside: Path, kind: str, user: str) -> AsyncIterator[World]:
    prefix: tuple[str, ...] = ()
    if IS_ROOT and user == "ordinary":
        prefix = escapes.as_ordinary_user(directory)
    environment = _environment(directory)
    _plant(directory, kind)
    outside.chmod(0o777)
    (outside / "file").write_text("of somebody else")
    (outside / "file").chmod(0o666)
    if prefix:
        _give(directory)
    if kind == "podman":
        _make_image(directory, prefix, environment)
    server = Server(directory / "server", {**environment, "MARK": _MARK})
    server.prefix = prefix
    agent = AgentProcess(server, "spied-on")
    agent.prefix = prefix
    agent.workdir = directory / "work"
    with _listener() as listener:
        try:
            await server.start("--no-agent", "--config", str(directory / "settings.toml"))
            options = ["--slots", "4", "--token-file", str(directory / "token")]
            for suffix in ("", "-wal", "-shm"):
                options += ["--hide", f"{server.database}{suffix}"]
            if user == "job-user":
                options += ["--job-user", f"{escapes.UID + 1}-{escapes.UID + 20}"]
            await agent.start(*options, environment={**environment, "MARK": _MARK})
            await agent.wait_connected()
            world = World(kind, user, directory, outside, server, agent, {}, listener)
            await _wait_until_offered(world)
            await _find_targets(world)
            yield world
        finally:
            with contextlib.suppress(AssertionError):  # it may not even have started
                await curl("-X", "POST", f"{server.url}/terminate/1")
            if agent.process is not None:
                await agent.kill()
            for pid in (*_processes_of(_SLEEP), *_processes_of(_LEFT_BEHIND)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            await server.clean_up()


def _environment(directory: Path) -> dict[str, str]:
    return {
        "HOME": str(directory / "home"),
        "XDG_RUNTIME_DIR": str(directory / "run"),
        "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"),
    }


def _plant(directory: Path, kind: str) -> None:
    """Lay out what jobs are not to find, where the user's own modes would let them."""
    directory.chmod(0o755)
    for name in ("home", "run", "server", "shared", "work"):
        (directory / name).mkdir()
    (directory / "home" / ".ssh").mkdir()
    (directory / "home" / ".ssh" / "id_ed25519").write_text(_KEY)
    (directory / "home" / ".netrc").write_text("machine example.org password secret\n")
    (directory / "home" / "data").write_text("may be read")
    (directory / "token").write_text("a-token-of-this-test-0123456789\n")
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/images"\n'
        f'runroot = "{directory}/run/images"\n'
    )
    image = f'image = "{_IMAGE}"\n' if kind == "podman" else ""
    # making a container's network takes seconds, and has nothing to do with what is tried here
    network = "network = false\n" if kind == "podman" else ""
    (directory / "settings.toml").write_text(
        'ORCHESTRATOR_AGENT_TOKEN = "a-token-of-this-test-0123456789"\n'
        "KILL_GRACE = 1\nSLOTS = 1\n"
        f'[services.example]\nisolation = "{kind}"\n{image}{network}'
        f'[services.offline]\nisolation = "{kind}"\n{image}'
        + ("" if kind == "none" else "network = false\n")
    )


def _give(directory: Path) -> None:
    for path in (directory, *directory.rglob("*")):
        os.chown(path, escapes.UID, escapes.UID, follow_symlinks=False)


def _make_image(directory: Path, prefix: tuple[str, ...], environment: dict[str, str]) -> None:
    """Make an image of this machine's busybox, as the user whose agent runs it."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed (package busybox-static)")
    root = directory / "image"
    for name in ("bin", "etc", "proc", "dev", "sys"):
        (root / name).mkdir(parents=True)
    (root / "tmp").mkdir(mode=0o1777)
    shutil.copy(busybox, root / "bin" / "busybox")
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout
    for name in names.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    bash = root / "bin" / "bash"
    bash.unlink(missing_ok=True)
    bash.write_text('#!/bin/sh\nexec /bin/sh "$@"\n')
    bash.chmod(0o755)
    archive = directory / "image.tar"
    subprocess.run(
        ["tar", "--owner=0", "--group=0", "-C", str(root), "-cf", str(archive), "."], check=True
    )
    made = subprocess.run(
        [*prefix, "podman", "import", str(archive), _IMAGE],
        env={**os.environ, **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"podman can't make an image here: {made.stderr[-300:]}")


@contextlib.contextmanager
def _listener() -> Iterator[socket.socket]:
    """Listen on the machine's own address, as something that jobs without network can't reach."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener


async def _wait_until_offered(world: World) -> None:
    """Skip the world if the agent says that the machine can't give the isolation."""
    async with asyncio.timeout(120):
        while refused := await _not_offered(world):
            if not any("not yet said" in reason for reason in refused):
                pytest.skip(f"not to be had on this machine: {refused}")
            await asyncio.sleep(POLL_SECONDS)


async def _not_offered(world: World) -> list[str]:
    answer = (await curl(f"{world.server.url}/agents")).json()
    (agent,) = answer["agents"]
    return [problem["reason"] for problem in agent["isolation"]["not_offered"]]


async def _find_targets(world: World) -> None:
    """Start the job to be spied on, and find all that there is to attack."""
    victim = await world.server.upload(f"echo '{_SECRET}' > secret\nexec sleep {_SLEEP}")
    await world.server.wait(victim, "Running", seconds=60)
    sleeping = await _process_of(_SLEEP)
    (attempt,) = [path for path in (world.agent.workdir / "attempts").iterdir() if path.is_dir()]
    await eventually((attempt / "job" / "secret").exists, "the secret is there")
    supervisor = int(os.readlink(attempt / "process").split()[0])
    assert world.agent.process is not None
    world.targets.update(
        VICTIM=str(attempt),
        VICTIM_PID=str(sleeping),
        SUPERVISOR=str(supervisor),
        AGENT=str(world.agent.process.pid),
        SERVER=str(world.server.pid),
        FORK_SERVER=str(_fork_server(world.agent.process.pid)),
        WORKDIR=str(world.agent.workdir),
        DATABASE=str(world.server.database),
        TOKEN=str(world.directory / "token"),
        HOMEDIR=str(world.home),
        OUTSIDE=str(world.outside),
        MARK=_MARK,
        ABSTRACT=f"isolation-{os.getpid()}",
        PORT=str(world.listener.getsockname()[1]),
    )


async def _process_of(argument: str) -> int:
    found: list[int] = []

    def look() -> bool:
        found[:] = _processes_of(argument)
        return bool(found)

    await eventually(look, f"sleep {argument} runs", seconds=60)
    return found[-1]


def _processes_of(argument: str) -> list[int]:
    found: list[int] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[-2:] == ["sleep", argument]:
                found.append(process.pid)
    return found


def _fork_server(agent: int) -> int:
    for child in psutil.Process(agent).children(recursive=True):
        if "agent.supervision.forkserver" in child.cmdline():
            return child.pid
    raise AssertionError("no fork server")


def _remove(directory: Path) -> None:
    """Remove a world, in which podman's storage may have mounts, and modes that forbid it."""
    mounts = [line.split(" ")[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted(mounts, reverse=True):
        if Path(mount).is_relative_to(directory):
            subprocess.run(["umount", "--lazy", mount], check=False)
    subprocess.run(["chmod", "-R", "u+rwX", str(directory)], check=False, capture_output=True)
    shutil.rmtree(directory, ignore_errors=True)


# --- what they try ----------------------------------------------------------------


async def _printed(world: World, script: str, service: str = "example") -> list[str]:
    job = await world.server.upload(script, service=service)
    await world.server.wait(job, "Completed", "Failed", seconds=120)
    archive = world.server.stored_result(job)
    lines = archive.read("stdout.log").decode().splitlines()
    assert lines[-1:] == ["end"], (lines[-3:], archive.read("stderr.log")[-500:])
    return lines[:-1]


async def test_no_way_leads_out(world: World) -> None:
    abstract = socket.socket(socket.AF_UNIX)
    with abstract:
        abstract.bind("\0" + world.targets["ABSTRACT"])
        abstract.listen(8)
        ways = {**escapes.SHELL, **escapes.HARMLESS}
        lines = await _printed(world, escapes.script(world.targets, world.python, ways))
    out = {line.removeprefix("out: ") for line in lines if line.startswith("out: ")}
    tried = {line.partition(": ")[2] for line in lines}
    expected = {*ways, *(escapes.PYTHON if world.python else ())}
    assert tried == expected
    if world.kind == "none":
        # they are ways: nothing of this would hold by itself
        assert out == expected - set(escapes.HARMLESS)
    else:
        assert out == set()
        assert not (Path(world.targets["VICTIM"]) / "job" / "planted").exists()
        assert not (world.outside / "planted").exists()


async def test_the_network_can_be_taken_away(world: World) -> None:
    if world.kind == "podman":
        script = (
            f"nc -w 3 127.0.0.1 {world.targets['PORT']} < /dev/null && echo 'out: connect'\n"
            "ip address | grep -q 'scope global' && echo 'out: address'\necho end\n"
        )
        assert await _printed(world, script, "offline") == []
        return
    if world.python is None:
        pytest.skip("there is no Python outside of homes, which jobs could run")
    script = escapes.network_script(world.targets, world.python)
    held = {f"held: {way}" for way in escapes.WITHOUT_NETWORK}
    if world.kind == "none":
        held = {"held: connect by IPv6"}  # where nobody listens
    elif world.kind == "bubblewrap":
        # a network of its own, in which it may do what it likes
        held -= {"held: listen", "held: send a datagram"}
    printed = set(await _printed(world, script, "offline"))
    assert {line for line in printed if line.startswith("held")} == held
    with_network = set(await _printed(world, script))
    assert "out: connect to this machine" in with_network


async def test_a_job_can_not_forge_its_result(world: World) -> None:
    if world.kind == "none":
        pytest.skip("without an isolation it can")
    lines = ['OWN=$(dirname "$ORCHESTRATOR_JOB_DIRECTORY")']
    for name in ("exit", "exit.new", "finished.json", "attempt.json", "process", "kill"):
        lines.append(f"""echo '{{"kind": "exited", "code": 0}}' > "$OWN/{name}" """)
        lines.append(f"""rm -f "$OWN/{name}"; ln -s /dev/null "$OWN/{name}" """)
    job = await world.server.upload("\n".join([*lines, "echo real; exit 3"]))
    status = await world.server.wait(job, "Completed", "Failed", seconds=60)
    assert (status["status"], status["message"]) == ("Failed", "run.sh ended with exit code 3")
    assert world.server.stored_result(job).read("stdout.log") == b"real\n"


async def test_a_job_has_what_it_needs(world: World) -> None:
    script = """
    set -e
    echo own > file; mkdir -p a/b; echo x > a/b/c; mv a/b/c a/c; ln file link; ln -s file symlink
    echo temporary > "${TMPDIR:-.}/tmpfile"; cat "${TMPDIR:-.}/tmpfile"
    cat < /dev/null; head -c 4 /dev/urandom > random; echo gone > /dev/null
    cat file | (read -r word; echo "$word")
    [ "$(pwd)" = "$ORCHESTRATOR_JOB_DIRECTORY" ]
    echo said > /dev/stderr
    exit 0
    """
    job = await world.server.upload(script)
    status = await world.server.wait(job, "Completed", "Failed", seconds=60)
    archive = world.server.stored_result(job)
    assert status["status"] == "Completed", archive.read("stderr.log")
    assert archive.read("stdout.log") == b"temporary\nown\n"
    assert {"file", "a/c", "link", "symlink"} <= set(archive.namelist())
    if world.kind in ("landlock", "none"):
        assert archive.read("stderr.log") == b"said\n"


async def test_setuid_programs_give_nothing(world: World) -> None:
    if not IS_ROOT:
        pytest.skip("only root can make a setuid program")
    if world.kind == "none":
        pytest.skip("without an isolation they do")
    program = world.directory / "shared" / "whoami"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    lines = await _printed(world, f"{program} -u; id -u\necho end")
    assert "0" not in lines or world.kind == "podman"  # where 0 is the user outside
    program.unlink()


async def test_nothing_of_a_job_survives_it(world: World) -> None:
    script = f"""
    sleep {_LEFT_BEHIND} &
    setsid sleep {_LEFT_BEHIND} &
    (setsid sh -c 'trap "" TERM HUP; sleep {_LEFT_BEHIND} & wait' &)
    env -i PATH="$PATH" setsid sleep {_LEFT_BEHIND} > /dev/null 2>&1 < /dev/null &
    (env -i PATH="$PATH" nohup sleep {_LEFT_BEHIND} > /dev/null 2>&1 &)
    echo end
    """
    await _printed(world, script)
    assert _processes_of(_LEFT_BEHIND) == []


async def test_a_killed_supervisor_leaves_nothing(world: World) -> None:
    job = await world.server.upload(f"sleep {_LEFT_BEHIND} & sleep {_LEFT_BEHIND}")
    await _process_of(_LEFT_BEHIND)
    supervisors = [
        int(os.readlink(path / "process").split()[0])
        for path in (world.agent.workdir / "attempts").iterdir()
        if os.path.lexists(path / "process") and str(path) != world.targets["VICTIM"]
    ]
    for supervisor in supervisors:
        psutil.Process(supervisor).kill()
    assert supervisors
    await eventually(lambda: "event=attempt_lost" in world.server.log(), "it is lost", seconds=60)
    await curl("-X", "POST", f"{world.server.url}/terminate/{job}")
    await eventually(lambda: not _processes_of(_LEFT_BEHIND), "all of it is gone", seconds=60)


async def test_links_that_come_and_go_lead_no_archive_out(world: World) -> None:
    key = world.home / ".ssh" / "id_ed25519"
    mode = key.stat().st_mode
    script = f"""
    n=0
    echo begun > begun
    while [ ! -e stop ] && [ $n -lt 20000 ]; do
        n=$((n + 1))
        ln -s {key.parent} x; rm x; mkdir x; echo own > x/id_ed25519; chmod 0 x/id_ed25519; rm -rf x
        echo own > y; chmod 0 y; rm -f y; ln -s {key} y; rm y
    done
    """
    job = await world.server.upload(script)
    await world.server.wait(job, "Running", seconds=60)
    seen = 0
    for _ in range(12):
        answer = await curl(f"{world.server.url}/download_partial/{job}")
        if answer.status != 200:
            continue
        seen += 1
        with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
            contents = [archive.read(info) for info in archive.infolist() if not _is_link(info)]
        assert not any(_KEY.encode() in content for content in contents)
    await curl("-X", "POST", f"{world.server.url}/terminate/{job}")
    assert seen > 0
    assert key.stat().st_mode == mode


def _is_link(info: zipfile.ZipInfo) -> bool:
    return stat.S_ISLNK(info.external_attr >> 16)


async def test_two_jobs_run_as_two_users(world: World) -> None:
    if world.user != "job-user" or world.kind == "podman":
        pytest.skip("one user for all jobs")
    owner = (Path(world.targets["VICTIM"]) / "job").stat().st_uid
    (other,) = await _printed(world, "id -u\necho end")
    assert int(other) != owner
    assert {int(other), owner} <= set(range(escapes.UID + 1, escapes.UID + 21))
    assert psutil.Process(int(world.targets["VICTIM_PID"])).uids().real == owner


@pytest.mark.skipif(ruleset.abi() == 0, reason="the kernel has no Landlock, the default")
async def test_on_a_workstation_with_the_defaults_users_see_nothing_of_each_other() -> None:
    directory = Path(tempfile.mkdtemp(prefix="isolation-", dir="/var/lib" if IS_ROOT else None))
    settings = directory / "settings.toml"
    settings.write_text("# a token could be in here\n")
    defaults = {"ISOLATION": "auto"}
    try:
        async with running_server(
            directory / "server", "--slots", "2", "--config", str(settings), environment=defaults
        ) as server:
            script = f"""
            echo {_SECRET} > secret; echo "$ORCHESTRATOR_JOB_DIRECTORY"
            while [ ! -e done ]; do sleep 0.1; done
            """
            anna = await server.upload(script, user=1)
            await server.wait(anna, "Running")
            (attempt,) = (server.directory / "orchestrator.db.agent" / "attempts").iterdir()
            await eventually((attempt / "job" / "secret").exists, "the secret is there")
            spied = [attempt / "job" / "secret", attempt / "attempt.json", settings]
            spied += [server.database, Path(f"{server.database}-wal")]
            tries = "\n".join(f"cat {path} > /dev/null 2>&1 && echo {path}" for path in spied)
            boris = await server.upload(f"{tries}\nls {attempt.parent}\necho end", user=2)
            printed = (await server.result(boris)).read("stdout.log")
            (attempt / "job" / "done").touch()
            await server.result(anna)
    finally:
        _remove(directory)
    assert printed == b"end\n"
