"""Observations of a guard's taps during one pass, and their failures, which are that guard's alone."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from invarlock.core.errors import PluginError, contained, located


def taps_of(returned: object) -> Mapping[str, Any]:
    """Read what ``observe`` returned.

    :raises PluginError: it is not taps by module name.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise PluginError(f"it returned {type(returned).__name__}, not a dict of taps by module name")
    for name, tap in returned.items():
        if not isinstance(name, str) or not callable(tap) or not callable(getattr(tap, "result", None)):
            raise PluginError(f"{name!r}: a tap is a callable with a method result(), {type(tap).__name__} is not")
        positions = getattr(tap, "positions", None)
        if positions is not None and (type(positions) is not int or positions < 1):
            raise PluginError(f"{name!r}: a tap's positions are a whole number above 0 or None, not {positions!r}")
    return dict(returned)


@dataclass
class Observation:
    """The taps of one guard for one pass."""

    wanted: Mapping[str, Any] = field(default_factory=dict)
    kept: Mapping[str, Any] | None = None
    """Results of an earlier pass over the same windows; None where the taps themselves have them."""
    message: str | None = None
    trace: str | None = None

    @property
    def taps(self) -> dict[str, _Shielded]:
        return {module: _Shielded(self, module, tap) for module, tap in self.wanted.items()}

    def results(self) -> dict[str, Any]:
        """Result of each tap; nothing from a guard whose taps failed."""
        if self.kept is not None:
            # A copy: what a guard changes of it, it would find changed at the next attempt.
            return copy.deepcopy(dict(self.kept))
        try:
            with contained():
                return {} if self.message else {module: tap.result() for module, tap in self.wanted.items()}
        except Exception as error:
            self.fail("result of a tap", error)
            return {}

    def fail(self, where: str, error: Exception) -> None:
        if self.message is None:
            self.message, self.trace = f"{where}: {located(error)}", traceback.format_exc()


@dataclass(frozen=True)
class _Shielded:
    """A tap that stops at its first exception and leaves the pass alone."""

    observation: Observation
    module_name: str
    tap: Any

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.observation.message is None:
            try:
                with contained():
                    self.tap(module, args, kwargs, output)
            except Exception as error:
                self.observation.fail(f"tap on {self.module_name}", error)

    @property
    def positions(self) -> int | None:
        return getattr(self.tap, "positions", None)

    def result(self) -> Any:
        return self.tap.result()
