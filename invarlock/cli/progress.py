"""Progress bars on a terminal; nothing when stderr is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

BYTES_FROM = 1_000_000
"""A total from here on is one of bytes: there are never so many windows or weights."""


class _Amount(ProgressColumn):
    """How many of how many; of bytes, with their rate."""

    def render(self, task: Task) -> Text:
        if (task.total or 0) < BYTES_FROM:
            return MofNCompleteColumn().render(task)
        return Text.assemble(DownloadColumn().render(task), " ", TransferSpeedColumn().render(task))


@contextmanager
def bars(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with a stage, what is done of it and its total; each stage gets a bar."""
    if not (shown and sys.stderr.isatty()):
        yield lambda stage, done, total: None
        return
    columns = (TextColumn("{task.description:<14}"), BarColumn(), _Amount(), TimeRemainingColumn())
    tasks = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield show
