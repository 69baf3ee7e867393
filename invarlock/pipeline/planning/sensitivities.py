"""How much the loss depends on each weight, measured where a plan or a search needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from invarlock.config.schema import PLAN, RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.evaluation.task import LanguageTask
from invarlock.models.facts import is_streamed
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.planning.probing import Probe
from invarlock.quantization.rules import AnyPlan, Rule, Rules
from invarlock.quantization.scheme import Plan, Scale, Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget, planned_weights
from invarlock.search.fisher import Curvature, Fisher, fisher_of
from invarlock.search.linearity import by_inputs, fitted, input_taps

AUTO_KEY = f"{PLAN}.bitwidth: auto"
FISHER_KEY = f"{PLAN}.scale: fisher"


class NoGradientsError(UsageError):
    """A model that cannot be run backwards, and the reason."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key} needs gradients, and this model has none: {reason}")
        self.reason = reason


def needs_sensitivities(plan: AnyPlan) -> bool:
    """True for a plan whose bits are searched, or whose scales go by what the baseline does on the preview windows."""
    return plan.is_searched or scales_of(plan) != {"largest"}


def scales_of(plan: AnyPlan) -> set[Scale]:
    """Kinds of scales of a plan."""
    return {scheme.scale for scheme in (plan.schemes if isinstance(plan, Rules) else (plan,))}


def check_measurable(config: RunConfig, *, streamed: bool, processes: int) -> None:
    """Refuse a plan that needs sensitivities where they are not to be had.

    :raises UsageError: with the key that asks for them.
    """
    plan = config.edit.plan
    if not needs_sensitivities(plan):
        return
    if processes > 1:
        raise UsageError(f"{_key_of_need(plan)} needs the whole model in one process: run without torchrun")
    if {"inputs", "fisher"} <= scales_of(plan):
        raise UsageError(f"{PLAN}: rules have scale inputs and scale fisher: give all of them the same")
    if streamed and "fisher" in scales_of(plan):
        raise UsageError(f"{FISHER_KEY} needs gradients: run without --stream, or set scale to inputs")
    if streamed and config.dataset.is_generated:
        raise UsageError(
            f"{_key_of_need(plan)} needs text where a model is streamed: set dataset.provider and dataset.path"
        )


def measured_fisher(guarding: Guarding, model: nn.Module, targets: Sequence[WeightTarget]) -> Fisher:
    """The curvature of the baseline at some weights, on the preview windows.

    :raises UsageError: the model predicts no tokens.
    :raises NoGradientsError: it cannot be run backwards.
    """
    key, task = _key_of_need(guarding.config.edit.plan), _task_of(guarding)
    assert guarding.windows is not None
    with guarding.session.clock.stage("sensitivities"):
        try:
            return fisher_of(
                model, guarding.windows[0], targets, task=task.predicted, seed=guarding.config.dataset.seed
            )
        except RuntimeError as error:
            raise NoGradientsError(key, one_line(error)) from error


def _task_of(guarding: Guarding) -> LanguageTask:
    key, task = _key_of_need(guarding.config.edit.plan), guarding.baseline.task
    if not isinstance(task, LanguageTask) or guarding.windows is None:
        raise UsageError(f"{key} is for models that predict tokens, and this one's task is {task.name}")
    return task


@dataclass(frozen=True)
class Sensitivities:
    """The curvature at some weights, by the name of the parameter, and where it is from."""

    curvatures: Mapping[str, Curvature]
    no_gradients: str = ""
    """The reason why it was fitted to relative errors; empty where it is the Fisher information."""

    @classmethod
    def measured(cls, guarding: Guarding, targets: Sequence[WeightTarget], probe: Probe) -> Sensitivities:
        """By gradients, or where there are none by relative errors; the model is the baseline before and after.

        :raises UsageError: the model predicts no tokens.
        """
        _task_of(guarding)
        if is_streamed(probe.model):
            return cls.by_relative_errors(targets, probe, "its weights are streamed")
        try:
            fisher = guarding.fisher or measured_fisher(guarding, probe.model, targets)
        except NoGradientsError as error:
            return cls.by_relative_errors(targets, probe, error.reason)
        if not all(curvature.is_finite for curvature in fisher.values()):
            return cls.by_relative_errors(targets, probe, "they are not finite")
        return cls(fisher)

    @classmethod
    def by_relative_errors(cls, targets: Sequence[WeightTarget], probe: Probe, reason: str) -> Sensitivities:
        """Fitted with measured changes of families of weights."""
        inputs = input_taps(targets)
        probe.observe(inputs)

        def divergence(scheme: Scheme, names: Sequence[str]) -> float:
            # Found anew, because an adapter that restores a model may put others in place.
            rule = Rule(match=tuple(names), **dataclasses.asdict(scheme))
            return probe.divergence(planned_weights(probe.model, Rules((rule,))))

        return cls(fitted(targets, inputs, divergence), reason)

    @property
    def scale(self) -> Scale:
        """The kind of scales that goes by them."""
        return "inputs" if self.no_gradients else "fisher"


def measured_inputs(guarding: Guarding, targets: Sequence[WeightTarget], probe: Probe) -> Mapping[str, Curvature]:
    """Mean squares of inputs, which scales go by without gradients; of one pass over the preview windows.

    :raises UsageError: the model predicts no tokens.
    """
    _task_of(guarding)
    inputs = input_taps(targets)
    probe.observe(inputs)
    return by_inputs(targets, inputs)


def sensitivities_or_none(guarding: Guarding, targets: Sequence[WeightTarget], probe: Probe) -> Sensitivities | None:
    """Those for a repair; None where the task predicts no tokens, outputs are not measured, or processes share work."""
    if guarding.windows is None or guarding.session.ranks.size > 1:
        return None
    return (
        Sensitivities.measured(guarding, targets, probe) if isinstance(guarding.baseline.task, LanguageTask) else None
    )


def searched_scheme(plan: AnyPlan, scale: Scale) -> Scheme:
    """All that is not searched.

    :param scale: kind of scales, where the grid allows for one.
    """
    assert isinstance(plan, Plan)
    shared = {entry.name: getattr(plan, entry.name) for entry in dataclasses.fields(Scheme)}
    allowed = scale if plan.symmetric and plan.per_channel else "largest"
    return Scheme(**shared | {"bitwidth": 8, "scale": allowed})


def weighed(weights: Sequence[PlannedWeight], fisher: Mapping[str, Curvature]) -> list[PlannedWeight]:
    """The weights of a plan, each with what its scales go by."""
    return [
        PlannedWeight(each.target, each.scheme, fisher[each.target.parameter_name].columns)
        if each.scheme.scale != "largest"
        else each
        for each in weights
    ]


def _key_of_need(plan: AnyPlan) -> str:
    """The key that asks for sensitivities, with its value."""
    return AUTO_KEY if plan.is_searched else f"{PLAN}.scale: {min(scales_of(plan) - {'largest'}, default='fisher')}"
