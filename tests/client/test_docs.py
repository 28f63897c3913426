"""docs/cli.md and docs/python.md: each example is run as it stands there, and prints that."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.client.program import Program, environment_of
from tests.documents import examples_of, without_numbers
from tests.harness import PROJECT, Server, run


def _like(text: str) -> str:
    """Leave out what differs from run to run: numbers, and where the home directory is."""
    text = re.sub(r"(\d+\.\d|0\.\d{3})s?\b", "0", text.rstrip("\n"))
    return re.sub(r"/\S*/\.config", "/.config", without_numbers(text))


async def test_every_example_of_the_command_line_works_as_shown(
    program: Program, server: Server
) -> None:
    examples = examples_of((PROJECT / "docs" / "cli.md").read_text(), "sh")
    assert len(examples) > 12
    parts = [
        "set -uo pipefail",
        "unset ORCHESTRATOR_USER",
        f'orchestrator() {{ {sys.executable} {PROJECT}/orchestrator.py "$@"; }}',
    ]
    for number, example in enumerate(examples):
        parts.append(f"{{\n{example.commands}}} > ~/out.{number} 2> ~/err.{number}")
        parts.append(f"[ $? = 0 ] || {{ echo example {number}; cat ~/err.{number}; exit 1; }}")
    command = ("env", "-i", *(f"{k}={v}" for k, v in program.environment.items()))
    code, output = await run(*command, "bash", "-c", "\n".join(parts), cwd=program.directory)
    assert code == 0, output.decode()
    for number, example in enumerate(examples):
        printed = (
            (program.directory / f"out.{number}")
            .read_text()
            .replace(server.url, "http://localhost:5000")
        )
        if example.language is not None:
            assert _like(printed) == _like(example.output), example.commands


async def test_the_first_job_of_the_readme_runs(program: Program) -> None:
    readme = (PROJECT / "README.md").read_text()
    match = re.search(r"^\.venv/bin/orchestrator (run .*)$", readme, re.MULTILINE)
    assert match is not None
    words = shlex.split(match[1], comments=True)
    words[words.index("examples/2oob_A.pdb")] = str(PROJECT / "examples" / "2oob_A.pdb")
    done = await program.run(*words)
    assert done.code == 0 and int(done.out) > 0, done


async def test_every_example_of_the_python_client_works_as_shown(
    server: Server, tmp_path: Path
) -> None:
    examples = examples_of((PROJECT / "docs" / "python.md").read_text(), "python")
    assert len(examples) >= 5
    for example in examples:
        code = example.commands.replace("http://localhost:5000", server.url)
        script = tmp_path / "example.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(PROJECT)!r})\n{code}")
        environment = (f"{k}={v}" for k, v in environment_of(tmp_path, server.url).items())
        status, output = await run(
            *("env", "-i", *environment, sys.executable, str(script)), cwd=tmp_path
        )
        assert status == 0, output.decode()
        assert output.decode() == example.output, example.commands
