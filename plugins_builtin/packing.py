"""Weights of a checkpoint that are packed, and those that are not, by the names of its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

PACKED = re.compile(
    r"\.(weight_packed|weight_scale|weight_scale_inv|weight_global_scale|qweight|biases|SCB|absmax|weight_shape"
    r"|weight\.(SCB|absmax|quant_map|quant_state.*)|_weight_(qdata|scale|zero_point))$|_(blocks|scales)$"
)
"""Tensors that a packed weight leaves in a file, by all methods that transformers unpacks from plain tensors."""
WEIGHT = ".weight"
EXPERT = re.compile(r"(.*\.experts)\.\d+(?=\.)")
"""An expert, and its layer, in the name of one of its weights."""


def packed_modules(stored: Iterable[str]) -> set[str]:
    return {name[: found.start()] for name in stored if (found := PACKED.search(name))}


def plain_modules(stored: Sequence[str]) -> list[str]:
    packed = packed_modules(stored)
    names = (name.removesuffix(WEIGHT) for name in stored if name.endswith(WEIGHT))
    return [name for name in names if name not in packed]


def left_out(stored: Sequence[str]) -> list[str]:
    """Plain modules of a kind that is packed in another layer or expert."""
    kinds = {_kind(name) for name in packed_modules(stored)}
    return [name for name in plain_modules(stored) if _kind(name) in kinds]


def experts_among(modules: Iterable[str]) -> dict[str, str]:
    """Experts that the modules are part of, each with its layer."""
    return {found[0]: found[1] for name in modules if (found := EXPERT.match(name))}


def _kind(name: str) -> str:
    """A module's name without the numbers of its layer and its expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".N", name)
