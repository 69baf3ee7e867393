"""Progress bars on a terminal; nothing when stderr is piped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress as rich
from rich.console import Console
from rich.text import Text

BYTES_FROM = 1_000_000
"""A total from here on is one of bytes: there are never so many windows or weights."""

LOADING = ("Loading weights", "Converting and de-quantizing")
"""Beginnings of the bars of transformers that are shown as one of ours."""


class _Amount(rich.ProgressColumn):
    """Done and total; of bytes, with their rate."""

    def render(self, task: rich.Task) -> Text:
        if (task.total or 0) < BYTES_FROM:
            return rich.MofNCompleteColumn().render(task)
        return Text.assemble(rich.DownloadColumn().render(task), " ", rich.TransferSpeedColumn().render(task))


@contextmanager
def bars(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with a stage, what is done of it and its total; each stage gets a bar."""
    if not (shown and sys.stderr.isatty()):
        yield lambda stage, done, total: None
        return
    columns = (rich.TextColumn("{task.description:<14}"), rich.BarColumn(), _Amount(), rich.TimeRemainingColumn())
    tasks: dict[str, rich.TaskID] = {}
    latest: dict[str, int] = {}
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            if done < latest.get(stage, 0):
                # It began once more, at a rate of its own.
                progress.reset(tasks[stage])
            latest[stage] = done
            progress.update(tasks[stage], completed=done, total=total)

        with _loading_shown(show):
            yield show


@contextmanager
def _loading_shown(show: Callable[[str, int, int], None]) -> Iterator[None]:
    """Show how many weights transformers has loaded, which has bars of its own for that."""
    if "transformers" not in sys.modules:
        # Nothing will be loaded.
        yield
        return
    from transformers.utils import logging

    def hook(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        loads = kwargs.get("desc", "").startswith(LOADING)
        return _told(args[0], show) if loads else bar(*args, **kwargs)

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _told(weights: Collection[Any], show: Callable[[str, int, int], None]) -> Iterator[Any]:
    for done, weight in enumerate(weights, start=1):
        yield weight
        show("load", done, len(weights))
