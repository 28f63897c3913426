"""The command line against a real server: every command through pipes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.client.program import Program
from tests.harness import Server, curl, run


def _write(directory: Path, **files: str) -> None:
    for name, text in files.items():
        (directory / name.replace("_", ".")).write_text(text)


async def test_a_new_user_gets_a_result_with_one_command(program: Program) -> None:
    _write(program.directory, input_txt="b\na\n")
    done = await program.run("run", "input.txt", "-o", "out", "--", "sort", "input.txt")
    assert (done.code, done.out) == (0, "a\nb\n"), done
    assert (program.directory / "out" / "stdout.log").read_text() == "a\nb\n"


async def test_submit_wait_logs_get(program: Program) -> None:
    _write(program.directory, run_sh="cat in.txt; echo oops >&2; echo 1 > table.txt", in_txt="x\n")
    (job_id,) = await program.ids("submit", "run.sh", "in.txt", "--name", "n", "--tag", "p:x")
    assert (await program.run("wait", str(job_id))).out == f"{job_id}\tCompleted\tn\t\n"
    assert (await program.run("logs", "last")).out == "x\n"
    assert (await program.run("logs", "@p:x", "--stderr")).out == "oops\n"
    assert (await program.run("get", "last")).code == 0
    assert (program.directory / f"job-{job_id}" / "table.txt").read_text() == "1\n"
    assert (await program.run("get", "last", "table.txt", "-o", "-")).out == "1\n"
    assert (await program.run("get", "last", "*.txt", "-o", "some")).code == 0
    assert {path.name for path in (program.directory / "some").iterdir()} == {"in.txt", "table.txt"}
    assert (await program.run("get", "last", "--zip")).code == 0
    assert (program.directory / f"job-{job_id}.zip").read_bytes().startswith(b"PK")


async def test_a_failing_job_explains_itself(program: Program) -> None:
    _write(program.directory, run_sh="echo almost; echo 'no such atom' >&2; exit 7\n")
    done = await program.run("submit", "run.sh", "--wait")
    assert done.code == 1
    assert "run.sh ended with exit code 7" in done.error
    assert "no such atom" in done.error
    assert "--partial" in done.error
    job_id = done.out.strip()
    assert (await program.run("submit", "run.sh", "--wait", "--exit-code")).code == 7
    assert (await program.run("wait", job_id, "--exit-code")).code == 7
    assert (await program.run("get", job_id)).code == 1
    assert (await program.run("get", job_id, "--partial")).code == 0
    assert (program.directory / f"job-{job_id}" / "stdout.log").read_text() == "almost\n"
    assert "Traceback" not in done.error


async def test_ls_and_show(program: Program, server: Server) -> None:
    first = await server.upload("exit 0")
    await server.wait(first, "Completed")
    second = await server.upload("exit 1")
    await server.wait(second, "Failed")
    done = await program.run("ls")
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[:3] for row in rows] == [
        [str(second), "Failed", "example"],
        [str(first), "Completed", "example"],
    ]
    assert await program.ids("ls", "-o", "id", "--status", "failed") == [second]
    assert [job["id"] for job in json.loads((await program.run("ls", "-o", "json")).out)] == [
        second,
        first,
    ]
    lines = (await program.run("ls", "-o", "jsonl")).out.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [second, first]
    assert (await program.run("ls", "-u", "99")).out == ""
    shown = await program.run("show", str(second))
    assert "run.sh ended with exit code 1" in shown.out
    assert "exit code: 1" in shown.out
    assert json.loads((await program.run("show", "last", "-o", "json")).out)["id"] == second


async def test_ids_in_all_their_forms(program: Program, server: Server) -> None:
    jobs = [await server.upload("exit 0") for _ in range(3)]
    await server.wait(jobs[-1])
    first, last = jobs[0], jobs[-1]
    done = await program.run("wait", f"{first}-{last}", "-o", "id")
    assert sorted(map(int, done.out.split())) == jobs
    piped = await program.run("ls", "-", "-o", "id", stdin=f"{first} {last}\n".encode())
    assert [int(word) for word in piped.out.split()] == [last, first]
    for words in (["0x7"], ["7-3"], ["@tag"], ["900-901"]):
        done = await program.run("show", *words)
        assert done.code == 2 and done.error.startswith("orchestrator: "), done


async def test_each_match_becomes_a_job_of_one_batch(program: Program) -> None:
    (program.directory / "data").mkdir()
    for name in "abc":
        (program.directory / "data" / f"{name}.pdb").write_text(name)
    _write(program.directory, run_sh="cat *.pdb\n")
    done = await program.run("submit", "run.sh", "--each", "data/*.pdb")
    assert done.code == 0, done
    batch = done.out.strip()
    assert batch.startswith("@batch:")
    ended = await program.run("wait", batch)
    assert ended.code == 0 and len(ended.out.splitlines()) == 3, ended
    ids = await program.ids("ls", batch, "-o", "id")
    assert (await program.run("get", batch, "-o", "all")).code == 0
    printed = {(program.directory / "all" / f"job-{i}" / "stdout.log").read_text() for i in ids}
    assert printed == {"a", "b", "c"}
    assert (await program.run("submit", "run.sh", "--each", "nothing/*")).code == 2


async def test_cancel_and_rerun(program: Program) -> None:
    _write(program.directory, run_sh="sleep 1000\n")
    (job_id,) = await program.ids("submit", "run.sh")
    assert await program.ids("cancel", str(job_id)) == [job_id]
    again = await program.run("cancel", str(job_id))
    assert again.code == 3 and "already" in again.error
    (new,) = await program.ids("rerun", str(job_id))
    assert new != job_id
    assert await program.ids("cancel", "last") == [new]


async def test_agents_services_events_and_config(program: Program, server: Server) -> None:
    await server.agent_pid()
    assert (await program.run("services")).out.startswith("example\t")
    assert "example" in (await program.run("services", "-o", "id")).out
    job_id = await server.upload("exit 0")
    await server.wait(job_id, "Completed")
    assert (await program.run("agents", "-o", "id")).out == "local\n"
    process = await program.start("events", "--after", "0-0", "-o", "jsonl")
    assert process.stdout is not None
    event = json.loads(await process.stdout.readline())
    assert (event["kind"], event["id"], event["status"]) == ("job", job_id, "Queued")
    process.terminate()
    await process.wait()
    shown = json.loads((await program.run("config", "-o", "json")).out)
    assert shown["url"] == {"value": server.url, "from": "the environment"}
    page = (await program.run("open", str(job_id), "--print")).out.strip()
    assert page == f"{server.url}/ui/#/jobs/{job_id}"
    assert (await curl(page)).status == 200


async def test_a_command_that_does_not_exist(program: Program) -> None:
    for word, meant in (("list", "ls"), ("submitt", "submit"), ("kill", "cancel")):
        done = await program.run(word, "7")
        assert done.code == 2 and f"did you mean {meant}?" in done.error, done
    assert (await program.run("xyzzy")).code == 2
    assert "--host" in (await program.run("serve", "--help")).out


async def test_what_there_is_of_a_job_that_runs(program: Program, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    _write(
        program.directory, run_sh=f"echo so far > half; until [ -e '{gate}' ]; do sleep 0.05; done"
    )
    (job_id,) = await program.ids("submit", "run.sh")
    process = await program.start("logs", "-f", "last")
    deadline = time.monotonic() + 30
    while not (program.directory / f"job-{job_id}" / "half").exists():
        assert time.monotonic() < deadline
        await program.run("get", "last", "--partial")
    gate.touch()
    assert await process.wait() == 0
    assert (await program.run("get", "last")).code == 0


async def test_the_server_is_not_there(program: Program) -> None:
    away = {"ORCHESTRATOR_URL": "http://127.0.0.1:9"}
    done = await program.run("ls", "--patience", "0", environment=away)
    assert done.code == 5
    assert "can't reach http://127.0.0.1:9" in done.error
    done = await program.run("ls", "--url", "ftp://x")
    assert done.code == 2


async def test_what_is_refused_has_its_own_exit_codes(program: Program, server: Server) -> None:
    _write(program.directory, run_sh="exit 0\n")
    assert (await program.run("submit", "run.sh", "-s", "nope")).code == 2
    assert (await program.run("submit", "nothing.sh")).code == 2
    assert (await program.run("submit")).code == 2
    assert (await program.run("show", "999999")).code == 2
    assert (await program.run("ls", "--bogus")).code == 2
    assert (await program.run("run")).code == 2
    _write(program.directory, run_sh="sleep 1000\n")
    (job_id,) = await program.ids("submit", "run.sh")
    assert (await program.run("wait", str(job_id), "--timeout", "0.2")).code == 124
    assert (await program.run("wait", str(job_id), "999", "--timeout", "0.5")).code == 124
    assert (await program.run("cancel", str(job_id))).code == 0


async def test_completion_names_every_command(program: Program) -> None:
    for shell in ("bash", "zsh", "fish"):
        done = await program.run("completion", shell)
        assert done.code == 0
        assert all(name in done.out for name in ("submit", "status", "serve", "jsonl")), shell


async def test_completion_in_bash(program: Program) -> None:
    (program.directory / "script").write_text((await program.run("completion", "bash")).out)
    ask = (
        "source ./script; for words in 'se' 'ls --st' 'ls -o j' 'run --serv'; do"
        " COMP_WORDS=(orchestrator $words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1));"
        ' _orchestrator; echo "${COMPREPLY[@]}"; done'
    )
    code, output = await run("bash", "-c", ask, cwd=program.directory)
    assert code == 0
    assert output.decode().splitlines() == [
        *("services serve", "--status", "json jsonl", "--service"),
    ]


async def test_many_are_changed_by_one_request(program: Program) -> None:
    (program.directory / "data").mkdir()
    for number in range(25):
        (program.directory / "data" / str(number)).write_text("")
    _write(program.directory, run_sh="sleep 1000\n")
    done = await program.run("submit", "run.sh", "--each", "data/*", "--tag", "p:x")
    batch = done.out.strip()
    refused = await program.run("delete", batch)
    assert (refused.code, refused.out) == (3, "")
    assert "0 deleted, 25 left" in refused.error
    ended = await program.run("cancel", batch)
    assert ended.code == 0 and "25 ended, 0 left" in ended.error, ended
    again = await program.run("rerun", batch, "-o", "id")
    assert len(again.out.split()) == 25
    some = await program.run("delete", "@p:x")
    assert some.code == 0 and "25 deleted, 25 left" in some.error, some
    assert (await program.run("cancel", batch)).code == 0  # the deleted are of the batch, too
    assert (await program.run("cancel", batch)).code == 3
    assert (await program.run("ls", batch, "-n", "0", "--status", "cleaned", "-o", "id")).code == 0


async def test_delete_frees_what_jobs_hold(program: Program) -> None:
    _write(program.directory, run_sh="echo x > x\n")
    done = await program.run("submit", "run.sh", "--wait")
    job_id = done.out.strip()
    assert (await program.run("delete", job_id)).out == f"{job_id}\n"
    gone = await program.run("get", job_id)
    assert gone.code == 3 and "removed" in gone.error, gone
    shown = json.loads((await program.run("show", job_id, "-o", "json")).out)
    assert (shown["status"], shown["outcome"]) == ("Cleaned", "Completed")
    assert (await program.run("delete", "999999")).code == 2
