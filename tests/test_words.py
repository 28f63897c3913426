"""The words of the project: one list of what users are told, and words that say it plainly."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.harness import PROJECT

pytestmark = pytest.mark.quick

LIST = PROJECT / "tests" / "messages.txt"
_SHORTEST = 12  # characters; shorter ones are names, units, bits of a line
_PLAIN = {
    r"\bany more\b": "no longer",
    r"\bis there (?:already|twice)\b": "already exists, given more than once",
    r"\bpass(?:es|ed)? over\b": "ignore, skip",
    r"\blittle (?:jobs?|ones?|results?|files?|uploads?|inputs?)\b": "small",
    r"\b(?:jobs?|killed|waits?) in line\b": "queued",
}
_SOURCES = ("agent", "api", "archive", "commands", "fleet", "storage", "telemetry", "wire")


def _modules() -> list[Path]:
    folders = (*_SOURCES, "orchestrator_client")
    found = [path for folder in folders for path in (PROJECT / folder).rglob("*.py")]
    return sorted([*PROJECT.glob("*.py"), *found])


def _text(node: ast.expr) -> str | None:
    """Return the words of a string, with ``{}`` where a value stands; None if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{}"
            for part in node.values
        ]
        return "".join(parts)
    return None


def messages() -> list[str]:
    """Return what the program says when it refuses, and the help of its options."""
    found: set[str] = set()
    for path in _modules():
        for node in ast.walk(ast.parse(path.read_text())):
            arguments: list[ast.expr] = []
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                arguments = node.exc.args
            elif isinstance(node, ast.Call):
                arguments = [word.value for word in node.keywords if word.arg == "help"]
            texts = [_text(argument) for argument in arguments]
            found |= {text for text in texts if text and len(text) >= _SHORTEST and " " in text}
    return sorted(text.replace("\n", "\\n") for text in found)


def test_the_list_of_messages_is_whole() -> None:
    """So that they are read together: a new one shows in a review beside its like."""
    listed = LIST.read_text().splitlines()
    assert listed == messages(), "write it with: python -m tests.test_words"


@pytest.mark.parametrize("words", _PLAIN)
def test_the_words_are_plain(words: str) -> None:
    pattern = re.compile(words)
    texts = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", PROJECT / "openapi.yaml"]
    texts += [*(PROJECT / "docs").glob("*.md"), *(PROJECT / "dashboard").rglob("*.js"), *_modules()]
    found = [
        f"{path.relative_to(PROJECT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"say instead: {_PLAIN[words]}\n" + "\n".join(found)


if __name__ == "__main__":
    LIST.write_text("".join(f"{text}\n" for text in messages()))
