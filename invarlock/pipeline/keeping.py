"""The baseline of a run, kept so that it can be brought back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from invarlock.checkpoints.streaming import Streaming
from invarlock.core.errors import PluginError
from invarlock.distributed.dtensor import sharding_of
from invarlock.models.fingerprint import NOTHING_KNOWN, Fingerprint, named_tensors
from invarlock.models.state import ModelState
from invarlock.pipeline.clock import Clock
from invarlock.plugins.adapter import Adapter


class Watched(Protocol):
    """A model that plugins look at and may not change."""

    @property
    def streamed(self) -> bool:
        """True where its weights stay on disk."""

    @property
    def digest(self) -> str:
        """Of its weights, as they have to be."""

    @property
    def prints(self) -> Prints | None:
        """Of its tensors, where they are in memory."""

    def undo(self, *, quick: bool = False) -> list[str]:
        """Undo what was changed of it, and name that.

        :param quick: do not read tensors again that torch has counted no change of since the last time: it counts those
            of any code that does not mean to get around it.
        """

    def settle(self) -> None:
        """Take what differs by now, and is not stored, as the model's own doing: it ran, and nothing else did."""


@dataclass(frozen=True)
class Prints:
    """Digests of a model's tensors at one moment."""

    fingerprint: Fingerprint
    marks: Fingerprint
    """Digests to compare with after every call of a plugin; on a CPU quicker ones than the fingerprint's."""

    @classmethod
    def of(cls, model: torch.nn.Module, clock: Clock, by_mark: Mapping[str, str] = NOTHING_KNOWN) -> Prints:
        """
        :param by_mark: of tensors that the model may have, too.
        """
        marks = _marks_of(model, clock)
        known = {name: by_mark[mark] for name, mark in marks.tensors.items() if mark in by_mark}
        return cls(marks if marks.portable else fingerprint_of(model, clock, known), marks)

    @property
    def by_mark(self) -> dict[str, str]:
        """Digests of the fingerprint by the mark of their tensor: where marks are equal, so are digests."""
        marks = self.marks.tensors
        return {marks[name]: digest for name, digest in self.fingerprint.tensors.items() if marks[name] != digest}


@dataclass(frozen=True)
class Loaded:
    """A model in memory as it has to be: as it was right after loading, or as an edit left it."""

    model: torch.nn.Module
    clock: Clock
    state: ModelState
    prints: Prints
    bring_back: Callable[[], object]
    """Makes its weights that again."""
    recomputed: set[str] = field(default_factory=set)
    """Buffers that the model's own code computes anew while it runs."""
    versions: dict[str, object] = field(default_factory=dict)
    """Of its tensors when they were last read, and were what they have to be."""
    streamed = False

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        clock: Clock,
        bring_back: Callable[[], object] = lambda: None,
        by_mark: Mapping[str, str] = NOTHING_KNOWN,
    ) -> Loaded:
        """
        :param by_mark: of tensors that the model may have, too.
        """
        # Guards see a view of a model that is spread over processes, and torch hooks into the model itself as it runs.
        state = ModelState([], {}) if sharding_of(model) else ModelState.of(model)
        return cls(model, clock, state, Prints.of(model, clock, by_mark), bring_back)

    def edited(self, bring_back: Callable[[], object]) -> Loaded:
        """The model as it has to be from now on: its weights are edited."""
        return replace(
            self, prints=Prints.of(self.model, self.clock, self.prints.by_mark), bring_back=bring_back, versions={}
        )

    @property
    def digest(self) -> str:
        return self.prints.fingerprint.digest

    def differing(self, *, quick: bool = False) -> list[str]:
        """Names of tensors that are not what they have to be."""
        versions = {name: _version_of(tensor) for name, tensor in named_tensors(self.model)}
        if quick and versions == self.versions:
            return []
        marks = self.prints.marks
        changed = _marks_of(self.model, self.clock, portable=marks.portable).changed_since(marks)
        found = [name for name in changed if name not in self.recomputed]
        self.versions.clear()
        self.versions.update({} if found else versions)
        return found

    def undo(self, *, quick: bool = False) -> list[str]:
        state = self.state.undo()
        weights = self.differing(quick=quick)
        if weights:
            self.bring_back()
        return [*weights, *state]

    def settle(self) -> None:
        self.state.settle()
        marks = self.prints.marks
        with self.clock.stage("fingerprint"):
            now = Fingerprint.of(self.model, only_computed=True, portable=marks.portable)
        self.recomputed.update(name for name in now.computed if now.tensors[name] != marks.tensors.get(name))


