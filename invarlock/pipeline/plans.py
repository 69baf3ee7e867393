"""From the configuration to the plan of each attempt and the format of an accepted model; errors name its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from invarlock.config.schema import RunConfig, as_keys
from invarlock.core.errors import PluginError, UsageError, unknown
from invarlock.exporters.exporter import Exporter
from invarlock.exporters.saving import Export
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.scheme import Plan, PlanError
from invarlock.quantization.selection import WeightTarget, select_targets

EXPORTER_MEMBERS = [name for name in vars(Exporter) if not name.startswith("_")]


def plans_of(config: RunConfig) -> list[Plan]:
    """The plan of each attempt: after a rollback one more bit, up to 8; a format of floats has as many as it has."""
    plan = config.edit.plan
    if plan.of_floats:
        return [plan]
    widths = range(plan.bitwidth, min(8, plan.bitwidth + config.edit.retry.max_attempts - 1) + 1)
    return [dataclasses.replace(plan, bitwidth=width) for width in widths]


def targets_of(config: RunConfig, model: nn.Module) -> list[WeightTarget]:
    with keys_named():
        return select_targets(model, config.edit.plan)


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


def check(
    export: Export, plans: Sequence[Plan], model: nn.Module, targets: Sequence[WeightTarget], tokenizer: Any
) -> None:
    """Refuse, before the run starts, what the format cannot hold of any attempt.

    :raises UsageError: with the reason, and what to use instead.
    """
    exporter = export.exporter
    for plan in plans:
        if reason := exporter.refuse(plan, targets, model, tokenizer):
            problem = f"{exporter.name}: {as_keys(reason)}"
            raise UsageError(f"output.format: {problem}; or set output.format to dequantized")


@contextmanager
def keys_named() -> Iterator[None]:
    """Errors about a plan name the keys of the configuration that it comes from."""
    try:
        yield
    except PlanError as error:
        raise UsageError(as_keys(str(error))) from None
