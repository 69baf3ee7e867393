"""RTN for a whole model: each weight on the device where it lives, devices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from invarlock.core.progress import Tally
from invarlock.core.results import EditedWeight
from invarlock.distributed.dtensor import gathered
from invarlock.distributed.parallel_map import side_by_side
from invarlock.quantization.rounding import RoundedWeight, Workspace, fake_quantize_, unfit
from invarlock.quantization.scheme import Plan, PlanError
from invarlock.quantization.selection import WeightTarget, select_targets
from invarlock.quantization.sums import Sums, effects


@dataclass(frozen=True)
class Rounding:
    """Rounding of weights of a model that are on one device, as ``fake_quantize_`` does it."""

    plan: Plan
    measure: bool = True
    scale_dtype: torch.dtype | None = None
    workspace: Workspace = field(default_factory=Workspace)

    def __call__(self, target: WeightTarget, weight: Tensor) -> RoundedWeight:
        """Round the weight of a target in place, wherever it was read from."""
        return fake_quantize_(
            weight,
            self.plan,
            layout=target.layout,
            measure=self.measure,
            workspace=self.workspace,
            scale_dtype=self.scale_dtype,
        )

    @staticmethod
    def effects(targets: Sequence[WeightTarget], sums: Sequence[Sums]) -> list[EditedWeight]:
        """The effects on the weights of targets, named; waits for their device."""
        found = zip(targets, effects(sums), strict=True)
        return [replace(effect, name=target.name, role=target.role.value) for target, effect in found]


def quantize_model(
    model: nn.Module,
    plan: Plan,
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
    targets = select_targets(model, plan)
    for target in targets:
        if reason := unfit(target.parameter, target.layout):
            raise PlanError(f"{target.name} {reason}")

    tally = Tally(len(targets))

    def round_all(of_one_device: Sequence[WeightTarget]) -> list[EditedWeight]:
        rounding, results = Rounding(plan, measure, scale_dtype), []
        for target in of_one_device:
            with gathered(target.parameter) as weight:
                rounded = rounding(target, weight)
            # Not the grids, which together are a tenth of the weights where groups are small.
            results.append(rounded.sums)
            if parameters is not None:
                parameters[target.parameter_name] = rounded
            tally.add()
        # Only now: a device is still at work on the last weights when the first ones are asked for.
        return Rounding.effects(of_one_device, results)

    return side_by_side(round_all, targets, lambda target: target.parameter.device)
