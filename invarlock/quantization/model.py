"""RTN for a whole model: each weight on the device where it lives, devices side by side."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.progress import Tally
from invarlock.core.results import EditedWeight
from invarlock.distributed.dtensor import gathered, is_spread, local
from invarlock.distributed.parallel_map import side_by_side
from invarlock.models.kernels import takes_triton
from invarlock.quantization.rounding import RoundedWeight, Workspace, fake_quantize_alike_, unfit
from invarlock.quantization.rules import AnyPlan
from invarlock.quantization.scheme import PlanError
from invarlock.quantization.selection import PlannedWeight, WeightTarget, planned_weights
from invarlock.quantization.sums import Sums, effects

AT_ONCE = 1 << 27
"""Weights that one launch rounds, if they are alike: for a GPU more than 100 us of work, in which Python gets the next
launch ready. The scales of so many, in groups of 32, have 16 MiB."""
PAGES_AT_ONCE = 1 << 14
"""So few numbers are written by one thread."""


@dataclass(frozen=True)
class Rounding:
    """Rounding of weights of a model that are on one device, as ``fake_quantize_`` does it."""

    measure: bool = True
    scale_dtype: torch.dtype | None = None
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, planned: PlannedWeight, weight: Tensor) -> RoundedWeight:
        """Round a weight of a plan in place, wherever it was read from."""
        (rounded,) = self.together([planned], [weight])
        return rounded

    def together(self, alike: Sequence[PlannedWeight], weights: Sequence[Tensor]) -> list[RoundedWeight]:
        """Round weights for which plans have one scheme, and which ``fake_quantize_alike_`` takes together."""
        return fake_quantize_alike_(
            weights,
            alike[0].scheme,
            layout=alike[0].target.layout,
            measure=self.measure,
            workspace=self.workspace,
            scale_dtype=self.scale_dtype,
            columns=alike[0].columns,
        )

    @staticmethod
    def effects(targets: Sequence[WeightTarget], sums: Sequence[Sums]) -> list[EditedWeight]:
        """The effects on the weights of targets, named; waits for their device."""
        found = zip(targets, effects(sums), strict=True)
        return [replace(effect, name=target.name, role=target.role.value) for target, effect in found]


def quantize_model(
    model: nn.Module,
    plan: AnyPlan,
    *,
    measure: bool = True,
    parameters: dict[str, RoundedWeight | None] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> list[EditedWeight]:
    """Round the weights that a plan selects, in place.

    :param measure: whether to work out the error figures of each weight.
    :param parameters: filled with scales and zero points by the name of the parameter, for a format that stores codes.
    :param scale_dtype: as of ``fake_quantize_``.
    :returns: one result a weight, in the order of the model.
    :raises PlanError: the plan selects nothing, a pattern matches nothing, or a selected weight is offloaded or in a
        dtype that RTN does not take. Nothing has been changed then.
    """
    weights = planned_weights(model, plan)
    return quantize_weights(weights, measure=measure, parameters=parameters, scale_dtype=scale_dtype)


def quantize_weights(
    weights: Sequence[PlannedWeight],
    *,
    measure: bool = True,
    parameters: dict[str, RoundedWeight | None] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> list[EditedWeight]:
    """Round some weights of a plan, in place; parameters as of ``quantize_model``.

    :raises PlanError: one is offloaded, or in a dtype that RTN does not take. Nothing has been changed then.
    """
    for planned in weights:
        if reason := unfit(planned.target.parameter, planned.target.layout):
            raise PlanError(f"{planned.target.name} {reason}")

    tally = Tally(len(weights))

    def round_all(of_one_device: Sequence[PlannedWeight]) -> list[EditedWeight]:
        rounding, sums = Rounding(measure, scale_dtype), {}
        for planned in of_one_device:
            _own_pages(local(planned.target.parameter.detach()))
        for alike in _alike(of_one_device):
            with ExitStack() as stack:
                weights = [stack.enter_context(gathered(planned.target.parameter)) for planned in alike]
                rounded = rounding.together(alike, weights)
            for planned, each in zip(alike, rounded, strict=True):
                # Not the grids, which together are a tenth of the weights where groups are small.
                sums[planned.target.parameter_name] = each.sums
                if parameters is not None:
                    parameters[planned.target.parameter_name] = each
            tally.add(len(alike))
        targets = [planned.target for planned in of_one_device]
        # Only now: a device is still at work on the last weights when the first ones are asked for.
        return Rounding.effects(targets, [sums[target.parameter_name] for target in targets])

    return side_by_side(round_all, weights, lambda planned: planned.target.parameter.device)


def _alike(weights: Iterable[PlannedWeight]) -> Iterator[list[PlannedWeight]]:
    """The weights, those together that one launch of a kernel may round."""
    waiting: defaultdict[Any, list[PlannedWeight]] = defaultdict(list)
    for planned in weights:
        weight = planned.target.parameter
        if planned.columns is not None or is_spread(weight) or not takes_triton(weight):
            yield [planned]
            continue
        alike = waiting[planned.scheme, planned.target.layout, weight.dtype, weight.shape, weight.stride()]
        alike.append(planned)
        if len(alike) * weight.numel() >= AT_ONCE:
            yield [*alike]
            alike.clear()
    yield from filter(None, waiting.values())


def _own_pages(weight: Tensor) -> None:
    """Write one number of each page of a weight in memory, as it is, with a single thread.

    A weight that is mapped from a file gets a page of its own at the first write, of which every core that is at work
    has to learn: rounding 430 MB with two threads took 1.35 s, and 0.55 s with this before it.
    """
    if weight.device.type == "cpu" and weight.is_contiguous():
        one_of_each = weight.view(-1)[:: mmap.PAGESIZE // weight.itemsize]
        for few in torch.split(one_of_each, PAGES_AT_ONCE):
            few.copy_(few.clone())
