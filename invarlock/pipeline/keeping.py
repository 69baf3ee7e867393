"""The baseline of a run, kept so that it can be brought back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from invarlock.checkpoints.streaming import Streaming
from invarlock.core.errors import PluginError
from invarlock.distributed.dtensor import sharding_of
from invarlock.models.fingerprint import Fingerprint
from invarlock.models.state import ModelState
from invarlock.pipeline.clock import Clock
from invarlock.plugins.adapter import Adapter


class Watched(Protocol):
    """A model that plugins look at and may not change."""

    def undo(self) -> list[str]:
        """Undo what was changed of it, and name that."""

    def settle(self) -> None:
        """Take what differs by now, and is not stored, as the model's own doing: it ran, and nothing else did."""


@dataclass(frozen=True)
class Loaded:
    """A model as it was right after loading, and how to tell whether it still is."""

    model: torch.nn.Module
    fingerprint: Fingerprint
    state: ModelState
    clock: Clock
    recomputed: set[str] = field(default_factory=set)
    """Buffers that the model's own code computes anew while it runs."""

    @classmethod
    def of(cls, model: torch.nn.Module, clock: Clock) -> Loaded:
        # Guards see a view of a model that is spread over processes, and torch hooks into the model itself as it runs.
        state = ModelState([], {}) if sharding_of(model) else ModelState.of(model)
        return cls(model, fingerprint_of(model, clock), state, clock)

    def settle(self) -> None:
        """Take what differs by now and is not stored as the model's own doing: it ran, and nothing else did."""
        self.state.settle()
        with self.clock.stage("fingerprint"):
            now, before = Fingerprint.of(self.model, only_computed=True), self.fingerprint
        self.recomputed.update(name for name in now.computed if now.tensors[name] != before.tensors.get(name))

    def differing(self, expected: Fingerprint | None = None) -> list[str]:
        """Names of tensors that are no longer what was loaded, or ``expected``."""
        differing = fingerprint_of(self.model, self.clock).changed_since(expected or self.fingerprint)
        return [name for name in differing if name not in self.recomputed]

    def undo(self, bring_back: Callable[[], object], expected: Fingerprint | None = None) -> list[str]:
        """Names of what differs of the model; it is as it was afterwards.

        :param bring_back: does so with weights, where they differ.
        :param expected: the weights, if not those that were loaded.
        """
        state = self.state.undo()
        weights = self.differing(expected)
        if weights:
            bring_back()
        return [*weights, *state]


@dataclass(frozen=True)
class Watching:
    """A model in memory as it has to be."""

    loaded: Loaded
    bring_back: Callable[[], object]
    """Makes its weights that again."""
    expected: Fingerprint | None = None
    """Of the weights, if they are not those that were loaded."""

    def undo(self) -> list[str]:
        return self.loaded.undo(self.bring_back, self.expected)

    def settle(self) -> None:
        self.loaded.settle()


@dataclass(frozen=True)
class WatchingStreamed:
    """A model whose weights are on disk, and its edit, as they have to be."""

    model: torch.nn.Module
    streaming: Streaming
    state: ModelState

    @classmethod
    def of(cls, model: torch.nn.Module, streaming: Streaming) -> WatchingStreamed:
        return cls(model, streaming, ModelState.of(model))

    def undo(self) -> list[str]:
        return [*self.state.undo(), *self.streaming.undo(self.model)]

    def settle(self) -> None:
        self.state.settle()
        self.streaming.settle(self.model)


class Gone:
    """A model that is not there any more: nobody can change it."""

    def undo(self) -> list[str]:
        return []

    def settle(self) -> None:
        pass


@dataclass(frozen=True)
class Keeper:
    """The baseline of a run: brings it back, and tells whether a model still is what it was."""

    adapter: Adapter
    loaded: Loaded
    snapshot: Any

    @classmethod
    def of(cls, loaded: Loaded, adapter: Adapter) -> Keeper:
        """Take a snapshot of a model that is as it was loaded.

        :raises PluginError: it no longer is.
        """
        with loaded.clock.stage("snapshot"):
            snapshot = adapter.snapshot(loaded.model)
        keeper = cls(adapter, loaded, snapshot)
        if changed := loaded.undo(lambda: None):
            raise PluginError(f"adapter {adapter.name}: the model changed after it was loaded: {some(changed)}")
        return keeper

    @property
    def fingerprint(self) -> Fingerprint:
        return self.loaded.fingerprint

    def restore(self, *, check: bool = True) -> None:
        """Bring the baseline back.

        :param check: look whether it is what it was.
        :raises PluginError: when the adapter's snapshot did not bring it back bit for bit.
        """
        loaded = self.loaded
        loaded.state.undo()
        with loaded.clock.stage("restore"):
            self.adapter.restore(loaded.model, self.snapshot)
        loaded.state.undo()
        if check and (changed := loaded.differing()):
            raise PluginError(
                f"adapter {self.adapter.name}: restore did not bring the baseline back: {some(changed)} differ"
            )

    @property
    def baseline(self) -> Watching:
        """The baseline as it has to stay."""
        return Watching(self.loaded, self.restore)


def fingerprint_of(model: torch.nn.Module, clock: Clock) -> Fingerprint:
    with clock.stage("fingerprint"):
        return Fingerprint.of(model)


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
