"""Routing: experts that received a token while windows passed through the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from invarlock.models.structure import is_experts


class RoutedExperts:
    """Tap of the fused experts of one layer."""

    def __init__(self, count: int) -> None:
        self._routed = torch.zeros(count, dtype=torch.bool)
        self._chosen = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.int32, torch.int64):
                chosen = leaf.flatten().cpu()
                # An index beyond the last expert stands for none.
                self._routed[chosen[chosen < len(self._routed)]] = True
                self._chosen = True

    def result(self) -> Tensor | None:
        """True for each expert that received a token; None where the layer is not called with their numbers."""
        return self._routed if self._chosen else None


def routing_taps(model: nn.Module) -> dict[str, RoutedExperts]:
    """A tap for each layer of fused experts, by module name."""
    layers = ((name, module) for name, module in model.named_modules() if is_experts(module))
    counts = {name: _count(module) for name, module in layers}
    return {name: RoutedExperts(count) for name, count in counts.items() if count}


def _count(experts: nn.Module) -> int:
    shapes = (parameter.shape for parameter in experts.parameters())
    return next((shape[0] for shape in shapes if len(shape) == 3), 0)
