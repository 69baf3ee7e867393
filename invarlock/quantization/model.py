"""RTN for a whole model: each weight on the device where it lives, devices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from invarlock.core.progress import Tally
from invarlock.distributed.dtensor import gathered
from invarlock.distributed.parallel_map import side_by_side
from invarlock.quantization.rounding import (
    QuantizationParameters,
    WeightFigures,
    Workspace,
    fake_quantize_,
    unfit,
)
from invarlock.quantization.scheme import Plan, PlanError
from invarlock.quantization.selection import WeightTarget, select_targets


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(WeightFigures):
    """What was done to one weight of a model."""

    name: str
    """The path of the module, or of the parameter if it is not the ``weight`` of its module."""
    parameter_name: str
    role: str
    device: str
    change: str = "quantized"

    @classmethod
    def of(cls, target: WeightTarget, figures: WeightFigures) -> QuantizedWeight:
        return cls(
            **{field.name: getattr(figures, field.name) for field in fields(WeightFigures)},
            name=target.name,
            parameter_name=target.parameter_name,
            role=target.role.value,
            device=str(target.parameter.device),
        )


def quantize_model(
    model: nn.Module,
    plan: Plan,
    *,
    measure: bool = True,
    parameters: dict[str, QuantizationParameters | None] | None = None,
    scale_dtype: torch.dtype | None = None,
) -> list[QuantizedWeight]:
    """Round the weights that a plan selects, in place.

    :param measure: whether to work out the error figures of each weight.
    :param parameters: filled with scales and zero points by the name of the weight, for a format that stores codes.
    :param scale_dtype: as of ``fake_quantize_``.
    :returns: one result a weight, in the order of the model.
    :raises PlanError: the plan selects nothing, a pattern matches nothing, or a selected weight is offloaded or in a
        dtype that RTN does not take. Nothing has been changed then.
    """
    targets = select_targets(model, plan)
    for target in targets:
        if reason := unfit(target.parameter, target.layout):
            raise PlanError(f"{target.name} {reason}")

    tally = Tally(len(targets))

    def round_all(of_one_device: Sequence[WeightTarget]) -> list[QuantizedWeight]:
        workspace = Workspace()
        results = []
        for target in of_one_device:
            with gathered(target.parameter) as weight:
                rounded = fake_quantize_(
                    weight, plan, layout=target.layout, measure=measure, workspace=workspace, scale_dtype=scale_dtype
                )
            results.append(QuantizedWeight.of(target, rounded))
            if parameters is not None:
                parameters[target.parameter_name] = rounded.quantization_parameters()
            tally.add()
        return results

    return side_by_side(round_all, targets, lambda target: target.parameter.device)
