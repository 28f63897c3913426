"""What an agent makes of what it is asked for: kept, or refused in a sentence."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import sys
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest

import config
from agent.isolation import job_user, reach, ruleset, wrapper
from agent.isolation.base import Allotment, CannotIsolate, Confinement, Place
from agent.isolation.choice import IsolationSettings, Isolator
from config import ConfigError
from jobs import Isolation, IsolationKind
from tests.harness import PROJECT, Server, curl, eventually, run, running_server

IS_ROOT = os.geteuid() == 0


# --- what is hidden ---------------------------------------------------------------


def _shown(top: Path, found: Iterable[tuple[str, int]]) -> set[str]:
    below = {path for path, kind in found if path.startswith(f"{top}/") and kind != stat.S_IFLNK}
    return {path.removeprefix(f"{top}/") for path in below}


def test_everything_but_what_is_hidden_is_shown_and_no_dotted_name_of_a_home(
    tmp_path: Path,
) -> None:
    for name in ("work/attempts", "data", "home/.ssh", "home/.local/bin", "home/.local/share"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "home" / "environment").mkdir()
    (tmp_path / "data.db").touch()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    hidden = [str(tmp_path / name) for name in ("work", "data.db", "data.db-wal")]
    found = ruleset.everything_but(hidden, [str(tmp_path / "home")], [".local/bin"])
    assert _shown(tmp_path, found) == {"data", "home/environment", "home/.local/bin"}


def test_a_home_is_shown_in_a_place_that_is_hidden(tmp_path: Path) -> None:
    for name in ("homes/anna/tools", "homes/anna/.ssh", "homes/boris/tools"):
        (tmp_path / name).mkdir(parents=True)
    homes = [str(tmp_path / "homes" / "anna")]
    found = ruleset.everything_but([str(tmp_path / "homes")], homes, [])
    assert _shown(tmp_path, found) == {"homes/anna/tools"}


def test_what_comes_to_a_directory_that_was_listed_is_seen_by_the_next_job(tmp_path: Path) -> None:
    standing = ruleset._Standing()
    names = ("hidden", "homes", "software", "readable", "shared_memory", "devices")
    policy: dict[str, list[str]] = {name: [] for name in names}
    policy["hidden"] = [str(tmp_path / "secret")]
    asked = json.dumps(policy)
    (tmp_path / "before").mkdir()

    def shown() -> set[str]:
        opened = (ruleset._PATH_BENEATH.unpack(rule)[1] for rule in standing.rules(asked))
        paths = (os.readlink(f"/proc/self/fd/{number}") for number in opened)
        return {Path(path).name for path in paths if Path(path).parent == tmp_path}

    assert shown() == {"before"}
    # Kept while nothing changes; others may work in /tmp, so that needs a quiet moment.
    assert any(standing.rules(asked) is standing.rules(asked) for _ in range(10_000))
    (tmp_path / "after").mkdir()
    (tmp_path / "secret").mkdir()
    assert shown() == {"before", "after"}


def test_the_same_place_under_another_name_is_hidden_as_well() -> None:
    mounts = [
        reach._Mount("8:1", "/", "/"),
        reach._Mount("8:2", "/", "/data"),
        reach._Mount("8:2", "/agent", "/srv/jobs"),
        reach._Mount("8:2", "/agent/attempts/7", "/mnt/seven"),
        reach._Mount("8:2", "/other", "/mnt/other"),
    ]
    assert reach._with_aliases(["/data/agent"], mounts) == [
        "/data/agent",
        "/srv/jobs",
        "/mnt/seven",
    ]


def test_a_work_directory_that_can_not_be_hidden_is_refused() -> None:
    for place in ("/usr", "/", "/dev/shm/work"):
        with pytest.raises(CannotIsolate, match="--workdir"):
            reach.survey(Path(place), [], None)


def test_nothing_that_shows_the_work_directory_is_granted(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    found = reach.survey(tmp_path / "work", [], None)
    for path in (tmp_path, tmp_path / "work", tmp_path / "work" / "attempts"):
        path.mkdir(exist_ok=True)
        problem = found.problem_with(Isolation(readable=(str(path),)))
        assert problem is not None
        assert "would show" in problem
    missing = found.problem_with(Isolation(writable=(str(tmp_path / "missing"),)))
    assert missing == f"{tmp_path}/missing, which its jobs are to find writable, is not there"


# --- what settings may say --------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ISOLATION": "none", "IMAGE": "x"}, 'image needs isolation = "podman", not "none"'),
        ({"ISOLATION": "podman"}, "needs an image"),
        ({"ISOLATION": "wrapper"}, "needs a wrapper"),
        ({"WRAPPER": "apptainer exec"}, 'wrapper needs isolation = "wrapper"'),
        ({"ISOLATION": "none", "NETWORK": "false"}, "network = false can't be given"),
        ({"ISOLATION": "none", "READABLE": "/data"}, "mean nothing"),
        ({"READABLE": "data"}, "must be absolute"),
        ({"ISOLATION": "jail"}, "must be one of"),
        ({"NETWORK": "maybe"}, "must be true or false"),
        ({"ISOLATION": "wrapper", "WRAPPER": "a 'b"}, "is no command line"),
    ],
)
def test_contradictory_settings_are_refused_at_the_start(
    settings: dict[str, str], message: str
) -> None:
    environment = {f"SERVICE_DOCKING_{name}": value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        config.load(environment, {})


def test_settings_of_a_service_become_what_its_jobs_may_reach() -> None:
    environment = {
        "SERVICE_DOCKING_ISOLATION": "wrapper",
        "SERVICE_DOCKING_WRAPPER": "apptainer exec --pwd {directory} 'my image.sif'",
        "SERVICE_FOLD_NETWORK": "false",
        "SERVICE_FOLD_READABLE": "/data, /scratch",
    }
    services = config.load(environment, {}).services
    assert services["docking"].asked_isolation() == Isolation(
        IsolationKind.WRAPPER,
        wrapper=("apptainer", "exec", "--pwd", "{directory}", "my image.sif"),
    )
    assert services["fold"].asked_isolation() == Isolation(
        network=False, readable=("/data", "/scratch")
    )
    assert not services["example"].asked_isolation().needs_asking()


def test_a_wrapper_gets_what_the_job_has() -> None:
    words = ("run", "--bind={directory}", "{cpus}", "{memory}", "{gpus}", "{other}")
    confinement = Confinement(
        Isolation(IsolationKind.WRAPPER, wrapper=words),
        Place(Path("/srv/attempts/7")),
        allotment=Allotment(4, 2**30, (0, 2)),
    )
    assert wrapper.enclose(confinement).argv == (
        *("run", "--bind=/srv/attempts/7/job", "4", "1073741824", "0,2", "{other}"),
        *("bash", "run.sh"),
    )


# --- whom jobs run as -------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("root", "is root"),
        ("nobody-of-that-name", "there is no such user"),
        ("0-100", "goes from a smaller one, not 0, up"),
        ("61000-60000", "goes from a smaller one"),
        ("61000-61003", "4 jobs at a time need more user ids"),
        ("1-60000", "is the user"),
    ],
)
def test_job_users_that_can_not_be_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_user.parsed(text, slots=4)


def test_each_job_has_a_user_of_its_own_until_it_is_gone() -> None:
    users = job_user.parsed("61000-61002", slots=2)
    assert [users.free(taken).uid for taken in ((), (61000,), (61000, 61001))] == [
        *(61000, 61001, 61002),
    ]


def test_no_two_jobs_share_a_user() -> None:
    users = job_user.parsed("61000-61002", slots=2)
    with pytest.raises(CannotIsolate, match="have all user ids of 61000-61002"):
        users.free((61000, 61001, 61002))


def test_what_an_agent_is_told_by_name_it_gives_or_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = IsolationSettings(IsolationKind.BUBBLEWRAP, are_root_jobs_allowed=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(CannotIsolate, match=r"--isolation bubblewrap: bwrap is not installed"):
        Isolator(tmp_path, settings, {}).try_out()


async def test_an_agent_says_at_its_start_what_it_can_not_do(tmp_path: Path) -> None:
    program = ("agent", "--server", "http://127.0.0.1:1", "--workdir")
    for arguments, message in (
        (("/dev/shm/orchestrator-work",), "choose another place with --workdir"),
        ((str(tmp_path), "--job-user", "nobody-of-that-name"), "--job-user"),
    ):
        code, output = await _run_program(*program, *arguments)
        assert code == 2, output
        assert message in output
        assert "Traceback" not in output
    assert not IS_ROOT or "there is no such user" in output


async def _run_program(*arguments: str) -> tuple[int, str]:
    code, output = await run(sys.executable, str(PROJECT / "orchestrator.py"), *arguments)
    return code, output.decode()


@pytest.mark.skipif(not IS_ROOT, reason="only jobs of root are refused")
def test_no_isolation_is_promised_for_jobs_that_run_as_root(tmp_path: Path) -> None:
    named = Isolation(IsolationKind.LANDLOCK)
    environment = {"PATH": os.environ["PATH"]}
    isolator = Isolator(tmp_path, IsolationSettings(), environment)
    isolator.try_out()
    problem = isolator.problem_with(named)
    assert problem is not None
    assert "--job-user" in problem
    assert isolator.problem_with(Isolation()) is None
    notes = [note for offer in isolator.offers() for note in offer.notes if offer.is_given]
    assert any("jobs run as root" in note for note in notes) or not notes
    accepted = Isolator(tmp_path, IsolationSettings(are_root_jobs_allowed=True), environment)
    accepted.try_out()
    assert accepted.problem_with(named) is None or ruleset.abi() == 0


# --- what the server makes of it --------------------------------------------------


@pytest.fixture
async def asking_server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server with services that ask for what this machine has, and has not."""
    environment = {
        "ALLOW_ROOT_JOBS": "true",
        "SERVICE_WRAPPED_ISOLATION": "wrapper",
        "SERVICE_WRAPPED_WRAPPER": "env WRAPPED={directory}",
        "SERVICE_MISSING_ISOLATION": "wrapper",
        "SERVICE_MISSING_WRAPPER": "no-such-wrapper",
        "SERVICE_OFFLINE_NETWORK": "false",
    }
    async with running_server(tmp_path / "server", "--slots", "2", environment=environment) as made:
        yield made


