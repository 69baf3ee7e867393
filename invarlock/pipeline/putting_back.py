"""The part of each changed weight in the rise of the loss, measured by putting back one at a time.

All others stay edited meanwhile, and the model runs over the final windows: from the block of the weight on, where
blocks follow each other, and else the whole of it. The control is a random change of the same norm in the same weight:
it tells an edit that hits where it hurts from one that is merely large.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from invarlock.core.errors import one_line
from invarlock.datasets.layout import Windows
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.resuming import Resuming, first_blocks_of, sequence_of_blocks
from invarlock.evaluation.task import LanguageTask
from invarlock.models.facts import device_of, text_config_of
from invarlock.models.snapshot import has_room
from invarlock.pipeline.session import Baseline

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class ChangedWeight:
    """A changed weight of a model, and what it was."""

    name: str
    parameter: nn.Parameter
    before: Callable[[], Tensor]
    """Reads what it was."""
    predicted: float | None
    relative_error: float

    @property
    def place(self) -> tuple[float, float]:
        """Small for what is measured first: what contributes most, as far as that is known."""
        return -(self.predicted or 0.0), -self.relative_error


@dataclass(frozen=True)
class Parts:
    """Of some weights, the parts of the rise that go if each alone is put back, and its control."""

    alone: list[float]
    noise: list[float]
    """The rise from a random change of the same norm in its place."""
    additivity: float | None
    """The sum of all parts over that of the weights put back together."""


@dataclass
class PuttingBack:
    """An edited model whose weights are put back, and its loss with all of them edited."""

    baseline: Baseline
    model: nn.Module
    final: Windows
    """That both models were run over."""
    loss_before: float
    """Of the baseline, nats per token."""
    rise: float
    _starts: dict[int, int] = field(default_factory=dict)
    """The block that a run begins at, by the id of the parameter that it is for; empty until outputs are recorded."""
    _generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self._blocks = sequence_of_blocks(self.model)
        self._resuming = Resuming(self.model, [*self._blocks.values()])

    def parts(self, changes: Sequence[ChangedWeight]) -> Parts:
        starts = self._starts_of(changes)
        self._resuming.starts = {*starts.values()}
        deepest = max(changes, key=lambda change: starts.get(id(change.parameter), 0))
        # No block before it depends on it.
        with self._resuming.recording() if starts else nullcontext():
            first = self._recovered([deepest])
        self._starts = starts
        alone = [first if change is deepest else self._recovered([change]) for change in changes]
        # With noise the rise is that without this weight's change, and what the noise adds.
        noise = [
            self._rise_with_noise(change) - (self.rise - part) for change, part in zip(changes, alone, strict=True)
        ]
        together = first if len(changes) == 1 else self._recovered(changes)
        return Parts(alone, noise, sum(alone) / together if together else None)

    def _recovered(self, changes: Sequence[ChangedWeight]) -> float:
        """The part of the rise that goes if these weights are put back."""
        return self.rise - self._rise_with([(change.parameter, change.before()) for change in changes])

    def _rise_with_noise(self, change: ChangedWeight) -> float:
        """The rise with a random change of the same norm in place of a weight's own."""
        before = change.before()
        norm = torch.linalg.vector_norm(change.parameter.float() - before.float())
        noise = torch.randn(before.shape, generator=self._generator).to(before.device)
        other = (before.float() + noise * (norm / torch.linalg.vector_norm(noise))).to(before.dtype)
        return self._rise_with([(change.parameter, other)])

    def _rise_with(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> float:
        """The rise of the loss, nats per token, with some weights set to other values meanwhile."""
        start = min(self._starts.get(id(parameter), 0) for parameter, _ in values)
        with ExitStack() as stack:
            for parameter, value in values:
                stack.callback(parameter.copy_, parameter.clone())
                parameter.copy_(value)
            measured = self._run(self.final, start)
        return float(measured.losses.sum() / measured.tokens.sum()) - self.loss_before

    def _run(self, final: Windows, start: int = 0) -> PassResult:
        with self._resuming.beginning_at(start):
            measured, _ = self.baseline.run_pass(self.model, (final[:0], final), "attribution")
        return measured

    # -- beginning at a block ------------------------------------------------------------------------------------------

    def _starts_of(self, changes: Sequence[ChangedWeight]) -> dict[int, int]:
        """The block that reads each weight first, by the id of the parameter, where a run can begin there."""
        task, first = self.baseline.task, first_blocks_of(self.model, self._blocks)
        found = {id(change.parameter): first[id(change.parameter)] for change in changes}
        wanted = {start for start in found.values() if start}
        causal = isinstance(task, LanguageTask) and task.predicted == "causal"
        if not wanted or not causal or self.baseline.session.ranks.size > 1 or not self._has_room(wanted):
            return {}
        window, self._resuming.starts = self.final[:1], wanted
        with self._resuming.recording():
            whole = self._run(window)
        can = {start for start in wanted if self._resuming.is_sequence and self._reproduces(whole, window, start)}
        return {parameter: start for parameter, start in found.items() if start in can}

    def _reproduces(self, whole: PassResult, window: Windows, start: int) -> bool:
        """True if a run from a block on gives the losses of the whole model, to the last bit."""
        try:
            return np.array_equal(self._run(window, start).losses, whole.losses)
        except Exception as error:
            # Later blocks may read what earlier ones leave elsewhere, as keys and values that they share.
            log.info("the model cannot run from block %d on: %s", start, one_line(error))
            return False

    def _has_room(self, starts: set[int]) -> bool:
        """True if there is memory for the hidden states at some blocks."""
        size = getattr(text_config_of(self.model), "hidden_size", None)
        if not isinstance(size, int):
            return False
        nbytes = len(starts) * self.final.input_ids.numel() * size * next(self.model.parameters()).element_size()
        return has_room(nbytes, device_of(self.model))
