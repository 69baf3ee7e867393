"""Probes of a search: plans measured on the preview windows, so that those of the verdict stay unseen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

from invarlock.datasets.layout import Windows
from invarlock.evaluation.confidence_sequence import errors_reached
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.statistics import mean_per_token, standard_error
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Keeper
from invarlock.quantization.model import quantize_weights
from invarlock.quantization.selection import PlannedWeight


@dataclass(frozen=True)
class Probe:
    """The preview windows, and the baseline, which is in memory before and after each measurement."""

    guarding: Guarding
    keeper: Keeper
    preview: Windows

    def upper(self, weights: Sequence[PlannedWeight]) -> float | None:
        """The upper end to expect of the rise of the loss on the final windows, nats per token; None if not finite."""
        before = self._baseline
        with self.guarding.session.clock.stage("probe"):
            quantize_weights(weights, measure=False)
            after = self._measured()
            self.keeper.restore()
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

    @cached_property
    def _baseline(self) -> PassResult:
        with self.guarding.session.clock.stage("probe"):
            return self._measured()

    def _measured(self) -> PassResult:
        model = self.keeper.baseline.model
        return self.guarding.baseline.task.measure(model, self.preview[:0], self.preview)
