"""The plan of each attempt of a run: the configured one, and after a rollback one with more bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from invarlock.config.schema import RunConfig
from invarlock.exporters.saving import Export
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.planning.contributions import Contribution, by_curvature, by_errors
from invarlock.pipeline.planning.plans import keys_named, plans_of, wider
from invarlock.pipeline.planning.repairing import Repair, share_within
from invarlock.pipeline.planning.sensitivities import Sensitivities, weighed
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
        """The Fisher information, or curvature by inputs, once it is measured where scales go by it."""
        self._contribution: Contribution | None = None
        self._learned = False
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

    def candidates(self) -> Iterator[PlannedWeight]:
        """Each weight with its scheme, and with all that a repair may give it."""
        for planned in self.weights():
            scheme: Scheme | None = planned.scheme
            while scheme:
                yield PlannedWeight(planned.target, scheme)
                scheme = self._widen(scheme, [planned.target])

    def wants_sensitivities(self, attempts: Sequence[Attempt]) -> bool:
        """True where the next plan will be a repair, and nothing was learned of the baseline yet."""
        repairs = self._config.edit.retry.strategy == "suspects" and self._goes_on(attempts)
        return repairs and not self._learned

    def learn(self, sensitivities: Sensitivities | None) -> None:
        """Predict what each weight contributes to the rise of the loss, while they are those of the baseline."""
        self._learned = True
        if sensitivities:
            self._contribution = by_curvature(sensitivities.curvatures, self.candidates())

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        """Plan the next attempt after a rollback; False where there is none."""
        plan = self._next(attempts) if self._goes_on(attempts) else None
        if plan is None or plan == self.plan:
            return False
        self.plan = plan
        return True

    def _goes_on(self, attempts: Sequence[Attempt]) -> bool:
        return not attempts[-1].verdict.accepted and len(attempts) < self._config.edit.retry.max_attempts

    def _next(self, attempts: Sequence[Attempt]) -> AnyPlan | None:
        if self._config.edit.retry.strategy == "uniform":
            plans = plans_of(self._config)
            return plans[len(attempts)] if len(attempts) < len(plans) else None
        last, schemes = attempts[-1], self._schemes()
        repair = Repair(self._widen, self._contribution or by_errors(last.modules, schemes))
        parts = repair.parts_of(self.targets, schemes)
        return repair.repaired(parts, last.verdict.suspects, share_within(last.metrics), failed=len(attempts))

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
