"""Time of the stages and the guards of a run, and their progress."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from invarlock.core.progress import Progress, showing


@dataclass
class Clock:
    """Seconds a stage and seconds a guard."""

    on_progress: Progress = lambda stage, done, total: None
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guards: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str, label: str | None = None) -> Iterator[None]:
        """Time a block, and show the progress that it tells.

        :param label: under which it is shown, by default the name.
        """
        started = time.perf_counter()
        try:
            with showing(partial(self.on_progress, label or name)):
                yield
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
