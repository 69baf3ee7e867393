"""Whether two models compute the same, told without running either: every part of one is then a part of the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from invarlock.api import fields_of

FOLDER = "name_or_path"
PLAIN = (bool, int, float, str, type(None))


def architecture_of(model: nn.Module) -> list[Any]:
    """All that a model computes with besides its tensors: configuration, classes, plain attributes, number of hooks."""
    configuration = getattr(model, "config", None)
    attention = getattr(configuration, "_attn_implementation", None)
    return [fields_of(configuration), attention, *((path, *_kind(module)) for path, module in model.named_modules())]


def all_tensors_equal(context: Mapping[str, Any]) -> bool:
    """True if a comparison, which names every tensor that is stored, has found no difference."""
    tensors = context.get("edit", {}).get("modules", [])
    return bool(tensors) and all(tensor.get("change") == "unchanged" for tensor in tensors)


def _kind(module: nn.Module) -> tuple[Any, ...]:
    hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
    plain = {name: value for name, value in vars(module).items() if isinstance(value, PLAIN) and name != FOLDER}
    return type(module), hooks, plain
