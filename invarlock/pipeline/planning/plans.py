"""From the configuration to the plan of each attempt and the format of an accepted model; errors name its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from invarlock.config.schema import PLAN, RunConfig, as_keys
from invarlock.core.errors import PluginError, UsageError, unknown
from invarlock.exporters.exporter import Exporter
from invarlock.exporters.saving import Export
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.partners import partners_of
from invarlock.quantization.rules import AnyPlan, Rules
from invarlock.quantization.scheme import PlanError, Scheme
from invarlock.quantization.selection import PlannedWeight, find_weights, planned_weights
from invarlock.quantization.unrounded import warn_of_unrounded

SomeScheme = TypeVar("SomeScheme", bound=Scheme)
EXPORTER_MEMBERS = [name for name in vars(Exporter) if not name.startswith("_")]


WIDEST = 8
"""Bits of the widest scheme of whole numbers."""


def plans_of(config: RunConfig) -> list[AnyPlan]:
    """The plans of attempts as far as they are known before the first: the others follow from its verdict.

    After a rollback there is one more bit, up to 8; a format of floats has as many as it has.
    """
    if config.edit.is_searched:
        return []
    plans = [config.edit.plan]
    if config.edit.retry.strategy != "uniform":
        return plans
    while len(plans) < config.edit.retry.max_attempts and (next_one := _wider_plan(plans[-1])) != plans[-1]:
        plans.append(next_one)
    return plans


def _wider_plan(plan: AnyPlan) -> AnyPlan:
    if isinstance(plan, Rules):
        return Rules(tuple(wider(rule) for rule in plan.rules))
    return wider(plan)


def wider(scheme: SomeScheme) -> SomeScheme:
    """A scheme with one more bit; the scheme itself where it cannot have more."""
    # Of a rule that keeps the weights there are none.
    if scheme.of_floats or scheme.bitwidth is None or scheme.bitwidth == WIDEST:
        return scheme
    return dataclasses.replace(scheme, bitwidth=scheme.bitwidth + 1)


def weights_of(config: RunConfig, model: nn.Module) -> list[PlannedWeight]:
    """The weights that the plan of the configuration rounds; a warning where it leaves much of the model out."""
    with keys_named():
        planned = planned_weights(model, config.edit.plan)
    warn_of_unrounded(model)
    return planned


def export_of(config: RunConfig, plugins: PluginManager) -> Export | None:
    """The export of an accepted model, or None where none is saved.

    :raises UsageError: no exporter has the name that ``output.format`` gives, whether a model is saved or not.
    :raises PluginError: the exporter lacks something.
    """
    name = config.output.format
    known = plugins.exporters(name)
    if name not in known:
        raise UsageError(f"output.format: {unknown('exporter', name, known)}")
    if not config.output.save_model:
        return None
    found = known[name]
    if lacking := [member for member in EXPORTER_MEMBERS if not hasattr(found.value, member)]:
        problem = f"the exporter {name} lacks {lacking[0]}"
        raise PluginError(f"{found.plugin}: {problem}; derive it from invarlock.api.Exporter")
    return Export(found.value, config.edit.plan, config.model.id)


def check(export: Export, plans: Sequence[AnyPlan], model: nn.Module, tokenizer: Any) -> None:
    """Refuse, before the run starts, what the format cannot hold of any attempt.

    :raises UsageError: with the reason, and what to use instead.
    """
    for plan in plans:
        if isinstance(plan, Rules) and not export.exporter.mixes:
            raise _refused(export, f"it holds weights of one scheme, and {PLAN} is a list of rules")
        if isinstance(plan, Rules) and export.exporter.shares_fused and (torn := _torn(plan, model)):
            names = " and ".join(torn)
            raise _refused(export, f"{PLAN} rounds {names} differently, and vLLM fuses them; give them one scheme")
        for key, part in _parts(plan, model):
            targets = [planned.target for planned in part]
            if reason := export.exporter.refuse(part[0].scheme, targets, model, tokenizer):
                raise _refused(export, as_keys(reason, key))


def _parts(plan: AnyPlan, model: nn.Module) -> Iterator[tuple[str, list[PlannedWeight]]]:
    """The weights of each scheme, and the key of the configuration that has it."""
    planned = planned_weights(model, plan)
    if not isinstance(plan, Rules):
        yield PLAN, planned
        return
    for number, rule in enumerate(plan.rules):
        if part := [each for each in planned if each.scheme == rule]:
            yield f"{PLAN}[{number}]", part


def _torn(plan: AnyPlan, model: nn.Module) -> list[str]:
    """Two weights that are fused and do not share a scheme, or none."""
    schemes = {planned.target.parameter_name: planned.scheme.alone for planned in planned_weights(model, plan)}
    for partners in partners_of(find_weights(model)):
        found = {schemes.get(target.parameter_name): target.name for target in reversed(partners)}
        if len(found) > 1:
            return [*found.values()][:2]
    return []


def _refused(export: Export, problem: str) -> UsageError:
    return UsageError(f"output.format: {export.exporter.name}: {problem}; or set output.format to dequantized")


@contextmanager
def keys_named() -> Iterator[None]:
    """Errors about a plan name the keys of the configuration that it comes from."""
    try:
        yield
    except PlanError as error:
        raise UsageError(as_keys(str(error))) from None
