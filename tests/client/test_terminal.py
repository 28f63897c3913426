"""The command line on a terminal: tables, colour, progress, Ctrl-C, and hostile texts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.client.program import Program
from tests.harness import PROJECT, Server, eventually, run

_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def _plain(text: str) -> list[str]:
    return _SEQUENCE.sub("", text).replace("\r", "").splitlines()


async def test_ls_is_a_coloured_table_that_fits(program: Program, server: Server) -> None:
    job_id = await server.upload("exit 1")
    await server.wait(job_id, "Failed")
    done = await (await program.on_terminal("ls", columns=80)).end()
    assert done.code == 0
    lines = _plain(done.out)
    assert lines[0].split() == ["ID", "STATE", "SERVICE", "CREATED", "TIME", "NAME", "MESSAGE"]
    assert any(line.split()[:3] == [str(job_id), "Failed", "example"] for line in lines[1:] if line)
    assert max(map(len, lines)) <= 80
    assert "\x1b[31m" in done.out
    plain = await (await program.on_terminal("ls", environment={"NO_COLOR": "1"})).end()
    assert "\x1b[31m" not in plain.out
    narrow = await (await program.on_terminal("ls", columns=40)).end()
    assert max(map(len, _plain(narrow.out))) <= 40


_EVERY_COMMAND = (
    *("run -- echo x", "submit run.sh", "submit run.sh --follow", "submit run.sh --get out"),
    *("ls", "ls 1-2 -o json", "show last", "logs last", "logs -f last", "wait last 1"),
    *("get last", "get last --partial", "get last stdout.log -o -", "get last --zip"),
    *("rerun last", "submit sleep.sh --script sleep.sh", "cancel last", "delete 1", "agents"),
    *("services", "open --print", "config", "completion bash", "help", "help ls", "ls --help"),
)


async def test_every_command_on_a_terminal(program: Program, server: Server) -> None:
    await server.agent_pid()
    (program.directory / "run.sh").write_text("echo printed\n")
    (program.directory / "sleep.sh").write_text("sleep 1000\n")
    for words in _EVERY_COMMAND:
        done = await (await program.on_terminal(*words.split(), columns=80)).end()
        assert done.code == 0, (words, done)
        assert "Traceback" not in done.out and done.out.strip(), (words, done)


async def test_a_pipe_gets_plain_text_and_no_progress(program: Program, server: Server) -> None:
    done = await program.run("run", "--", "echo out; echo err >&2")
    assert done.code == 0 and done.out == "out\n"
    assert "err\n" in done.error
    assert "\x1b" not in done.out + done.error
    assert "\r" not in done.error


async def test_watch_shows_what_happens(program: Program, server: Server) -> None:
    terminal = await program.on_terminal("ls", "--watch")
    await terminal.wait_for("STATE")
    job_id = await server.upload("exit 0")
    await server.wait(job_id, "Completed")
    await terminal.wait_for("Completed")
    terminal.interrupt()
    done = await terminal.end()
    assert done.code == 130
    assert "Traceback" not in done.out
    assert (await program.run("ls", "--watch")).code == 2


async def test_ctrl_c_leaves_the_job_and_says_so(program: Program, server: Server) -> None:
    for words in (
        ["run", "--", "echo begun; sleep 1000"],
        ["wait", "last"],
        ["logs", "-f", "last"],
    ):
        terminal = await program.on_terminal(*words)
        if words[0] == "wait":
            await terminal.wait_for("job ")
        else:
            await terminal.wait_for("begun")
        terminal.interrupt()
        done = await terminal.end()
        assert done.code == 130, done
        assert "Traceback" not in done.out
        if words[0] != "logs":
            assert "goes on" in done.out and "orchestrator cancel" in done.out
    assert (await program.run("cancel", "last")).code == 0


async def test_a_job_that_waits_says_why(program: Program, server: Server, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    blockers = [
        await server.upload(f"until [ -e '{gate}' ]; do sleep 0.05; done") for _ in range(5)
    ]
    await eventually(
        lambda: server.query("SELECT count(*) FROM job WHERE state = 'Running'")[0][0] >= 4,
        "the slots are taken",
    )
    terminal = await program.on_terminal("run", "--", "echo mine")
    await terminal.wait_for("waits: ")
    gate.touch()
    done = await terminal.end()
    assert done.code == 0 and "mine" in done.out
    for job_id in blockers:
        await server.wait(job_id, "Completed")


async def test_nothing_of_a_job_steers_the_terminal(program: Program, server: Server) -> None:
    script = (
        r"printf 'a\033]0;title\007b\033[2Jc\033[31mred\033[0m\n'; "
        r"printf 'x\302\2335ny\n' >&2; exit 3"
    )
    (program.directory / "run.sh").write_text(script)
    done = await (await program.on_terminal("submit", "run.sh", "--wait")).end()
    assert "\x1b]0;" not in done.out and "\x9b" not in done.out
    shown = await (await program.on_terminal("logs", "last")).end()
    assert shown.out == "abc\x1b[31mred\x1b[0m\r\n"
    exact = await program.run("logs", "last")
    assert exact.out == "a\x1b]0;title\x07b\x1b[2Jc\x1b[31mred\x1b[0m\n"
    name = "evil\u202egnp\u009b5n"
    await program.run("submit", "run.sh", "--name", name)
    for words in (["ls"], ["show", "last"]):
        done = await (await program.on_terminal(*words, columns=120)).end()
        assert "\u202e" not in done.out and "\u009b" not in done.out
        assert "evil" in done.out


async def test_a_reader_that_has_enough_ends_it_quietly(program: Program, server: Server) -> None:
    for _ in range(3):
        await server.upload("exit 0")
    process = await program.start("events", "--after", "0-0")
    assert process.stdout is not None and process.stderr is not None
    await process.stdout.readline()
    process.stdout._transport.close()  # type: ignore[attr-defined]
    await server.upload("exit 0")
    await process.wait()
    assert process.returncode == 141
    assert await process.stderr.read() == b""


async def test_a_locale_without_these_letters(program: Program, server: Server) -> None:
    (program.directory / "run.sh").write_text("exit 0\n")
    assert (await program.run("submit", "run.sh", "--name", "Größe 蛋白")).code == 0
    old = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "latin-1", "LC_ALL": "C"}
    done = await program.run("ls", "-o", "jsonl", environment=old)
    assert done.code == 0 and "\\u86cb" in done.out
    process = await program.start("ls", environment=old)
    out, error = await process.communicate()
    assert process.returncode == 0 and "Größe".encode("latin-1") in out, error
    table = await program.start("ls", "-o", "table", environment=old)
    out, error = await table.communicate()
    assert table.returncode == 0, error


async def test_bars_of_a_batch_and_of_its_downloads(program: Program, server: Server) -> None:
    (program.directory / "run.sh").write_text("cat *.in\n")
    for name in "abc":
        (program.directory / f"{name}.in").write_text(name)
    words = ("submit", "run.sh", "--each", "*.in", "--get", "out")
    done = await (await program.on_terminal(*words)).end()
    assert done.code == 0, done
    assert "jobs ended" in done.out and "Traceback" not in done.out
    assert len(list((program.directory / "out").iterdir())) == 3


async def test_closed_streams_are_no_defect(program: Program, server: Server) -> None:
    code, output = await run(
        *("env", "-i", *(f"{k}={v}" for k, v in program.environment.items())),
        *("bash", "-c", f"{sys.executable} {PROJECT}/orchestrator.py ls >&- 2>&-"),
    )
    assert (code, output) == (0, b"")
