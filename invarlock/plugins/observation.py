"""What a guard's taps collect during one pass, and how they failed: one guard's mistake is no other guard's."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from invarlock.core.errors import one_line


@dataclass
class Observation:
    """The taps of one guard for one pass."""

    wanted: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    trace: str | None = None

    @property
    def taps(self) -> dict[str, _Shielded]:
        return {module: _Shielded(self, module, tap) for module, tap in self.wanted.items()}

    def results(self) -> dict[str, Any]:
        """What each tap collected; nothing from a guard whose taps failed."""
        try:
            return {} if self.message else {module: tap.result() for module, tap in self.wanted.items()}
        except Exception as error:
            self.fail("result of a tap", error)
            return {}

    def fail(self, where: str, error: Exception) -> None:
        if self.message is None:
            self.message, self.trace = f"{where}: {one_line(error)}", traceback.format_exc()


@dataclass(frozen=True)
class _Shielded:
    """A tap that stops at its first exception and leaves the pass alone."""

    observation: Observation
    module_name: str
    tap: Any

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.observation.message is None:
            try:
                self.tap(module, args, kwargs, output)
            except Exception as error:
                self.observation.fail(f"tap on {self.module_name}", error)

    def result(self) -> Any:
        return self.tap.result()
