"""Probes of a search: roundings measured on the preview windows, so that those of the verdict stay unseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import NormalDist

from torch import nn

from invarlock.evaluation.confidence_sequence import errors_reached
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.statistics import mean_per_token, standard_error
from invarlock.evaluation.taps import Tap, attached
from invarlock.pipeline.guarding import Guarding
from invarlock.quantization.selection import PlannedWeight

Rounded = Callable[[Sequence[PlannedWeight]], AbstractContextManager[None]]
"""A block in which some weights are rounded, and after which the model is the baseline again, bit for bit."""


@dataclass
class Probe:
    """Measurements on the preview windows; the model is the baseline before and after each."""

    guarding: Guarding
    model: nn.Module
    rounded: Rounded
    passes: int = 0
    """Over the preview windows, so far."""
    _before: PassResult | None = None

    def observe(self, taps: Mapping[str, Tap]) -> None:
        """Run the baseline with taps on it, by module name; measurements from now on are held against this pass."""
        with attached(self.model, taps):
            self._before = self._measured(None)

    def upper(self, weights: Sequence[PlannedWeight]) -> float | None:
        """The upper end to expect of the rise of the loss on the final windows, nats per token; None if not finite."""
        before, after = self._baseline, self._after(weights)
        differences = after.losses - before.losses
        rise = float(mean_per_token(differences, before.tokens))
        if len(differences) > 1:
            config, windows = self.guarding.config, self.guarding.baseline.dataset.final_n
            level = config.eval.metric.ci_level
            of_fixed = NormalDist().inv_cdf((1 + level) / 2)
            reach = errors_reached(windows, level) if config.dataset.is_stepped else of_fixed
            # The interval narrows with the root of the number of windows.
            rise += reach * float(standard_error(differences, before.tokens)) * math.sqrt(len(differences) / windows)
        return rise if math.isfinite(rise) else None

    def divergence(self, weights: Sequence[PlannedWeight]) -> float:
        """How far predictions move, nats per token: the rise to expect of the loss, with far less noise."""
        changes = self._after(weights).changes
        return float(changes.kl.mean()) if changes is not None else math.nan

    def _after(self, weights: Sequence[PlannedWeight]) -> PassResult:
        record = self._baseline.record
        with self.rounded(weights):
            return self._measured(record)

    @property
    def _baseline(self) -> PassResult:
        if self._before is None:
            self.observe({})
        assert self._before is not None
        return self._before

    def _measured(self, record: TokenRecord | None) -> PassResult:
        self.passes += 1
        assert self.guarding.windows is not None
        task, preview = self.guarding.baseline.task, self.guarding.windows[0]
        with self.guarding.session.clock.stage("probe"):
            return task.measure(self.model, preview[:0], preview, reference=record)
