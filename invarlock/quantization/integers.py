"""Grids of whole numbers: codes from -2^(b-1) to 2^(b-1) - 1 with b bits, and what they are multiplied with.

- symmetric: ``scale = max|w| / ((2^b - 1) / 2)``, ``code = clamp(round(w / scale))``, ``w = code * scale``;
- asymmetric: the range is widened to hold zero, ``scale = (max - min) / (2^b - 1)``,
  ``zero = clamp(round(-2^(b-1) - min / scale))``, ``code = clamp(round(w / scale + zero))``,
  ``w = (code - zero) * scale``;
- asymmetric, for a format that stores the smallest number in place of a zero point, as GGUF's Q4_1 and Q5_1 do:
  ``scale = (max - min) / (2^b - 1)``, ``steps = clamp(round((w - min) / scale))``, ``w = steps * scale + min``, with
  ``min`` in the dtype of the scales.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from invarlock.models.precision import for_float64
from invarlock.quantization.floats import Clip
from invarlock.quantization.scheme import Scheme


@dataclass(slots=True)
class IntegerGrid:
    """The numbers that weights are rounded to: ``scale`` and ``zero`` are float32 and broadcast against them."""

    scale: Tensor
    zero: Tensor | None
    lowest: int
    highest: int
    finite: bool
    """True if the weights surely hold no NaN and no Inf: both would be in the scale, and so would too wide a range."""

    @classmethod
    def over(cls, part: Tensor, scheme: Scheme, clip: Clip | None, dtype: torch.dtype) -> IntegerGrid:
        """The grids of weights whose last axis shares a scale; the formulas are in the docstring of this module.

        :param dtype: of the scales.
        """
        low, high = part.amin(-1, keepdim=True).float(), part.amax(-1, keepdim=True).float()
        if not scheme.per_channel:
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        if clip:
            low, high = low.clamp_(*clip), high.clamp_(*clip)
        lowest, highest = scheme.code_range
        if scheme.symmetric:
            scale = torch.maximum(high, low.neg_(), out=high)
        else:
            scale = high.clamp_(min=0) - low.clamp_(max=0)
        # A tensor, not a number: CUDA would multiply with the reciprocal of that, and get other bits than a CPU.
        scale.div_(scale.new_full((), scheme.levels))
        smallest, largest = map(float, torch.aminmax(scale))
        finite = math.isfinite(largest)
        if dtype != torch.float32:
            scale = scale.to(dtype).float()
        floor, ceiling = scale_limits(dtype, scheme.bitwidth)
        if not floor <= smallest <= largest <= ceiling:
            scale.clamp_(floor, ceiling)
        if scheme.symmetric:
            return cls(scale, None, lowest, highest, finite)
        zero = (lowest - low / scale).round_().clamp_(lowest, highest)
        # With zero off the middle, codes reach further than the limits of the scale allow for.
        limits = torch.finfo(part.dtype)
        reach = torch.maximum(highest - zero, zero - lowest)
        held = (limits.max * (1 - limits.eps) / reach).to(part.dtype).float()
        return cls(torch.minimum(scale, held), zero, lowest, highest, finite)

    def snap_(self, block: Tensor) -> Tensor:
        """Move float32 numbers to the grid, in place."""
        if self.zero is None:
            return block.div_(self.scale).round_().clamp_(self.lowest, self.highest).mul_(self.scale)
        codes = torch.addcdiv(self.zero, block, self.scale, out=block).round_().clamp_(self.lowest, self.highest)
        return codes.sub_(self.zero).mul_(self.scale)


@dataclass(slots=True)
class MinimumGrid:
    """Steps of ``scale`` from ``minimum`` on; all tensors are float32 and broadcast against the weights."""

    scale: Tensor
    minimum: Tensor
    zero: Tensor
    """The code of the minimum, so that codes are signed as those of other grids are."""
    most: int
    """Steps to the largest number."""
    finite: bool
    """True if the weights surely hold no NaN and no Inf: both would be in the scale."""

    @classmethod
    def over(cls, part: Tensor, scheme: Scheme, clip: Clip | None, dtype: torch.dtype) -> MinimumGrid:
        """The grids of weights whose last axis shares a scale; the formulas are in the docstring of this module.

        :param dtype: of scales and minimums.
        """
        low, high = part.amin(-1, keepdim=True).float(), part.amax(-1, keepdim=True).float()
        if not scheme.per_channel:
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        if clip:
            low, high = low.clamp_(*clip), high.clamp_(*clip)
        # A tensor, not a number: CUDA would multiply with the reciprocal of that, and get other bits than a CPU.
        scale = (high - low).div_(high.new_full((), scheme.levels))
        finite = math.isfinite(float(for_float64(scale).sum(dtype=torch.float64)))
        scale = scale.to(dtype).float().clamp_(*scale_limits(dtype, scheme.bitwidth))
        minimum = low.clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype).float()
        zero = torch.full_like(scale, scheme.code_range[0])
        return cls(scale, minimum, zero, int(scheme.levels), finite)

    def snap_(self, block: Tensor) -> Tensor:
        """Move float32 numbers to the grid, in place."""
        steps = block.sub_(self.minimum).div_(self.scale).round_().clamp_(0, self.most)
        return steps.mul_(self.scale).add_(self.minimum)


@cache
def scale_limits(dtype: torch.dtype, bitwidth: int) -> tuple[float, float]:
    """The smallest and the largest scale: no code times its scale may overflow."""
    limits = torch.finfo(dtype)
    # An all-zero unit needs a scale that is not zero, even where hardware flushes subnormal numbers to zero.
    smallest = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    return smallest, limits.max / 2 ** (bitwidth - 1)
