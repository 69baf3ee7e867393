"""Tensors that a guard keeps of a model: copies are its own, live weights are the edited model's after the edit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

MOST_OBJECTS = 100_000
"""So many are looked at: a guard that keeps more keeps sums, not weights."""


def live_weights(guard: Any, model: torch.nn.Module) -> Iterator[str]:
    """Paths from a guard to tensors in the memory of a model's weights, such as ``self.before['lm_head.weight']``.

    :param guard: an instance, or a module with hook functions.
    """
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    name = guard.__name__ if isinstance(guard, ModuleType) else "self"
    stack, seen = [(f"{name}.{attribute}", value) for attribute, value in vars(guard).items()], set[int]()
    while stack and len(seen) < MOST_OBJECTS:
        path, value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.untyped_storage().data_ptr() in weights:
                yield path
        else:
            stack += _held(path, value)


def _held(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", entry) for key, entry in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"{path}[{place}]", entry) for place, entry in enumerate(value))
    elif dataclasses.is_dataclass(value) and not inspect.isclass(value):
        yield from ((f"{path}.{entry.name}", getattr(value, entry.name, None)) for entry in dataclasses.fields(value))
