"""Progress for people who wait: on standard error, and only if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, TypeAlias

from orchestrator_client.output import console, is_terminal, printable

if TYPE_CHECKING:
    from rich.progress import Progress

Advance: TypeAlias = Callable[[int, int], None]


def _nothing(done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def transfers(*texts: str) -> Iterator[tuple[Advance, ...]]:
    """Show how many bytes of how many are done, one bar for each text once that has begun."""
    with _display("bytes") as bar:
        if bar is None:
            yield (_nothing,) * len(texts)
        else:
            yield tuple(_advance_of(bar, printable(text), None) for text in texts)


@contextlib.contextmanager
def counting(text: str, total: int) -> Iterator[Advance]:
    """Show how many things of how many are done, while the block runs."""
    with _display("things") as bar:
        yield _nothing if bar is None else _advance_of(bar, printable(text), total)


_shown: list[Progress] = []


@contextlib.contextmanager
def _display(what: Literal["bytes", "things"]) -> Iterator[Progress | None]:
    """Give bars for the time of the block; None where nobody looks, or where bars are already."""
    if _shown or not is_terminal(sys.stderr):
        yield None
        return
    from rich import progress

    columns: tuple[progress.ProgressColumn, ...] = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
    )
    if what == "bytes":
        columns += (progress.DownloadColumn(), progress.TransferSpeedColumn())
        columns += (progress.TimeRemainingColumn(),)
    else:
        columns += (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        _shown.append(bar)
        try:
            yield bar
        finally:
            _shown.clear()


def _advance_of(bar: Progress, text: str, total: int | None) -> Advance:
    task = bar.add_task(text, total=total, visible=total is not None)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=True)
