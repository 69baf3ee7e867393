"""The contribution of each weight to the rise of the loss, as it is predicted for any scheme before that is tried."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from torch import nn

from invarlock.core.errors import UsageError
from invarlock.core.results import EditedWeight
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.planning.sensitivities import measured_fisher
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget
from invarlock.search.candidates import Sample
from invarlock.search.fisher import Curvature, Fisher

log = logging.getLogger("invarlock")

LEFT_OF_ERROR = 0.25
"""Of the squared rounding error, what one more bit leaves: steps are half as wide."""

Contribution = Callable[[Sequence[WeightTarget], Scheme], float]
"""Predicted rise of the loss from rounding some weights, in a unit that all weights share."""


def fisher_or_none(guarding: Guarding, model: nn.Module, targets: Sequence[WeightTarget]) -> Fisher | None:
    """The curvature of a baseline on its preview windows; None where gradients of the whole model cannot be had.

    :param model: the baseline, as it is unedited.
    """
    session = guarding.session
    if guarding.windows is None or guarding.baseline.sharding is not None or session.ranks.size > 1:
        return None
    try:
        return measured_fisher(guarding, model, targets)
    except UsageError:
        # Of a task that predicts no tokens, or where an operation of the model's own has no derivative.
        log.info("there are no gradients of the baseline: weights are told apart by their relative errors")
        return None


def by_curvature(curvatures: Mapping[str, Curvature], candidates: Iterable[PlannedWeight]) -> Contribution:
    """By the curvature and the error of rounding, in nats per token.

    :param candidates: all that will be asked for, while the weights are those of the baseline; weight by weight.
    """
    rises: dict[tuple[str, Scheme], float] = {}
    for target, schemes in groupby(candidates, lambda planned: planned.target):
        sample = Sample.of(target, curvatures[target.parameter_name])
        rises |= {(target.parameter_name, each.scheme.alone): sample.rise(each.scheme) for each in schemes}

    def contribution(targets: Sequence[WeightTarget], scheme: Scheme) -> float:
        return sum(rises[target.parameter_name, scheme.alone] for target in targets)

    return contribution


def by_errors(modules: Sequence[EditedWeight], schemes: Mapping[str, Scheme]) -> Contribution:
    """By the squared relative errors of an attempt, and what each further bit leaves of them.

    For small errors the loss rises with their weighted sum (Malinovskii et al. 2024, "Pushing the Limits of Large
    Language Model Quantization via the Linearity Theorem"); the weights are taken as equal.

    :param schemes: of the attempt, by the name of the parameter.
    """
    errors = {module.name: module.relative_error or 0.0 for module in modules}

    def contribution(targets: Sequence[WeightTarget], scheme: Scheme) -> float:
        return sum(
            errors.get(target.name, 0.0) ** 2
            * LEFT_OF_ERROR ** (scheme.bitwidth - schemes[target.parameter_name].bitwidth)
            for target in targets
            if target.parameter_name in schemes
        )

    return contribution
