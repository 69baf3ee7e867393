"""Progress on stderr: bars on a terminal, and plain lines in the log of a run that takes long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import rich.progress as rich
from rich.console import Console, RenderableType
from rich.text import Text

from invarlock.core.progress import Interval, Progress

BYTES_FROM = 1_000_000
"""A total from here on is one of bytes: there are never so many windows or weights."""

SILENT_SECONDS = 10.0
"""A shorter run prints no lines: its log needs no sign of life, and an error in the input stays the only line."""
EVERY_SECONDS = 30.0
"""Between two lines of one stage."""

LOADING = ("Loading weights", "Converting and de-quantizing")
"""Beginnings of the bars of transformers that are shown as one of ours."""


class _Amount(rich.ProgressColumn):
    """Done and total; of bytes, with their rate."""

    def render(self, task: rich.Task) -> Text:
        if (task.total or 0) < BYTES_FROM:
            return rich.MofNCompleteColumn().render(task)
        return Text.assemble(rich.DownloadColumn().render(task), " ", rich.TransferSpeedColumn().render(task))


@contextmanager
def display(*, shown: bool) -> Iterator[Progress]:
    """A function to call with a stage, what is done of it and its total, which shows that on stderr."""
    if not shown:
        yield lambda stage, done, total: None
        return
    with _bars() if sys.stderr.isatty() else _lines() as progress:
        yield progress


@contextmanager
def _lines() -> Iterator[Progress]:
    """Print a line per stage, and every 30 seconds how far it is."""
    lines, ended = _Lines(), threading.Event()

    def watch() -> None:
        while not ended.wait(lines.until_next()):
            lines.print()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lines.tell
    finally:
        ended.set()
        watcher.join()


class _Lines:
    """Plain lines: the stage, how far it is, and the seconds since the run began."""

    def __init__(self) -> None:
        self._began, self._next = time.monotonic(), time.monotonic() + SILENT_SECONDS
        self._stage, self._done, self._total = "start", 0, 0
        self._printed: set[str] = set()
        self._lock = threading.Lock()

    def tell(self, stage: str, done: int, total: int) -> None:
        if isinstance(stage, Interval):
            return
        self._stage, self._done, self._total = stage, done, total
        if stage not in self._printed and time.monotonic() - self._began >= SILENT_SECONDS:
            self.print()

    def until_next(self) -> float:
        return max(0.0, self._next - time.monotonic())

    def print(self) -> None:
        with self._lock:
            self._printed.add(self._stage)
            self._next = time.monotonic() + EVERY_SECONDS
            far = f", {100 * self._done // self._total} %" if self._total else ""
            seconds = time.monotonic() - self._began
            print(f"invarlock: {self._stage}{far}, {seconds:.0f} s", file=sys.stderr, flush=True)


class _Bars(rich.Progress):
    """Bars, and below them the interval that narrows."""

    interval = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.interval:
            yield Text(self.interval)


@contextmanager
def _bars() -> Iterator[Progress]:
    """A bar for each stage."""
    columns = (rich.TextColumn("{task.description:<14}"), rich.BarColumn(), _Amount(), rich.TimeRemainingColumn())
    tasks: dict[str, rich.TaskID] = {}
    latest: dict[str, int] = {}
    with _Bars(*columns, console=Console(stderr=True), transient=True) as progress:

        def show(stage: str, done: int, total: int) -> None:
            if isinstance(stage, Interval):
                progress.interval = stage
                return
            if not total:
                return
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
