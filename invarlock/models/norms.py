"""Norm layers: which modules are one, and what they make of their weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_norm(module: nn.Module) -> bool:
    """True if a module normalizes, and multiplies by a weight of its own."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1


@torch.no_grad()
def norm_offset(norm: nn.Module) -> int | None:
    """The number that a norm adds to its weight before it multiplies: 1 in Gemma, 0 in most.

    None for a norm that cannot be run by itself, or that does neither.
    """
    weight = norm.get_parameter("weight").detach()
    # Ones of both signs have a mean of 0 and a mean square of 1: a norm of either kind leaves them as they are.
    signs = torch.ones_like(weight)
    signs[1::2] = -1
    try:
        gain = (norm(signs) - norm(-signs)) / (2 * signs)
    except (TypeError, ValueError, RuntimeError):
        # It wants other inputs, as a gate.
        return None
    offset = (gain.float() - weight.float()).mean()
    return next((number for number in (0, 1) if abs(offset - number) < 0.1), None)
