"""RTN for a whole model: each weight on the device where it lives, devices side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from threading import Lock

import torch
from torch import Tensor, nn

from invarlock.core.results import EditedWeight
from invarlock.distributed.dtensor import gathered
from invarlock.distributed.parallel_map import side_by_side
from invarlock.quantization.rounding import RoundedWeight, Workspace, fake_quantize_, unfit
from invarlock.quantization.scheme import Plan, PlanError
from invarlock.quantization.selection import WeightTarget, select_targets

Progress = Callable[[int, int, str], object]
"""Told after each weight how many are done, of how many, and its name; from the thread of its device, one at a time."""


def quantize_model(
    model: nn.Module,
    plan: Plan,
    *,
    measure: bool = True,
    parameters: dict[str, RoundedWeight | None] | None = None,
    scale_dtype: torch.dtype | None = None,
    on_progress: Progress | None = None,
) -> list[EditedWeight]:
    """Round the weights that a plan selects, in place.

    :param measure: whether to work out the error figures of each weight.
    :param parameters: filled with scales and zero points by the name of the parameter, for a format that stores codes.
    :param scale_dtype: as of ``fake_quantize_``.
    :returns: one result a weight, in the order of the model.
    :raises PlanError: the plan selects nothing, a pattern matches nothing, or a selected weight is offloaded or in a
        dtype that RTN does not take. Nothing has been changed then.
    """
    targets = select_targets(model, plan)
    for target in targets:
        if reason := unfit(target.parameter, target.layout):
            raise PlanError(f"{target.name} {reason}")

    done, telling = count(1), Lock()

    def round_all(of_one_device: Sequence[WeightTarget]) -> list[EditedWeight]:
        workspace = Workspace()
        results = []
        for target in of_one_device:
            with gathered(target.parameter) as weight:
                rounded = round_target_(
                    target, weight, plan, measure=measure, workspace=workspace, scale_dtype=scale_dtype
                )
            results.append(rounded.effect)
            if parameters is not None:
                parameters[target.parameter_name] = rounded
            if on_progress is not None:
                # Counted and told in one step, or another device could tell a higher number in between.
                with telling:
                    on_progress(next(done), len(targets), target.name)
        return results

    return side_by_side(round_all, targets, lambda target: target.parameter.device)


def round_target_(
    target: WeightTarget,
    weight: Tensor,
    plan: Plan,
    *,
    measure: bool,
    workspace: Workspace,
    scale_dtype: torch.dtype | None,
) -> RoundedWeight:
    """Round the weight of a target, read from wherever it is, as ``fake_quantize_`` does; the effect has its name."""
    rounded = fake_quantize_(
        weight, plan, layout=target.layout, measure=measure, workspace=workspace, scale_dtype=scale_dtype
    )
    return replace(rounded, effect=replace(rounded.effect, name=target.name, role=target.role.value))
