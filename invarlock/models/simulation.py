"""Rounding that a server does while a model runs: of the inputs of linear layers, and of cached keys and values.

It is done around the functions that modules call, so that the model itself stays as it is, hooks and all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Rounded = Callable[[Tensor], Tensor]
"""Function that gives back a tensor of the same shape and type, its numbers those of a coarser format."""

CACHE, ACTIVATIONS = "quantization of the key-value cache", "quantization of activations"


@dataclass(frozen=True)
class CacheRounding:
    """Rounding of the keys and values that one attention layer caches."""

    keys: Rounded
    values: Rounded


@dataclass(frozen=True)
class Simulation:
    """Tensors that are rounded while a model runs, by the names of its modules; none by default."""

    inputs: Mapping[str, Rounded] = field(default_factory=dict)
    """Of linear layers."""
    caches: Mapping[str, CacheRounding] = field(default_factory=dict)
    """Of attention layers, which call ``scaled_dot_product_attention``."""
    described: Mapping[str, str] = field(default_factory=dict)
    """In words, by ``ACTIVATIONS`` and ``CACHE``: "FP8 (E4M3), per tensor, static, of the inputs of 14 layers"."""

    def running(self, model: nn.Module) -> AbstractContextManager[object]:
        """A context in which the model runs as it is served; other models run as ever."""
        return _Simulating(self, model) if self.inputs or self.caches else nullcontext()


NONE = Simulation()


class _Simulating(TorchFunctionMode):
    def __init__(self, simulation: Simulation, model: nn.Module) -> None:
        super().__init__()
        weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._inputs = {id(weights[name]): rounded for name, rounded in simulation.inputs.items()}
        self._caches = {
            id(weight): cache
            for attention, cache in simulation.caches.items()
            for name, weight in weights.items()
            if name.startswith(f"{attention}.")
        }
        self._cache: CacheRounding | None = None
        """Of the attention layer whose projections ran last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            inputs, weight, *others = args
            self._cache = self._caches.get(id(weight), self._cache)
            rounded = self._inputs.get(id(weight))
            args = (rounded(inputs) if rounded else inputs, weight, *others)
        elif func is functional.scaled_dot_product_attention and self._cache:
            query, keys, values, *others = args
            args = (query, self._cache.keys(keys), self._cache.values(values), *others)
        return func(*args, **(kwargs or {}))
