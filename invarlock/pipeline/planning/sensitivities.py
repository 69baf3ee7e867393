"""How much the loss depends on each weight, measured where a plan or a search needs it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from invarlock.config.schema import PLAN, RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.evaluation.task import LanguageTask
from invarlock.pipeline.guarding import Guarding
from invarlock.quantization.rules import AnyPlan, Rules
from invarlock.quantization.selection import PlannedWeight, WeightTarget
from invarlock.search.fisher import Fisher, fisher_of


def needs_sensitivities(plan: AnyPlan) -> bool:
    """True for a plan whose bits are searched, or whose scales go by the Fisher information."""
    schemes = plan.schemes if isinstance(plan, Rules) else (plan,)
    return any(scheme.is_searched or scheme.scale == "fisher" for scheme in schemes)


def key_of_need(plan: AnyPlan) -> str:
    """The key that asks for sensitivities, with its value."""
    return f"{PLAN}.bitwidth: auto" if plan.is_searched else f"{PLAN}.scale: fisher"


def check_measurable(config: RunConfig, *, streamed: bool, processes: int) -> None:
    """Refuse a plan that needs gradients where they are not to be had.

    :raises UsageError: with the key that asks for them.
    """
    if not needs_sensitivities(config.edit.plan):
        return
    if streamed:
        raise UsageError(f"{key_of_need(config.edit.plan)} needs gradients: run without --stream")
    if processes > 1:
        raise UsageError(f"{key_of_need(config.edit.plan)} needs gradients of the whole model: run in one process")


def measured_sensitivities(guarding: Guarding, model: nn.Module, targets: Sequence[WeightTarget]) -> Fisher:
    """The curvature of the baseline at some weights, on the preview windows.

    :raises UsageError: the model predicts no tokens, or has no gradients.
    """
    key, task = key_of_need(guarding.config.edit.plan), guarding.baseline.task
    if not isinstance(task, LanguageTask) or guarding.windows is None:
        raise UsageError(f"{key} is for models that predict tokens, and this one's task is {task.name}")
    with guarding.session.clock.stage("sensitivities"):
        try:
            return fisher_of(
                model, guarding.windows[0], targets, task=task.predicted, seed=guarding.config.dataset.seed
            )
        except RuntimeError as error:
            raise UsageError(f"{key} needs gradients, and this model has none: {one_line(error)}") from error


def weighed(weights: Sequence[PlannedWeight], fisher: Fisher) -> list[PlannedWeight]:
    """The weights of a plan, each with what its scales go by."""
    return [
        PlannedWeight(each.target, each.scheme, fisher[each.target.parameter_name].columns)
        if each.scheme.scale == "fisher"
        else each
        for each in weights
    ]
