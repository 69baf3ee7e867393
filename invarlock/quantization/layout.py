"""Meaning of the axes of a weight."""

from __future__ import annotations

from enum import StrEnum

from torch import Tensor


class WeightLayout(StrEnum):
    """Meaning of the axes of a weight."""

    OUT_IN = "(..., out, in)"
    """Linear, Embedding, and fused experts as Mixtral has them: (expert, out, in)."""
    IN_OUT = "(..., in, out)"
    """The Conv1D of GPT-2, and fused experts as GPT-OSS has them: (expert, in, out)."""
    CONV = "(out, in, ...)"
    """Conv1d, Conv2d and Conv3d: all axes but the first are one input axis."""

    def matrices(self, weight: Tensor) -> Tensor:
        """A weight as (..., out, in): a view, but for a convolution in channels_last, which has none: a copy."""
        if self is WeightLayout.CONV:
            return weight.flatten(1)
        return weight if self is WeightLayout.OUT_IN else weight.mT
