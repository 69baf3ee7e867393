"""The plans of a search: each is the one that the sensitivities, and the attempts before it, predict to be best."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError
from invarlock.exporters.saving import Export
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Loaded, WatchingStreamed
from invarlock.pipeline.planning.plans import keys_named
from invarlock.pipeline.planning.probing import Probe, Rounded
from invarlock.pipeline.planning.search_state import Judged, SearchState
from invarlock.pipeline.planning.sensitivities import AUTO_KEY, Sensitivities, searched_scheme, weighed
from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget, planned_weights, select_targets
from invarlock.reporting.report import SearchPoint, SearchSection
from invarlock.search.candidates import Decision, decisions, schemes_for
from invarlock.search.frontier import Allocation, best_within, smallest
from invarlock.search.steps import Tried, corrected, for_frontier, for_ratio

PROBES = 2
"""The first one is off by what predictions are off, a quarter; the second by what that changes."""


def check_target(config: RunConfig, *, frontier: bool) -> None:
    """Refuse a search for nothing in particular.

    :raises UsageError: with the keys to set.
    """
    if config.edit.is_searched and not config.edit.target.is_set and not frontier:
        targets = "edit.target.max_pm_ratio or edit.target.bits_per_weight"
        raise UsageError(f"{AUTO_KEY} needs a target: set {targets}; invarlock search measures plans of all sizes")


def check_held(config: RunConfig, export: Export, model: nn.Module, tokenizer: Any) -> None:
    """Refuse, before the run starts, a search in which the format of the output holds nothing.

    :raises UsageError: with the reason, and what to use instead.
    """
    with keys_named():
        targets = select_targets(model, config.edit.plan)
    base, held = searched_scheme(config.edit.plan, "largest"), _Held(export, model, tokenizer)
    if not any(held(scheme, [target]) for target in targets for scheme in schemes_for(base, [target])):
        raise UsageError(f"output.format: {held.refusal}; or set output.format to dequantized")


class Search:
    """The plan of the attempt at hand, and its weights.

    :param watched: the baseline.
    :param rounded: makes the roundings that are measured on the preview windows.
    :param export: of a model that is saved: only schemes that its format holds are tried.
    :param folder: of the output, where an interrupted search goes on; None keeps nothing.
    :param frontier: whether plans of all sizes are measured, and not those on the way to a target.
    """

    def __init__(
        self,
        guarding: Guarding,
        watched: Loaded | WatchingStreamed,
        rounded: Rounded,
        export: Export | None,
        folder: Path | None,
        *,
        frontier: bool,
    ) -> None:
        self._config, self._model, self._frontier = guarding.config, watched.model, frontier
        self._began, self._confirms = time.monotonic(), False
        self._probe = Probe(guarding, watched.model, rounded)
        self._sensitivities = Sensitivities.measured(guarding, self._targets, self._probe)
        if not watched.streamed:
            guarding.fisher = self._sensitivities.curvatures
        with guarding.session.clock.stage("candidates"):
            self._decisions = self._candidates(_Held(export, self._model, guarding.baseline.tokenizer))
        self._state = SearchState.opened(folder, self._digest(watched.digest))
        first = self._next() or self._best
        if first is None:
            raise UsageError(f"edit.target.bits_per_weight: the smallest plan has {smallest(self._decisions):.3g}")
        self._take(first)

    @property
    def _targets(self) -> list[WeightTarget]:
        """Found anew, as ``weights`` are."""
        with keys_named():
            return select_targets(self._model, self._config.edit.plan)

    def _candidates(self, held: _Held) -> list[Decision]:
        base, fuse = searched_scheme(self._config.edit.plan, self._sensitivities.scale), self._config.edit.search.fuse
        found = decisions(self._targets, base, self._sensitivities.curvatures, fuse=fuse, holds=held)
        if not all(math.isfinite(choice.rise) for decision in found for choice in decision.choices):
            raise UsageError(f"{AUTO_KEY} predicts the effect of rounding, and weights of this model are not finite")
        return found

    def _digest(self, weights: str) -> str:
        """Of all that judgements of a plan hold for."""
        of = [self._config.as_dict(), weights, self._frontier, self._sensitivities.no_gradients]
        return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()

    def _take(self, allocation: Allocation) -> None:
        self._allocation, self.plan = allocation, allocation.rules

    @property
    def described(self) -> Mapping[str, Any]:
        """The plan as guards and the report have it."""
        return dataclasses.asdict(self.plan)

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return self._allocation.bits_per_weight

    def weights(self) -> list[PlannedWeight]:
        """Those that the plan rounds; found anew, because an adapter that restores a model may put others in place."""
        return self._weights_of(self.plan)

    def _weights_of(self, plan: Rules) -> list[PlannedWeight]:
        return weighed(planned_weights(self._model, plan), self._sensitivities.curvatures)

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        """Plan the next attempt, or the best accepted one again, if others came after it."""
        if self._confirms:
            return False
        last = attempts[-1]
        self._state.add(Judged.of([*self._allocation.places], last.metrics.primary, last.verdict))
        found = self._next()
        if found is None:
            found, self._confirms = self._best, True
            if found is None or found.places == self._allocation.places:
                return False
        self._take(found)
        return True

    @property
    def section(self) -> SearchSection:
        """The search as the report has it."""
        target = self._config.edit.target
        ratio = f"the fewest bits with a ratio of at most {self._config.eval.max_pm_ratio:g}"
        best = f"the best plan with at most {target.bits_per_weight} bits per weight"
        return SearchSection(
            "the frontier" if self._frontier else ratio if target.bits_per_weight is None else best,
            len(self._decisions),
            sorted(map(self._point, self._state.judged), key=lambda point: point.bits_per_weight),
            "relative errors" if self._sensitivities.no_gradients else "gradients",
            self._sensitivities.no_gradients,
            self._probe.passes,
        )

    def finished(self) -> None:
        """Forget what was kept to go on from: the report holds it."""
        self._state.remove()

    def _next(self) -> Allocation | None:
        """The next plan to try, or None where none is worth it, or the attempts or the minutes are used up."""
        search, target = self._config.edit.search, self._config.edit.target
        tried = [Tried(self._allocated(each), _upper(each), each.action.accepted) for each in self._state.judged]
        late = search.max_minutes is not None and time.monotonic() - self._began > 60 * search.max_minutes
        if len(tried) >= search.max_attempts or (late and tried):
            return None
        if self._frontier:
            return for_frontier(self._decisions, search.max_attempts, len(tried))
        if target.bits_per_weight is not None:
            return None if tried else best_within(self._decisions, target.bits_per_weight)
        return for_ratio(self._decisions, self._config.eval.max_pm_ratio, tried, self._correction)

    @cached_property
    def _correction(self) -> float:
        """The factor between rises and their predictions, from plans that are measured on the preview windows."""
        factor = 1.0
        for _ in range(PROBES):
            found = for_ratio(self._decisions, self._config.eval.max_pm_ratio, [], factor)
            upper = self._probe.upper(self._weights_of(found.rules)) if found else None
            if found is None or upper is None:
                break
            factor = corrected(upper, found.rise)
        return factor

    @property
    def _best(self) -> Allocation | None:
        """The smallest plan that was accepted."""
        accepted = [self._allocated(each) for each in self._state.judged if each.action.accepted]
        return min(accepted, key=lambda each: each.bits, default=None)

    def _allocated(self, judged: Judged) -> Allocation:
        return Allocation(self._decisions, judged.places)

    def _point(self, judged: Judged) -> SearchPoint:
        allocation = self._allocated(judged)
        return SearchPoint(
            round(allocation.bits_per_weight, 4),
            allocation.bits // 8,
            math.exp(allocation.rise),
            judged.ratio,
            (judged.ci[0], judged.ci[1]) if judged.ci else None,
            judged.action,
            _as_written(allocation.rules),
        )


@dataclasses.dataclass
class _Held:
    """Schemes that the format of the output can hold, and why it refused the last one."""

    export: Export | None
    model: nn.Module
    tokenizer: Any
    refusal: str = ""

    def __call__(self, scheme: Scheme, targets: Sequence[WeightTarget]) -> bool:
        if self.export is None:
            return True
        exporter = self.export.exporter
        reason = exporter.refuse(scheme, targets, self.model, self.tokenizer)
        if not exporter.mixes:
            reason = "it holds weights of one scheme, and a search gives them several"
        self.refusal = f"{exporter.name}: {reason}" if reason else self.refusal
        return reason is None


def _upper(judged: Judged) -> float | None:
    """The interval's upper end, as a rise of the loss; None where it was not measured."""
    upper = judged.ci[1] if judged.ci else None
    return math.log(upper) if isinstance(upper, float) and 0 < upper < math.inf else None


def _as_written(rules: Rules) -> list[dict[str, Any]]:
    """Rules as a configuration has them, without what is the default."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(Rule)}
    return [
        {key: value for key, value in dataclasses.asdict(rule).items() if value != defaults[key]}
        for rule in rules.rules
    ]
