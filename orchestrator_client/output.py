"""What commands print: tables for people, plain text and JSON for programs.

Whatever a server, a job or a file name brings may hold characters that steer a terminal; they
are shown, not obeyed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_STEERING = (
    *range(0x20),
    *range(0x7F, 0xA0),
    # marks and overrides of the writing direction, separators of lines
    *(0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)),
    *range(0xD800, 0xE000),
)
_SHOWN = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _STEERING}

STATE_STYLES: Mapping[str, str] = {
    "Completed": "green",
    "Failed": "red",
    "Invalid": "red",
    "Killed": "yellow",
    "Running": "cyan",
    "Cleaned": "dim",
}


def printable(text: object) -> str:
    """Return a text without anything that could steer a terminal or break a table."""
    return str(text).translate(_SHOWN)


def use_streams_safely() -> None:
    """Let no character that the locale does not have, and no closed stream, end a command."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the program ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def is_terminal(stream: IO[str]) -> bool:
    """Whether a person is likely to look at it."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def say(text: str) -> None:
    """Print a line for people, beside the output."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def write_line(text: str) -> None:
    """Print a line of the output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


# --- lists ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table; in a narrow terminal those that may shrink do."""

    title: str
    is_right: bool = False
    may_shrink: bool = False


Cell = str | tuple[str, str]
"""A text, or a text and its style on a terminal."""


def table_of(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> Table:
    """Return a table for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_right else "left",
            no_wrap=not column.may_shrink,  # rich narrows first what may be wrapped
        )
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(cell: Cell) -> Text:
    from rich.text import Text

    text, style = cell if isinstance(cell, tuple) else (cell, "")
    return Text(printable(text), style, no_wrap=True, overflow="ellipsis")


def console(stream: IO[str] | None = None) -> Console:
    """Return a console of a stream, standard output by default."""
    from rich.console import Console

    return Console(file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=False)


def print_table(
    wanted: str | None, columns: Sequence[Column], rows: Iterable[Sequence[Cell]]
) -> None:
    """Print a table on a terminal (or if ``table`` is wanted), else lines of tab-separated text."""
    if wanted == "table" or (wanted is None and is_terminal(sys.stdout)):
        console().print(table_of(columns, rows))
        return
    for row in rows:
        cells = (cell[0] if isinstance(cell, tuple) else cell for cell in row)
        write_line("\t".join(map(printable, cells)))


def print_json(value: Any) -> None:
    """Print JSON, with indentation."""
    # ASCII alone: right in every locale, and nothing in it steers a terminal
    write_line(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """Print JSON on one line."""
    write_line(json.dumps(value))


# --- times and sizes --------------------------------------------------------------


def moment(time: datetime | None, is_short: bool) -> str:
    """Return a time: for people in their own zone, for programs in UTC."""
    if time is None:
        return ""
    if not is_short:
        return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    local = time.astimezone()
    now = datetime.now().astimezone()
    if local.date() == now.date():
        return local.strftime("%H:%M:%S")
    return local.strftime("%b %d %H:%M" if local.year == now.year else "%Y-%m-%d")


def duration(seconds: float | None) -> str:
    """Return a duration for people."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 48 else f"{hours // 24}d{hours % 24:02d}h"


def memory(number: int | None) -> str:
    """Return an amount of memory for people."""
    if number is None:
        return ""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"


def size(number: float | None) -> str:
    """Return a number of bytes for people."""
    if number is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
