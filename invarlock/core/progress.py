"""Progress of a stage, told to whoever shows it: on the way down nobody has to pass that on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[str, int, int], object]
"""Called with the stage, what is done of it and how much there is: bytes where it is a million or more, else things;
0 of 0 as the stage begins. An :class:`Interval` comes between stages, with the windows that it is of."""
Shown = Callable[[int, int], object]
"""``Progress`` of one stage."""


class Interval(str):
    """In place of a stage: the interval that narrows while stages go on, in words for a terminal."""


EVERY_SECONDS = 0.5

_shown: ContextVar[Shown] = ContextVar("shown", default=lambda done, total: None)


@contextmanager
def showing(shown: Shown) -> Iterator[None]:
    """Whatever is told in the block goes there."""
    before = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(before)


def shown_now() -> Shown:
    """Whoever is told now."""
    return _shown.get()


class Tally:
    """Progress towards a total, from any thread, told to whoever shows the stage in which this was made."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._shown, self._lock = shown_now(), threading.Lock()

    def add(self, amount: int = 1) -> None:
        with self._lock:
            self.done += amount
            self._shown(self.done, self.total)


def counted(items: Sequence[Item], size: Callable[[Item], int] = lambda item: 1) -> Iterator[Item]:
    """The items one by one; each counts as done when the next one is asked for.

    :param size: of an item, in bytes; by default things are counted.
    """
    tally = Tally(sum(map(size, items)))
    for item in items:
        yield item
        tally.add(size(item))


@contextmanager
def watched(folder: Path, total: int) -> Iterator[None]:
    """Tell how many bytes lie below a folder that a library writes to, until the block ends."""
    shown, ended = shown_now(), threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_SECONDS):
            shown(min(total, _size(folder)), total)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _size(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        # What was listed may have another name by now.
        with suppress(FileNotFoundError):
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes
