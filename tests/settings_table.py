"""The README's tables of settings, made of the tables in ``config.py``.

``python -m tests.settings_table`` writes them into the README; a test says when that is due.
"""

from __future__ import annotations

import re
from pathlib import Path

import config

README = Path(__file__).parent.parent / "README.md"
_IN_WORDS = re.compile(r"none|[a-z]+,? .*")


def _row(prefix: str, setting: config.Setting) -> str:
    option = f" (`{setting.option}`)" if setting.option else ""
    in_words = _IN_WORDS.fullmatch(setting.default)
    default = setting.default if in_words else f"`{setting.default}`"
    restart = "" if setting.reloadable else " †"
    return f"| `{prefix}{setting.name}`{option}{restart} | {default} | {setting.meaning} |"


def with_tables(text: str) -> str:
    """Return the README's text with its tables as ``config.py`` has them now."""
    for name, prefix, settings in (
        ("settings", "", config.SETTINGS),
        ("service settings", "SERVICE_<NAME>_", config.SERVICE_SETTINGS),
    ):
        rows = "\n".join(_row(prefix, setting) for setting in settings)
        table = f"| name | default | meaning |\n|---|---|---|\n{rows}\n"
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(start)
        text = before + start + table + end + rest.split(end)[1]
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
