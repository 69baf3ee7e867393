"""Weights that no plan rounds, because their modules are of no kind that round-to-nearest knows."""

from __future__ import annotations

import logging

from torch import nn

from invarlock.models.structure import find_blocks
from invarlock.quantization.selection import find_weights

log = logging.getLogger("invarlock")

MOST = 0.25
"""Largest share without a warning: gates and tables of positions are at most 14 % of the blocks of tiny models, and
less of large ones; experts in a layout of their own are three quarters."""


def warn_of_unrounded(model: nn.Module) -> None:
    """Warn where much of a model's blocks stays as it is, whatever the plan: DBRX, and layers of somebody's own."""
    known = {id(target.parameter) for target in find_weights(model)}
    matrices = {
        f"{block}.{name}": parameter
        for block, module in find_blocks(model).items()
        for name, parameter in module.named_parameters()
        if parameter.ndim > 1
    }
    left = {name: parameter.numel() for name, parameter in matrices.items() if id(parameter) not in known}
    share = sum(left.values()) / max(1, sum(parameter.numel() for parameter in matrices.values()))
    if share > MOST:
        largest = max(left, key=lambda name: left[name])
        kind = type(model.get_submodule(largest.rpartition(".")[0])).__name__
        log.warning(
            "%.0f %% of the weights in blocks are rounded by no plan, as %s of a %s", 100 * share, largest, kind
        )
