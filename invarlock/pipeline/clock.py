"""How long the stages and the guards of a run took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds a stage and seconds a guard."""

    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guards: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] += time.perf_counter() - started

    @contextmanager
    def guard(self, place: int) -> Iterator[None]:
        started = time.perf_counter()
        try:
            with self.stage("guards"):
                yield
        finally:
            self.guards[place] += time.perf_counter() - started
