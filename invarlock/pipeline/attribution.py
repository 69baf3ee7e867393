"""Attribution of the rise of the loss to the changed weights: as predicted, and measured by putting back one at a time.

All others stay edited while a weight is put back, and the whole model runs over the final windows. The control is a
random change of the same norm in the same weight: it tells an edit that hits where it hurts from one that is merely
large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from invarlock.evaluation.task import LanguageTask
from invarlock.pipeline.attempts import Edited
from invarlock.pipeline.guarding import Guarding
from invarlock.quantization.selection import WeightTarget, find_weights
from invarlock.reporting.report import AttributionSection, MetricsSection, ModuleRise
from invarlock.search.fisher import Fisher


def attribute(guarding: Guarding, edited: Edited, metrics: MetricsSection) -> AttributionSection | None:
    """The rise of the loss weight by weight; None where it was not measured, or nobody asked for it.

    It is predicted where the curvature of the baseline is at hand, and measured for the first ``eval.attribute``.
    """
    rise, wanted = _rise_of(metrics), guarding.config.eval.attribute
    asked = wanted or guarding.fisher
    whole = guarding.baseline.sharding is None and not edited.watched.streamed and edited.same_text is None
    if rise is None or not asked or not whole or not isinstance(guarding.baseline.task, LanguageTask):
        return None
    with torch.no_grad():
        changes = sorted(_changes(edited, guarding.fisher), key=lambda change: change.place)
        total = math.fsum(change.predicted or 0.0 for change in changes)
        modules = [ModuleRise(each.name, each.predicted, each.share_of(total)) for each in changes]
        measuring, first = _Measuring(guarding, edited, rise), changes[:wanted]
        alone = [measuring.recovered([change]) for change in first]
        for place, (change, part) in enumerate(zip(first, alone, strict=True)):
            # With noise the rise is that without this weight's change, and what the noise adds.
            noise = measuring.rise_with_noise(change) - (rise - part)
            modules[place] = replace(modules[place], measured=part, noise=noise)
        together = measuring.recovered(first) if first else 0.0
    additivity = math.fsum(alone) / together if together else None
    return AttributionSection(rise, total if guarding.fisher else None, additivity, modules)


@dataclass(frozen=True)
class _Change:
    """A changed weight of a model, and what it was."""

    name: str
    parameter: Tensor
    before: Callable[[], Tensor]
    """Reads what it was."""
    predicted: float | None
    relative_error: float

    @property
    def place(self) -> tuple[float, float]:
        """Small for what is measured first: what contributes most, as far as that is known."""
        return -(self.predicted or 0.0), -self.relative_error

    def share_of(self, total: float) -> float | None:
        return None if self.predicted is None or not total else self.predicted / total


def _rise_of(metrics: MetricsSection) -> float | None:
    """The measured rise of the loss, nats per token."""
    windows = metrics.windows
    if windows is None or not sum(windows.tokens):
        return None
    rise = (math.fsum(map(float, windows.edited)) - math.fsum(map(float, windows.baseline))) / sum(windows.tokens)
    return rise if math.isfinite(rise) else None


def _changes(edited: Edited, fisher: Fisher | None) -> Iterator[_Change]:
    """Weights that can be put back: those of the baseline's shape."""
    before, parameters = edited.baseline_weights or {}, dict(edited.model.named_parameters())
    targets = {target.parameter_name: target for target in find_weights(edited.model)}
    for module in (each for each in edited.modules if each.is_changed):
        names = (name for name in (module.name, f"{module.name}.weight") if name in parameters and name in before)
        name = next(names, None)
        if name is None or before[name].shape != parameters[name].shape:
            continue
        parameter = parameters[name].detach()
        read = partial(_read, before, name, parameter)
        change = parameter.float() - read().float()
        if change.any():
            predicted = _predicted(targets.get(name), fisher or {}, change)
            yield _Change(module.name, parameter, read, predicted, module.relative_error or 0.0)


def _read(before: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return before[name].to(like.device, like.dtype)


def _predicted(target: WeightTarget | None, fisher: Fisher, change: Tensor) -> float | None:
    """The predicted rise, nats per token, from a change of a weight, which is overwritten."""
    if target is None or target.parameter_name not in fisher:
        return None
    curvature = fisher[target.parameter_name]
    # A weight that no window reaches, as of an expert, has no curvature.
    return curvature.rise(target.layout.matrices(change).contiguous()) if curvature.rows.any() else 0.0


@dataclass(frozen=True)
class _Measuring:
    """An edited model whose weights are put back, and its loss with all of them edited."""

    guarding: Guarding
    edited: Edited
    rise: float
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def recovered(self, changes: Sequence[_Change]) -> float:
        """The part of the rise that goes if these weights are put back."""
        return self.rise - self._rise_with([(change.parameter, change.before()) for change in changes])

    def rise_with_noise(self, change: _Change) -> float:
        """The rise with a random change of the same norm in place of a weight's own."""
        before = change.before()
        norm = torch.linalg.vector_norm(change.parameter.float() - before.float())
        noise = torch.randn(before.shape, generator=self.generator).to(before.device)
        other = (before.float() + noise * (norm / torch.linalg.vector_norm(noise))).to(before.dtype)
        return self._rise_with([(change.parameter, other)])

    def _rise_with(self, values: Sequence[tuple[Tensor, Tensor]]) -> float:
        """The rise of the loss, nats per token, with some weights set to other values meanwhile."""
        with ExitStack() as stack:
            for parameter, value in values:
                stack.callback(parameter.copy_, parameter.clone())
                parameter.copy_(value)
            return self._loss() - self._loss_before()

    def _loss(self) -> float:
        assert self.guarding.windows is not None
        preview, final = self.guarding.windows
        measured, _ = self.guarding.baseline.run_pass(self.edited.model, (preview[:0], final), "attribution")
        return float(measured.losses.sum() / measured.tokens.sum())

    def _loss_before(self) -> float:
        measured = self.guarding.baseline_pass
        assert measured is not None
        return float(measured.losses.sum() / measured.tokens.sum())
