"""Examples of documents: commands, and what the document says that they print."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """Commands, and what they print: ``language`` json or text, None if it is not shown."""

    commands: str
    language: str | None
    output: str


def examples_of(document: str, of: str) -> list[Example]:
    """Return the examples in a language (``sh``, ``python``), each with the output after it."""
    examples: list[Example] = []
    for match in _FENCE.finditer(document):
        language, text = match["language"], match["text"]
        if language == of:
            examples.append(Example(text, None, ""))
            continue
        assert language in ("json", "text"), language
        assert examples and examples[-1].language is None, f"output of no command: {text}"
        examples[-1] = Example(examples[-1].commands, language, text)
    return examples


def without_numbers(text: str) -> str:
    """Return a text in which everything that looks like a number is the same."""
    return re.sub(r"[0-9a-f]*[0-9][0-9a-f]*", "0", text)
