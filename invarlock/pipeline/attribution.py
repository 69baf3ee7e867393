"""Attribution of the rise of the loss to the changed weights: as predicted, and measured where that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from invarlock.evaluation.results import Number
from invarlock.evaluation.task import LanguageTask
from invarlock.pipeline.attempts import Edited
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.putting_back import ChangedWeight, PuttingBack
from invarlock.pipeline.shares import sensitivities_for_shares
from invarlock.quantization.selection import WeightTarget, find_weights
from invarlock.reporting.report import AttributionSection, MetricsSection, ModuleRise, WindowsSection
from invarlock.search.fisher import BaselineFisher, Fisher


def attribute(guarding: Guarding, edited: Edited, metrics: MetricsSection) -> AttributionSection | None:
    """The rise of the loss weight by weight; None where no weight was changed.

    It is predicted where the curvature of the baseline can be had, and measured for the first ``eval.attribute``.
    """
    changed = {module.name for module in edited.modules if module.is_changed}
    if not changed:
        return None
    known, wanted = _sensitivities(guarding, edited, changed), guarding.config.eval.attribute
    losses = _losses(guarding, metrics.windows)
    rise = losses[1] - losses[0] if losses else None
    in_memory = guarding.baseline.sharding is None and not edited.watched.streamed
    with torch.no_grad():
        changes: list[ChangedWeight] = []
        if in_memory and (known.fisher or wanted):
            with guarding.session.clock.stage("attribution"):
                changes = sorted(_changes(edited, known.fisher), key=lambda change: change.place)
        modules, total = _predicted_parts(changes)
        additivity, first = None, changes[:wanted]
        if first and losses and metrics.windows and edited.same_text is None:
            final = guarding.final_windows(len(metrics.windows.tokens))
            parts = PuttingBack(guarding.baseline, edited.model, final, losses[0], losses[1] - losses[0]).parts(first)
            additivity = parts.additivity
            for place, (part, noise) in enumerate(zip(parts.alone, parts.noise, strict=True)):
                modules[place] = replace(modules[place], measured=part, noise=noise)
    missing = known.missing or ("" if modules else "no changed weight can be held against the baseline's")
    return AttributionSection(rise, total if known.fisher and modules else None, additivity, modules, missing)


def _sensitivities(guarding: Guarding, edited: Edited, changed: set[str]) -> BaselineFisher:
    """Those of the baseline; measured now, at the weights that were changed, if it is still there."""
    if guarding.fisher:
        return BaselineFisher(guarding.fisher)
    if edited.watched.streamed and guarding.windows is not None:
        return BaselineFisher(None, "the weights stay on disk")
    if guarding.sensitivities is None and edited.bring_baseline is not None:
        with edited.bring_baseline() as model:
            targets = [target for target in find_weights(model) if not changed.isdisjoint(target.names)]
            guarding.sensitivities = sensitivities_for_shares(guarding, model, targets)
    return guarding.sensitivities or BaselineFisher(None, "the outputs are not measured")


def _losses(guarding: Guarding, windows: WindowsSection | None) -> tuple[float, float] | None:
    """Of the baseline and the edited model, nats per token; None where they are not finite, or of something else."""
    if windows is None or not isinstance(guarding.baseline.task, LanguageTask):
        return None
    before, after = (_loss_of(windows, losses) for losses in (windows.baseline, windows.edited))
    return (before, after) if math.isfinite(before) and math.isfinite(after) else None


def _loss_of(windows: WindowsSection, losses: Sequence[Number]) -> float:
    """Nats per token; NaN where nothing was scored."""
    tokens = sum(windows.tokens)
    return math.fsum(map(float, losses)) / tokens if tokens else math.nan


def _changes(edited: Edited, fisher: Fisher | None) -> Iterator[ChangedWeight]:
    """Weights that can be put back: those of the baseline's shape."""
    before, parameters = edited.baseline_weights or {}, dict(edited.model.named_parameters())
    targets = {target.parameter_name: target for target in find_weights(edited.model)}
    for module in (each for each in edited.modules if each.is_changed):
        names = (name for name in (module.name, f"{module.name}.weight") if name in parameters and name in before)
        name = next(names, None)
        if name is None:
            continue
        read = partial(_read, before, name, parameters[name])
        old, new = read(), parameters[name]
        if old.shape == new.shape and (change := new.float() - old.float()).any():
            predicted = _predicted(targets.get(name), fisher or {}, change)
            yield ChangedWeight(module.name, parameters[name], read, predicted, module.relative_error or 0.0)


def _read(before: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return before[name].to(like.device, like.dtype)


def _predicted(target: WeightTarget | None, fisher: Fisher, change: Tensor) -> float | None:
    """The predicted rise, nats per token, from a change of a weight, which is overwritten; infinite of NaN."""
    if target is None or target.parameter_name not in fisher:
        return None
    curvature = fisher[target.parameter_name]
    # A weight that no window reaches, as of an expert, has no curvature.
    rise = curvature.rise(target.layout.matrices(change).contiguous()) if curvature.rows.any() else 0.0
    return math.inf if math.isnan(rise) else rise


def _predicted_parts(changes: Sequence[ChangedWeight]) -> tuple[list[ModuleRise], float]:
    """The predicted part of each weight, and their sum."""
    total = sum(change.predicted or 0.0 for change in changes)
    has_shares = 0 < total < math.inf
    return [
        ModuleRise(
            each.name, each.predicted, each.predicted / total if has_shares and each.predicted is not None else None
        )
        for each in changes
    ], total
