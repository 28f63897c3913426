"""The whole path: curl, server process, agent process, bash jobs, ZIP."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import socket
import stat
import sys
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.harness import (
    PROJECT,
    AgentProcess,
    Server,
    curl,
    eventually,
    lines,
    run,
    running_server,
)

CONTRACT_UPLOAD = r"""
curl -X POST http://localhost:5000/upload \
-F "file=@run.sh" \
-F "file=@input.pdb" \
-F "user_id=1" \
-F "service=example"
"""

CONTRACT_POLLING = r"""
while true; do
response=$(curl -s http://localhost:5000/download/1)
status=$(echo "$response" | jq -r '.status // empty')
if [ -z "$status" ]; then
# No JSON status field means we got the ZIP
curl -o results.zip http://localhost:5000/download/1
break
elif [ "$status" = "Completed" ]; then
curl -o results.zip http://localhost:5000/download/1
break
else
echo "Status: $status"
sleep 5
fi
done
"""


async def test_the_commands_of_the_contract_work_literally(server: Server, tmp_path: Path) -> None:
    base = server.url.replace("127.0.0.1", "localhost")
    (tmp_path / "run.sh").write_text("wc -l < input.pdb > count.txt; echo out; echo err >&2\n")
    pdb = PROJECT / "examples" / "2oob_A.pdb"
    (tmp_path / "input.pdb").write_bytes(pdb.read_bytes())
    upload = CONTRACT_UPLOAD.replace("http://localhost:5000", base)
    code, output = await run("bash", "-c", upload, cwd=tmp_path)
    assert code == 0
    assert b'{"id": 1, "status": "Queued", "message": "Job successfully uploaded"}' in output
    polling = CONTRACT_POLLING.replace("http://localhost:5000", base)
    code, output = await asyncio.wait_for(run("bash", "-c", polling, cwd=tmp_path), 60)
    assert code == 0, output
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        assert archive.read("count.txt").split() == [b"351"]
        assert archive.read("input.pdb") == pdb.read_bytes()
        assert archive.read("stdout.log") == b"out\n"
        assert archive.read("stderr.log") == b"err\n"
    assert server.transitions(1) == ["Queued", "Processing", "Submitted", "Running", "Completed"]


async def test_a_download_is_a_whole_zip_with_safe_headers(server: Server) -> None:
    job_id = await server.upload("echo done")
    archive = await server.result(job_id)
    head = (await curl("-I", f"{server.url}/download/{job_id}")).body.decode().lower()
    assert "content-type: application/zip" in head
    assert f'content-disposition: attachment; filename="job-{job_id}.zip"' in head
    assert "x-content-type-options: nosniff" in head
    assert archive.fp is not None
    assert f"content-length: {archive.fp.seek(0, 2)}" in head


FAILURES = {
    "exit 7": "exit code 7",
    "kill -SEGV $$": "signal 11",
    "no-such-command": "exit code 127",
    "if then": "exit code 2",
}


async def test_a_quick_job_takes_few_transactions(server: Server) -> None:
    async def commits() -> list[float]:
        metrics = (await curl(f"{server.url}/metrics")).body
        return [
            float(number)
            for number in re.findall(
                rb"orchestrator_commit_operations_(?:sum|count) (\S+)", metrics
            )
        ]

    costs = []
    for _ in range(4):
        before = await commits()
        job_id = await server.upload("echo hello")
        assert (await curl(f"{server.url}/download/{job_id}?wait=30")).body.startswith(b"PK")
        after = await commits()
        costs.append([after[0] - before[0], after[1] - before[1]])
    # One for upload and attempt, and one for all the rest, if that takes no longer than what the
    # agent says may wait; a machine that is busy may be so slow that each is one for itself.
    operations, transactions = min(costs)
    assert operations <= 5
    assert transactions == operations - 1
    histories = [server.transitions(job_id) for job_id in range(1, 5)]
    assert histories == [["Queued", "Processing", "Submitted", "Running", "Completed"]] * 4


async def test_an_upload_that_makes_no_job_takes_no_slot_for_it(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "run.sh").write_text("true\n")
    form = ("-F", "file=@run.sh", "-F", "user_id=1", "-F", "service=example")
    upload = ("-H", "Idempotency-Key: one", *form, f"{server.url}/upload")
    answers = [await curl(*upload, cwd=tmp_path) for _ in range(6)]  # of four slots
    assert {answer.json()["id"] for answer in answers} == {1}
    jobs = [await server.upload("echo hello") for _ in range(4)]
    for job_id in (1, *jobs):
        await server.wait(job_id, "Completed")
        assert server.transitions(job_id).count("Processing") == 1
    agents = (await curl(f"{server.url}/agents")).json()["agents"]
    assert [(agent["slots"], agent["busy"]) for agent in agents] == [(4, 0)]


async def test_a_failing_job_says_why(server: Server) -> None:
    jobs = {script: await server.upload(script) for script in FAILURES}
    for script, job_id in jobs.items():
        status = await server.wait(job_id)
        assert status["status"] == "Failed"
        assert FAILURES[script] in status["message"]


async def test_a_job_gets_its_directory_and_environment_and_no_secret(tmp_path: Path) -> None:
    token = "a-secret-token-of-the-agents"
    environment = {"ORCHESTRATOR_AGENT_TOKEN": token, "OTHER_SECRET": "password"}
    script = """
    env > env.txt; pwd > pwd.txt; cat > stdin.txt; ls -A > ls.txt
    cat /proc/*/environ /proc/*/cmdline > everything.txt 2> /dev/null; true
    """
    async with running_server(tmp_path / "server", environment=environment) as server:
        archive = await server.result(await server.upload(script, {"two words.txt": b"x"}, user=42))
        variables = archive.read("env.txt").decode()
        for expected in ("JOB_ID=1", "ATTEMPT=1", "USER_ID=42", "SERVICE=example"):
            assert f"ORCHESTRATOR_{expected}\n" in variables
        assert token not in variables
        assert "password" not in variables
        assert archive.read("stdin.txt") == b""
        assert b"two words.txt\n" in archive.read("ls.txt")
        agent_pid = await server.agent_pid()
        agent_environment = Path(f"/proc/{agent_pid}/environ").read_bytes()
        assert token.encode() not in agent_environment


async def test_a_token_in_an_agents_environment_is_not_left_there(
    bare_server: Server, new_agent: Callable[[str], AgentProcess]
) -> None:
    _, token = await run(
        sys.executable,
        str(PROJECT / "orchestrator.py"),
        *("agent-token", "--db", str(bare_server.database)),
    )
    agent = new_agent("env")
    await agent.start(environment={"ORCHESTRATOR_AGENT_TOKEN": token.decode().strip()})
    await agent.wait_connected()
    assert agent.process is not None
    assert token.strip() not in Path(f"/proc/{agent.process.pid}/environ").read_bytes()


async def test_the_result_keeps_trees_modes_times_and_links_and_skips_the_rest(
    server: Server,
) -> None:
    script = """
    mkdir -p deep/er empty; echo text > deep/er/file; chmod 750 deep/er/file
    touch -d '2001-02-03 04:05:06 UTC' old; ln -s /etc/shadow link; mkfifo fifo
    chmod 000 old; head -c 300000 /dev/zero > zeros; printf x > "$(printf 'raw\\377')"
    echo own > stdout.log; echo captured
    """
    archive = await server.result(await server.upload(script))
    names = set(archive.namelist())
    assert {"deep/", "deep/er/", "deep/er/file", "empty/", "old", "link", "zeros"} <= names
    assert "raw\\xff" in names
    assert "fifo" not in names
    mode = archive.getinfo("deep/er/file").external_attr >> 16
    assert (stat.S_ISREG(mode), stat.S_IMODE(mode)) == (True, 0o750)
    assert stat.S_ISLNK(archive.getinfo("link").external_attr >> 16)
    assert archive.read("link") == b"/etc/shadow"
    assert int.from_bytes(archive.getinfo("old").extra[5:9], "little") == 981173106
    assert archive.getinfo("zeros").compress_size < 3000
    assert archive.read("stdout.log") == b"own\n"
    assert archive.read("orchestrator-stdout.log") == b"captured\n"


async def test_nothing_of_a_job_survives_its_end(tmp_path: Path) -> None:
    script = f"""
    sleep 1001 &
    setsid sleep 1002 &
    (setsid nohup sleep 1003 > /dev/null 2>&1 &) &
    (trap '' TERM; sleep 1004; sleep 1005) &
    echo $(jobs -p) > {tmp_path}/started
    """
    async with running_server(tmp_path / "server", environment={"KILL_GRACE": "0.5"}) as server:
        job_id = await server.upload(script)
        await server.wait(job_id, "Completed")
        assert lines(tmp_path / "started")
        left = [p for p in server.processes() if "sleep" in p.name() or "bash" in p.name()]
        assert left == []
        attempts = server.directory / "orchestrator.db.agent" / "attempts"
        await eventually(lambda: os.listdir(attempts) == [], "the attempt's directory is removed")


async def test_a_time_limit_ends_the_whole_tree(tmp_path: Path) -> None:
    environment = {"SERVICE_EXAMPLE_TIMEOUT": "1", "KILL_GRACE": "0.2"}
    async with running_server(tmp_path / "server", environment=environment) as server:
        job_id = await server.upload("trap '' TERM; setsid sleep 1000 & echo begun; sleep 1000")
        status = await server.wait(job_id)
        assert (status["status"], status["message"]) == ("Failed", "timed out after 1 s")
        assert not [p for p in server.processes() if "sleep" in p.name()]


def _overlaps(server: Server, job_filter: str) -> Iterator[int]:
    """Yield how many jobs were active after each transition, from the history."""
    active: set[int] = set()
    for job_id, state in server.query(
        "SELECT job_id, to_state FROM history JOIN job ON job.id = job_id"
        f" WHERE {job_filter} ORDER BY history.id"
    ):
        if state in ("Processing", "Submitted", "Running"):
            active.add(job_id)
        else:
            active.discard(job_id)
        yield len(active)


async def test_a_thousand_jobs_complete_within_the_quotas_and_users_take_turns(
    tmp_path: Path,
) -> None:
    jobs, users, clients = 1000, 7, 16
    environment = {"SERVICE_EXAMPLE_RUNS_PER_USER": "2", "SERVICE_EXAMPLE_MAX_RUNS": "5"}
    async with running_server(
        tmp_path / "server", "--slots", "8", environment=environment
    ) as server:
        todo = list(range(jobs))
        uploaded: dict[int, int] = {}
        async with aiohttp.ClientSession(server.url) as session:

            async def client() -> None:
                while todo:
                    number = todo.pop()
                    form = aiohttp.FormData()
                    script = f"echo result-{number} > result.txt\n"
                    form.add_field("file", script, filename="run.sh")
                    form.add_field("user_id", str(number % users))
                    form.add_field("service", "example")
                    async with session.post("/upload", data=form) as response:
                        assert response.status == 201
                        uploaded[(await response.json())["id"]] = number

            await asyncio.gather(*(client() for _ in range(clients)))
            sql = "SELECT count(*) FROM job WHERE state = 'Completed'"
            await eventually(lambda: server.query(sql) == [(jobs,)], "all complete", seconds=150)
            for job_id, number in uploaded.items():
                async with session.get(f"/download/{job_id}") as response:
                    archive = zipfile.ZipFile(io.BytesIO(await response.read()))
                    assert archive.read("result.txt") == f"result-{number}\n".encode()
        assert max(_overlaps(server, "1")) == 5
        assert max(max(_overlaps(server, f"user_id = {user}")) for user in range(users)) <= 2
        assert server.query("SELECT max(attempts) FROM job") == [(1,)]
        _assert_turns(server, users)


def _assert_turns(server: Server, users: int) -> None:
    """While all users had jobs waiting, none was passed over for long."""
    order = [
        user
        for (user,) in server.query(
            "SELECT user_id FROM history JOIN job ON job.id = job_id"
            " WHERE to_state = 'Processing' ORDER BY history.id"
        )
    ]
    middle = order[100:-100]
    for user in range(users):
        turns = [index for index, other in enumerate(middle) if other == user]
        gaps = [after - before for before, after in pairwise(turns)]
        # users are held up by their own quota at times, which shifts the turns a little
        assert max(gaps) <= 3 * users


async def test_retention_cleans_and_the_download_says_so(tmp_path: Path) -> None:
    async with running_server(tmp_path / "server", environment={"MAX_AGE": "1"}) as server:
        job_id = await server.upload("head -c 5000000 /dev/urandom > out.bin")
        await server.result(job_id)
        cleaned = "SELECT count(*) FROM job WHERE state = 'Cleaned'"
        await eventually(lambda: server.query(cleaned) == [(1,)], "the job is cleaned")
        assert (await server.status(job_id))["status"] == "Cleaned"
        await eventually(
            lambda: server.query("SELECT count(*) FROM chunk") == [(0,)], "bytes are freed"
        )
        await eventually(lambda: server.database.stat().st_size < 1_000_000, "the file shrank")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_stop_is_clean_and_its_jobs_go_on_after_the_next_start(
    server: Server, tmp_path: Path, number: int
) -> None:
    witness, go = tmp_path / "witness", tmp_path / "go"
    os.mkfifo(go)
    running = await server.upload(f"echo start >> {witness}; read line < {go}; echo $line > out")
    await server.wait(running, "Running")
    await eventually(lambda: lines(witness) == ["start"], "the job is under way")
    agent_pid = await server.agent_pid()
    assert await server.stop(number) == 0
    assert not psutil.pid_exists(agent_pid)
    assert "Traceback" not in server.log()
    await server.start("--slots", "4")
    await asyncio.to_thread(go.write_text, "finished\n")
    archive = await server.result(running)
    assert archive.read("out") == b"finished\n"
    assert lines(witness) == ["start"], "the job was not started again"
    assert "Traceback" not in server.log()


async def test_idle_the_server_and_its_agent_use_next_to_no_time(server: Server) -> None:
    await server.result(await server.upload("true"))
    processes = [psutil.Process(server.pid), psutil.Process(await server.agent_pid())]

    def used() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in processes)

    before = used()
    switches = sum(p.num_ctx_switches().voluntary for p in processes)
    await asyncio.sleep(3)  # the span that is measured
    assert used() - before <= 0.1
    assert sum(p.num_ctx_switches().voluntary for p in processes) - switches < 60, "nothing polls"


async def test_the_demo_shows_a_real_result(tmp_path: Path) -> None:
    code, output = await run(sys.executable, str(PROJECT / "orchestrator.py"), "demo", cwd=tmp_path)
    assert code == 0, output
    text = output.decode()
    for expected in ("Completed", "orchestrator-demo.zip", "table.txt"):
        assert expected in text
    # 44 residues and 350 atoms are facts of the file; the rest follows from its coordinates
    row = next(line for line in text.splitlines() if line.startswith("2oob_A.pdb"))
    assert row.split()[1:3] == ["44", "350"]
    assert row.split()[6] == "9.77"
    assert (tmp_path / "orchestrator-demo.zip").exists()


async def test_the_example_counts_the_contacts_between_two_chains(server: Server) -> None:
    data = PROJECT.parent / "shared" / "data"
    if not data.exists():
        pytest.skip("the two chains are not beside the project")
    files = {path.name: path.read_bytes() for path in data.glob("*.pdb")}
    files["analyse.awk"] = (PROJECT / "examples" / "analyse.awk").read_bytes()
    script = (PROJECT / "examples" / "run.sh").read_text()
    table = (await server.result(await server.upload(script, files))).read("table.txt").decode()
    assert "contacts between 2oob_A.pdb and 2oob_B.pdb: 24" in table


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["serve"], ["--host", "--port", "--db", "--config", "--no-agent", "--slots"]),
        (["agent"], ["--server", "--name", "--slots", "--services", "--workdir", "--token-file"]),
    ],
)
async def test_help_and_version(command: list[str], words: list[str]) -> None:
    program = str(PROJECT / "orchestrator.py")
    code, text = await run(sys.executable, program, *command, "--help")
    assert code == 0
    assert all(word in text.decode() for word in words)
    of_server = [] if command == ["serve"] else command
    code, text = await run(sys.executable, program, *of_server, "--version")
    assert (code, text.decode().strip()) == (0, "0.1.0")


_TAKEN = "taken"  # stands for a port on which another program listens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], b"PORT"),
        (["--config", "/nowhere.toml"], b"/nowhere.toml"),
        (["--db", "/nowhere/x.db"], b"/nowhere/x.db"),
        (["--host", "192.0.2.1"], b"does not have that address; choose another with --host"),
        (["--port", _TAKEN], b"another program listens there; end it, or choose another with --p"),
    ],
)
async def test_a_server_that_can_not_start_says_why(
    tmp_path: Path, arguments: list[str], words: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = str(other.getsockname()[1])
        code, output = await run(
            *(sys.executable, str(PROJECT / "orchestrator.py"), "--no-agent"),
            *(taken if word == _TAKEN else word for word in arguments),
            cwd=tmp_path,
        )
    assert code == 2
    assert words in output
    assert b"Traceback" not in output


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "pipe", "backup", "copy.db"],
        ["--config", "pipe"],
        ["agent", "--server", "http://127.0.0.1:9", "--token-file", "pipe"],
    ],
)
async def test_a_command_that_is_interrupted_does_not_claim_success(
    tmp_path: Path, arguments: list[str]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROJECT / "orchestrator.py"), *arguments),
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
    )
    # once this returns, the command is waiting for what it reads there
    descriptor = await asyncio.to_thread(os.open, tmp_path / "pipe", os.O_WRONLY)
    process.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(process.communicate(), 60)
    os.close(descriptor)
    assert process.returncode == 130
    assert said.endswith(b": interrupted\n") and b"Traceback" not in said


@pytest.mark.parametrize("workdir", ["file", "file/below", "agent"])
async def test_an_agent_that_can_not_use_its_directory_says_why(
    tmp_path: Path, workdir: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "agent" / "agent-id").mkdir(parents=True)
    code, output = await run(
        *(sys.executable, str(PROJECT / "orchestrator.py"), "agent"),
        *("--server", "http://127.0.0.1:9"),
        *("--workdir", str(tmp_path / workdir)),
    )
    assert code == 2
    assert b"choose another place with --workdir" in output
    assert b"Traceback" not in output


async def test_a_server_that_has_nothing_to_do_is_small(bare_server: Server) -> None:
    assert psutil.Process(bare_server.pid).memory_info().rss < 80 * 1024 * 1024
