"""The baseline of a run, kept so that it can be brought back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from invarlock.core.errors import PluginError
from invarlock.core.snapshots import Fingerprint
from invarlock.pipeline.clock import Clock
from invarlock.plugins.manager import Adapter


@dataclass(frozen=True)
class Keeper:
    """The baseline of a run: brings it back, and tells whether a model still is what it was."""

    adapter: Adapter
    snapshot: Any
    fingerprint: Fingerprint
    clock: Clock

    @classmethod
    def of(cls, model: torch.nn.Module, adapter: Adapter, clock: Clock) -> Keeper:
        with clock.stage("snapshot"):
            snapshot = adapter.snapshot(model)
        return cls(adapter, snapshot, fingerprint_of(model, clock), clock)

    def restore(self, model: torch.nn.Module, *, check: bool = True) -> None:
        """Bring the baseline back.

        :param check: look whether it is what it was.
        :raises PluginError: when the adapter's snapshot did not bring it back bit for bit.
        """
        with self.clock.stage("restore"):
            self.adapter.restore(model, self.snapshot)
        if check and (changed := self.changed(model, self.fingerprint)):
            raise PluginError(
                f"adapter {self.adapter.name}: restore did not bring the baseline back: {some(changed)} differ"
            )

    def changed(self, model: torch.nn.Module, earlier: Fingerprint) -> list[str]:
        return fingerprint_of(model, self.clock).changed_since(earlier)

    def undo(self, model: torch.nn.Module) -> list[str]:
        """What differs from the baseline; it is brought back."""
        if changed := self.changed(model, self.fingerprint):
            self.restore(model)
        return changed


def fingerprint_of(model: torch.nn.Module, clock: Clock) -> Fingerprint:
    with clock.stage("fingerprint"):
        return Fingerprint.of(model)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
