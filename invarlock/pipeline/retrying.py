"""The plan of each attempt of a run: the configured one, and after a rollback one with more bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from invarlock.config.schema import RunConfig
from invarlock.exporters.saving import Export
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.plans import keys_named, plans_of, wider
from invarlock.pipeline.repairing import parts_of, repaired, share_within, shares_by_error
from invarlock.pipeline.sensitivities import weighed
from invarlock.quantization.rules import AnyPlan
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget, planned_weights
from invarlock.search.fisher import Fisher


class Retries:
    """The plan of the attempt at hand, and its weights.

    :param export: of a model that is saved: only schemes that its format holds are tried.
    """

    def __init__(self, config: RunConfig, model: nn.Module, tokenizer: Any, export: Export | None) -> None:
        self._config, self._model, self._tokenizer, self._export = config, model, tokenizer, export
        self.plan: AnyPlan = config.edit.plan
        self.fisher: Fisher | None = None
        """Once it is measured, where scales go by it."""
        self.targets = [planned.target for planned in self.weights()]

    @property
    def described(self) -> Mapping[str, Any]:
        """The plan as guards and the report have it."""
        return dataclasses.asdict(self.plan)

    def weights(self) -> list[PlannedWeight]:
        """Those that the plan rounds; found anew, because an adapter that restores a model may put others in place."""
        with keys_named():
            weights = planned_weights(self._model, self.plan)
        return weighed(weights, self.fisher) if self.fisher else weights

    @property
    def bits_per_weight(self) -> float:
        """Scales included, of all weights that the first plan rounds, whether or not a later one leaves them alone."""
        schemes = self._schemes()
        bits = sum(PlannedWeight.bits_of(target, schemes.get(target.parameter_name)) for target in self.targets)
        return bits / max(sum(target.parameter.numel() for target in self.targets), 1)

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        """Plan the next attempt after a rollback; False where there is none."""
        if attempts[-1].verdict.accepted:
            return False
        plan = self._next(attempts) if len(attempts) < self._config.edit.retry.max_attempts else None
        if plan is None or plan == self.plan:
            return False
        self.plan = plan
        return True

    def _next(self, attempts: Sequence[Attempt]) -> AnyPlan | None:
        if self._config.edit.retry.strategy == "uniform":
            plans = plans_of(self._config)
            return plans[len(attempts)] if len(attempts) < len(plans) else None
        last = attempts[-1]
        shares = shares_by_error(last.modules, self.targets)
        parts = parts_of(self.targets, self._schemes(), shares)
        return repaired(parts, last.verdict.suspects, within=share_within(last.metrics), widen=self._widen)

    def _schemes(self) -> dict[str, Scheme]:
        return {planned.target.parameter_name: planned.scheme for planned in self.weights()}

    def _widen(self, scheme: Scheme, targets: Sequence[WeightTarget]) -> Scheme | None:
        """The next wider scheme that the format of the output holds, or None."""
        while (candidate := wider(scheme)) != scheme:
            if not self._is_refused(candidate, targets):
                return candidate
            scheme = candidate
        return None

    def _is_refused(self, scheme: Scheme, targets: Sequence[WeightTarget]) -> bool:
        if self._export is None:
            return False
        return self._export.exporter.refuse(scheme, targets, self._model, self._tokenizer) is not None
