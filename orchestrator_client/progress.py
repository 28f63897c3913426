"""Progress for people who wait: on standard error, and only if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from orchestrator_client.output import console, is_terminal, printable

if TYPE_CHECKING:
    from rich.progress import Progress

Advance: TypeAlias = Callable[[int, int], None]


def _nothing(done: int, total: int) -> None:
    """Show nothing."""


@contextlib.contextmanager
def transfers(*texts: str) -> Iterator[tuple[Advance, ...]]:
    """Show how many bytes of how many are done, one bar for each text once that has begun."""
    if not is_terminal(sys.stderr):
        yield (_nothing,) * len(texts)
        return
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        yield tuple(_bar(bar, printable(text)) for text in texts)


def _bar(bar: Progress, text: str) -> Advance:
    task = bar.add_task(text, total=None, visible=False)
    return lambda done, total: bar.update(task, completed=done, total=total, visible=True)


@contextlib.contextmanager
def counting(text: str, total: int) -> Iterator[Advance]:
    """Show how many things of how many are done, while the block runs."""
    if not is_terminal(sys.stderr):
        yield _nothing
        return
    from rich import progress

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
