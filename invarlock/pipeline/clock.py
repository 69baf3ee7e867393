"""How long the stages and the guards of a run took, and whom they tell how far they are."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from invarlock.core.progress import Shown, showing

Progress = Callable[[str, int, int], object]
"""Called with the stage, what is done of it and how much there is."""


@dataclass
class Clock:
    """Seconds a stage and seconds a guard."""

    on_progress: Progress = lambda stage, done, total: None
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guards: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str, label: str | None = None) -> Iterator[Shown]:
        """Time a block, and let what it tells of its progress be shown.

        :param label: under which it is shown, by default the name.
        """
        started, shown = time.perf_counter(), partial(self.on_progress, label or name)
        try:
            with showing(shown):
                yield shown
        finally:
            self.stages[name] += time.perf_counter() - started

    @contextmanager
    def guard(self, place: int, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.stage("guards", label=name):
                yield
        finally:
            self.guards[place] += time.perf_counter() - started
