"""docs/api.md: each of its examples is run as it stands there, and answers what it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.documents import Example, examples_of, without_numbers
from tests.harness import PROJECT, Server, run

_DOCUMENT = PROJECT / "docs" / "api.md"


def _assert_like(shown: object, actual: object, place: str) -> None:
    """Compare shape, and the values that can't differ from run to run."""
    if isinstance(shown, dict):
        assert isinstance(actual, dict) and shown.keys() == actual.keys(), (place, actual)
        for key, value in shown.items():
            _assert_like(value, actual[key], f"{place}.{key}")
    elif isinstance(shown, list):
        assert isinstance(actual, list) and bool(shown) == bool(actual), (place, actual)
        for value in shown[:1]:
            _assert_like(value, actual[0], f"{place}[0]")
    elif place.endswith((".status", ".message", ".reason", ".error")):
        assert without_numbers(str(actual)) == without_numbers(str(shown)), (place, actual)
    elif ".usage." in place:
        assert actual is None or isinstance(actual, (int, float)), (place, actual)
    else:
        number = (int, float)
        kind = number if isinstance(shown, number) and type(shown) is not bool else type(shown)
        assert isinstance(actual, kind), (place, shown, actual)


def _script(examples: list[Example], url: str, folder: Path) -> str:
    """One shell for all, so that what an example sets the next ones have."""
    parts = ["set -uo pipefail", f"cd '{folder}'"]
    for number, example in enumerate(examples):
        commands = example.commands.replace("http://localhost:5000", url)
        commands = commands.replace(
            "python orchestrator.py", f"{sys.executable} {PROJECT}/orchestrator.py"
        )
        parts.append(f"{{\n{commands}}} > out.{number} 2> err.{number}")
        parts.append(f"[ $? = 0 ] || {{ echo 'example {number}'; cat err.{number}; exit 1; }}")
    return "\n".join(parts)


async def test_every_example_of_the_api_document_works_as_shown(server: Server) -> None:
    examples = examples_of(_DOCUMENT.read_text(), "sh")
    assert len(examples) > 20
    folder = server.directory
    code, output = await run("bash", "-c", _script(examples, server.url, folder))
    assert code == 0, output.decode()
    for number, example in enumerate(examples):
        printed = (folder / f"out.{number}").read_text()
        if example.language == "json":
            _assert_like(json.loads(example.output), json.loads(printed), example.commands)
        elif example.language == "text":
            shown = without_numbers(example.output.rstrip("\n"))
            assert without_numbers(printed.rstrip("\n")) == shown, example.commands