@dataclass(frozen=True)
class WatchingStreamed:
    """A model whose weights are on disk, and its edit, as they have to be."""

    model: torch.nn.Module
    streaming: Streaming
    state: ModelState
    plan: Mapping[str, Any] | None = None
    """Of the edit."""
    streamed = True
    prints = None

    @classmethod
    def of(cls, model: torch.nn.Module, streaming: Streaming) -> WatchingStreamed:
        return cls(model, streaming, ModelState.of(model))

    @property
    def digest(self) -> str:
        return self.streaming.checkpoint.fingerprint(self.plan)

    def undo(self, *, quick: bool = False) -> list[str]:
        return [*self.state.undo(), *self.streaming.undo(self.model)]

    def settle(self) -> None:
        self.state.settle()
        self.streaming.settle(self.model)


@dataclass(frozen=True)
class Gone:
    """A model that is not there any more: nobody can change it."""

    digest: str = ""
    streamed: bool = False
    prints: Prints | None = None

    @classmethod
    def of(cls, watched: Watched) -> Gone:
        return cls(watched.digest, watched.streamed, watched.prints)

    def undo(self, *, quick: bool = False) -> list[str]:
        return []

    def settle(self) -> None:
        pass


class Keeper:
    """The baseline of a run in memory, which its adapter brings back bit for bit.

    :param loaded: as it was right after loading.
    :raises PluginError: it no longer is that.
    """

    def __init__(self, loaded: Loaded, adapter: Adapter) -> None:
        self._loaded, self._adapter = loaded, adapter
        with loaded.clock.stage("snapshot"):
            self.snapshot = adapter.snapshot(loaded.model)
        if changed := loaded.undo():
            raise PluginError(f"adapter {adapter.name}: the model changed after it was loaded: {some(changed)}")

    @property
    def baseline(self) -> Loaded:
        """The baseline as it has to stay."""
        # Not kept: a cycle would keep the snapshot's folder, too.
        return replace(self._loaded, bring_back=self.restore)

    def restore(self, *, check: bool = True) -> None:
        """Bring the baseline back.

        :param check: look whether it is what it was.
        :raises PluginError: when the adapter's snapshot did not bring it back bit for bit.
        """
        loaded = self._loaded
        loaded.state.undo()
        with loaded.clock.stage("restore"):
            self._adapter.restore(loaded.model, self.snapshot)
        loaded.state.undo()
        if check and (changed := loaded.differing()):
            raise PluginError(
                f"adapter {self._adapter.name}: restore did not bring the baseline back: {some(changed)} differ"
            )


def fingerprint_of(model: torch.nn.Module, clock: Clock, known: Mapping[str, str]) -> Fingerprint:
    """
    :param known: digests by the name of the tensor, of those that need not be read.
    """
    with clock.stage("fingerprint"):
        return Fingerprint.of(model, known=known)


def _marks_of(model: torch.nn.Module, clock: Clock, *, portable: bool | None = None) -> Fingerprint:
    """
    :param portable: as those that they are compared with; by default what takes less time where the model is.
    """
    if portable is None:
        portable = any(tensor.device.type != "cpu" for _, tensor in named_tensors(model))
    with clock.stage("fingerprint"):
        return Fingerprint.of(model, portable=portable)


def _version_of(tensor: torch.Tensor) -> object:
    """Equal to what it was as long as torch has counted no change; to nothing, where it does not count."""
    counted = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_inference()
    return (tensor.data_ptr(), tensor._version) if counted else object()


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
