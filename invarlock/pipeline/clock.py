"""Time of the stages and the guards of a run, and their progress."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from invarlock.core.progress import Progress, showing

STARTUP, OTHER = "startup", "other"
"""Before the clock was made, mostly imports; and whatever no stage names."""


@dataclass
class Clock:
    """Seconds a stage and seconds a guard; those of a stage inside of another one count for the inner one."""

    began: float = field(default_factory=time.perf_counter)
    """When the run began."""
    on_progress: Progress = lambda stage, done, total: None
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guards: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _inner: float = 0.0
    """Seconds of the stages inside of the present one, so far."""

    def __post_init__(self) -> None:
        self.stages[STARTUP] = time.perf_counter() - self.began

    @contextmanager
    def stage(self, name: str, label: str | None = None) -> Iterator[None]:
        """Time a block, and show the progress that it tells.

        :param label: under which it is shown, by default the name.
        """
        started, around = time.perf_counter(), self._inner
        self._inner = 0.0
        self.on_progress(label or name, 0, 0)
        try:
            with showing(partial(self.on_progress, label or name)):
                yield
        finally:
            elapsed = time.perf_counter() - started
            self.stages[name] += elapsed - self._inner
            self._inner = around + elapsed

    def timings(self) -> dict[str, float]:
        """Seconds of each stage; they add up to the time since the run began."""
        whole = time.perf_counter() - self.began
        seconds = {**self.stages, OTHER: max(0.0, whole - sum(self.stages.values()))}
        return {stage: round(of_it, 4) for stage, of_it in seconds.items()}

    @contextmanager
    def guard(self, place: int, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.stage("guards", label=name):
                yield
        finally:
            self.guards[place] += time.perf_counter() - started
