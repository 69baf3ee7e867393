"""The command that asked for a run, for the report of it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Invocation:
    """A command line, and when it began."""

    command: str = ""
    """Empty where a program asked."""
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Invocation:
        return cls(shlex.join(["invarlock", *arguments]))
