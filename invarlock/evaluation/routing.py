"""Routing: experts that received a token while windows passed through the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from invarlock.models.structure import is_experts


class RoutedExperts:
    """Tap of the experts of one layer."""

    def __init__(self, count: int) -> None:
        self._routed = torch.zeros(count, dtype=torch.bool)
        self._chosen = False

    def result(self) -> Tensor | None:
        """True for each expert that received a token; None where calls do not tell."""
        return self._routed if self._chosen else None

    def _choose(self, experts: Tensor) -> None:
        self._routed[experts] = True
        self._chosen = True


class FusedExperts(RoutedExperts):
    """Tap of the module that holds all experts of a layer, which is called with the numbers of those chosen."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dtype in (torch.int32, torch.int64):
                chosen = leaf.flatten().cpu()
                # An index beyond the last expert stands for none.
                self._choose(chosen[chosen < len(self._routed)])


class SeparateExperts(RoutedExperts):
    """Tap of each of the modules that are the experts of a layer, which are called with the tokens routed to them."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__(len(experts))
        self._experts = experts

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        # Some models call every expert, those without a token with an empty tensor.
        if any(isinstance(leaf, Tensor) and leaf.numel() for leaf in tree_leaves((args, kwargs))):
            self._choose(torch.tensor([expert is module for expert in self._experts]))


def routing_taps(model: nn.Module) -> dict[str, RoutedExperts]:
    """Taps for each layer of experts, by module name; separate experts of a layer share one."""
    return {name: tap for path, module in model.named_modules() for name, tap in _taps(path, module)}


def _taps(path: str, module: nn.Module) -> Iterator[tuple[str, RoutedExperts]]:
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and (path.split(".")[-1] == "experts" or is_experts(module)):
        experts = dict(module.named_children())
        tap = SeparateExperts([*experts.values()])
        yield from ((f"{path}.{name}", tap) for name in experts)
    elif is_experts(module) and (count := _count(module)):
        yield path, FusedExperts(count)


def _count(experts: nn.Module) -> int:
    shapes = (parameter.shape for parameter in experts.parameters())
    return next((shape[0] for shape in shapes if len(shape) == 3), 0)
