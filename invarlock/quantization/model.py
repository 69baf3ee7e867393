"""RTN for a whole model: each weight on the device where it lives, devices side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from threading import Lock

from torch import Tensor, nn

from invarlock.core.errors import UsageError
from invarlock.distributed.dtensor import gathered
from invarlock.distributed.parallel_map import side_by_side
from invarlock.quantization.rtn import Scratch, WeightFigures, quantize_, scales_of, unfit
from invarlock.quantization.scheme import Plan, Scheme
from invarlock.quantization.selection import WeightTarget, select_targets

Progress = Callable[[int, int, str], object]
"""Told after each weight how many are done, of how many, and its name; from the thread of its device, one at a time."""


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight(WeightFigures):
    """What was done to one weight of a model."""

    name: str
    """The path of the module, or of the parameter if it is not the ``weight`` of its module."""
    parameter_name: str
    role: str
    bits: int
    scheme: Scheme
    device: str
    change: str = "quantized"

    @classmethod
    def of(cls, target: WeightTarget, scheme: Scheme, figures: WeightFigures) -> QuantizedWeight:
        return cls(
            **vars(figures),
            name=target.name,
            parameter_name=target.parameter_name,
            role=target.role.value,
            bits=scheme.bitwidth,
            scheme=scheme,
            device=str(target.parameter.device),
        )


def quantize_model(
    model: nn.Module,
    plan: Plan,
    *,
    measure: bool = True,
    scales: dict[str, Tensor] | None = None,
    on_progress: Progress | None = None,
) -> list[QuantizedWeight]:
    """Round the weights that a plan selects, in place.

    :param measure: whether to work out the error figures of each weight.
    :param scales: filled with the scales of each matrix (``scales_of``), by the name of the parameter, for an export.
    :returns: one result a weight, in the order of the model.
    :raises UsageError: the plan selects nothing, a pattern matches nothing, or a selected weight is offloaded or in a
        dtype that RTN does not take. Nothing has been changed then.
    """
    targets = select_targets(model, plan)
    for target in targets:
        if reason := unfit(target.parameter, target.layout):
            raise UsageError(f"{target.name} {reason}")

    done, telling = count(1), Lock()

    def round_all(of_one_device: Sequence[WeightTarget]) -> list[QuantizedWeight]:
        scratch = Scratch()
        results = []
        for target in of_one_device:
            with gathered(target.parameter) as weight:
                if scales is not None:
                    scales[target.parameter_name] = scales_of(weight, plan.scheme, layout=target.layout)
                figures = quantize_(weight, plan.scheme, layout=target.layout, measure=measure, scratch=scratch)
            results.append(QuantizedWeight.of(target, plan.scheme, figures))
            if on_progress is not None:
                # Counted and told in one step, or another device could tell a higher number in between.
                with telling:
                    on_progress(next(done), len(targets), target.name)
        return results

    return side_by_side(round_all, targets, lambda target: target.parameter.device)