async def test_a_service_that_no_agent_can_isolate_waits_and_says_why(
    asking_server: Server,
) -> None:
    server = asking_server
    wrapped = await server.upload('echo "$WRAPPED"', service="wrapped")
    missing = await server.upload("echo never", service="missing")
    offline = await server.upload("echo never", service="offline")
    archive = await server.result(wrapped)
    assert archive.read("stdout.log").decode().strip().endswith("/job")
    for job, reason in (
        (missing, "the wrapper no-such-wrapper is not installed"),
        (offline, "without an isolation the network stays open"),  # the agent has none
    ):
        status = (await curl(f"{server.url}/jobs/{job}")).json()
        assert status["status"] == "Queued"
        assert reason in status["queue"]["reason"]
    (agent,) = (await curl(f"{server.url}/agents")).json()["agents"]
    assert {entry["service"] for entry in agent["isolation"]["not_offered"]} == {
        "missing",
        "offline",
    }


async def test_a_reload_that_asks_for_less_lets_the_job_go(tmp_path: Path) -> None:
    settings = tmp_path / "settings.toml"
    settings.write_text('[services.picky]\nisolation = "wrapper"\nwrapper = "no-such-wrapper"\n')
    async with running_server(tmp_path / "server", "--config", str(settings)) as server:
        job = await server.upload("echo ran", service="picky")
        await eventually(lambda: "service_not_offered" in server.log(), "the agent has said so")
        settings.write_text("[services.picky]\nmax_runs = 3\n")
        os.kill(server.pid, 1)
        archive = await server.result(job)
        assert archive.read("stdout.log") == b"ran\n"


async def test_what_is_no_longer_there_to_isolate_jobs_costs_its_service_alone(
    tmp_path: Path,
) -> None:
    wrapper_program = tmp_path / "wrap"
    wrapper_program.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper_program.chmod(0o755)
    environment = {
        "ALLOW_ROOT_JOBS": "true",
        "SERVICE_WRAPPED_ISOLATION": "wrapper",
        "SERVICE_WRAPPED_WRAPPER": str(wrapper_program),
    }
    async with running_server(tmp_path / "server", environment=environment) as server:
        await server.result(await server.upload("true", service="wrapped"))
        wrapper_program.unlink()
        waiting = await server.upload("true", service="wrapped")
        deadline = asyncio.get_running_loop().time() + 60
        while True:
            (agent,) = (await curl(f"{server.url}/agents")).json()["agents"]
            if agent["services_set_aside"]:
                break
            assert asyncio.get_running_loop().time() < deadline, agent
            await asyncio.sleep(0.1)
        (aside,) = agent["services_set_aside"]
        assert (aside["service"], agent["set_aside"]) == ("wrapped", None)
        assert "can't be isolated as its service asks" in aside["reason"]
        await server.result(await server.upload("true"))
        assert (await server.status(waiting))["status"] in ("Queued", "Processing")
