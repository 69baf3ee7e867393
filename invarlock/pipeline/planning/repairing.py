"""Repair of a plan after a rollback: more bits, or none of it, for the weights that the verdict blames."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from invarlock.core.results import SuspectedModule
from invarlock.evaluation.results import DivergenceResult, MetricResult
from invarlock.pipeline.planning.contributions import Contribution
from invarlock.pipeline.suspects import MOST
from invarlock.quantization.partners import partners_of
from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget
from invarlock.reporting.report import MetricsSection

SPARED = 0.8
"""Of the rise of the loss that is within the limit, what a first repair aims at: the share of each weight in it is a
prediction, and those are right to a quarter. A second one aims at 0.8 times that, and so on: rounding that moves other
weights is luck, too, and few attempts are left."""
DECIDING = ("kl_mean", "kl_p95", "kl_p99", "window_p95")
"""Figures of the predictions that reject; they grow with the square of the rounding error, as the loss does."""

Widen = Callable[[Scheme, Sequence[WeightTarget]], Scheme | None]
"""The next wider scheme for some weights, or None where there is none: they are left alone then."""


@dataclass(frozen=True)
class Part:
    """Weights that share a scheme, because engines fuse them."""

    targets: tuple[WeightTarget, ...]
    scheme: Scheme | None
    """None where they are left alone."""
    share: float
    """In the predicted rise of the loss, in its unit."""

    @property
    def names(self) -> list[str]:
        return [target.name for target in self.targets]

    @property
    def bits(self) -> int:
        return sum(PlannedWeight.bits_of(target, self.scheme) for target in self.targets)


@dataclass(frozen=True)
class Repair:
    """Ways to change parts of a plan."""

    widen: Widen
    contribution: Contribution

    def parts_of(self, targets: Sequence[WeightTarget], schemes: Mapping[str, Scheme]) -> list[Part]:
        """The weights of a plan, as they are rounded now.

        :param schemes: of the rounded ones, by the name of the parameter.
        """
        return [self._part(together, schemes.get(together[0].parameter_name)) for together in partners_of(targets)]

    def widened(self, part: Part) -> Part:
        """The part with the next wider scheme, or left alone."""
        return self._part(part.targets, self.widen(part.scheme, part.targets) if part.scheme else None)

    def _part(self, targets: tuple[WeightTarget, ...], scheme: Scheme | None) -> Part:
        return Part(targets, scheme, self.contribution(targets, scheme) if scheme else 0.0)

    def repaired(
        self, parts: Sequence[Part], suspects: Sequence[SuspectedModule], within: float | None, *, failed: int = 1
    ) -> Rules | None:
        """A plan with more bits where they are needed, or None where nothing is left to round.

        What is blamed gets a bit more, or is left alone where it has all bits; without any suspect that is what
        contributes most. If the outputs were measured, further bits go where they take most from the predicted rise for
        their number, until it is within the limit.

        :param within: the share of the rise that is within the limit; None where all of it is, or it was not measured.
        :param failed: number of attempts so far.
        """
        parts = list(parts)
        allowed = sum(part.share for part in parts) * (1 if within is None else SPARED**failed * within)
        for place in _blamed(parts, suspects):
            parts[place] = self.widened(parts[place])
        wider = {place: self.widened(part) for place, part in enumerate(parts) if part.scheme}
        while wider and sum(part.share for part in parts) > allowed:
            best = max(wider, key=lambda place: _gain(parts[place], wider[place]))
            parts[best] = wider.pop(best)
            if parts[best].scheme:
                wider[best] = self.widened(parts[best])
        return as_rules(parts)


def _blamed(parts: Sequence[Part], suspects: Sequence[SuspectedModule]) -> list[int]:
    """Places of parts that are rounded and suspected; if there is no suspect, of those with the largest shares."""
    rounded = [place for place, part in enumerate(parts) if part.scheme]
    found = [place for place in rounded if any(_is_of(parts[place], suspect.module) for suspect in suspects)]
    return found or sorted(rounded, key=lambda place: -parts[place].share)[:MOST]


def _is_of(part: Part, module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in part.names)


def _gain(part: Part, wider: Part) -> float:
    """The rise that each additional bit takes away."""
    return (part.share - wider.share) / max(wider.bits - part.bits, 1)


def as_rules(parts: Iterable[Part]) -> Rules | None:
    """A rule for each scheme, with the fewest weights first; None if none is rounded."""
    names: dict[Scheme | None, list[str]] = {}
    for part in parts:
        names.setdefault(part.scheme and part.scheme.alone, []).extend(part.names)
    if not any(names):
        return None
    return Rules(
        tuple(
            Rule(match=tuple(of_it), **(dataclasses.asdict(scheme) if scheme else {"keep": True}))
            for scheme, of_it in sorted(names.items(), key=lambda entry: len(entry[1]))
        )
    )


def share_within(metrics: MetricsSection) -> float | None:
    """The share of the measured rise that is within all limits; None where all of it is, or nothing was measured."""
    shares = [*_of_metric(metrics.primary), *_of_predictions(metrics.predictions)]
    beyond = [share for share in shares if share < 1]
    return min(beyond, default=None)


def _of_metric(metric: MetricResult | None) -> Iterable[float]:
    if metric is None or metric.ci is None:
        return
    upper = float(metric.ci[1])
    if metric.is_distance:
        yield metric.limit / upper if upper > 0 else 1.0
    elif upper > 1:
        yield math.log(metric.limit) / math.log(upper)


def _of_predictions(predictions: DivergenceResult | None) -> Iterable[float]:
    if predictions is None or predictions.limits is None:
        return
    for name in DECIDING:
        value = getattr(predictions, name)
        # One that is not finite tells of no share.
        if value is not None and value > 0:
            yield getattr(predictions.limits, name) / value
