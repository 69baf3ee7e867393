"""Round-to-nearest quantization (RTN): the scheme, the arithmetic, which weights it touches and along which axis.

from invarlock.quantization import Plan, Scheme, quantize_model

quantize_model(model, Plan(bitwidth=4, group_size=128, scope="all"))  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from invarlock.quantization.scheme import Plan, Scheme

if TYPE_CHECKING:
    from invarlock.quantization.layout import WeightLayout
    from invarlock.quantization.model import quantize_model
    from invarlock.quantization.rounding import Workspace, fake_quantize_
    from invarlock.quantization.selection import WeightTarget, find_weights, select_targets

__all__ = [
    "Plan",
    "Scheme",
    "WeightLayout",
    "WeightTarget",
    "Workspace",
    "fake_quantize_",
    "find_weights",
    "quantize_model",
    "select_targets",
]


def __getattr__(name: str) -> Any:
    # Only on demand: these import torch, and a config is checked without it.
    if name in __all__:
        for module in ("model", "layout", "rounding", "selection"):
            attributes = vars(import_module(f"{__name__}.{module}"))
            if name in attributes:
                return attributes[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
