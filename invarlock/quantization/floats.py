"""Grids of small floating-point numbers beside those of integers: FP8 and MXFP4, rounded to nearest, ties to even.

- ``fp8``, E4M3FN (Micikevicius et al., FP8 Formats for Deep Learning, 2022): 1 sign, 4 exponent and 3 mantissa bits,
  no infinity, the largest number is 448. ``scale = max|w| / 448`` over an output channel or the tensor, in the dtype
  of the weight; ``w = E4M3(clamp(w / scale)) * scale``.
- ``mxfp4`` (OCP Microscaling Formats v1.0, sections 5.3.3, 5.4.1 and 6.3): blocks of 32 numbers of E2M1, which are 0,
  0.5, 1, 1.5, 2, 3, 4 and 6, with one E8M0 scale, a power of two: ``scale = 2^(floor(log2(max|w|)) - 2)``, since 4 is
  the largest power of two of E2M1; ``w = E2M1(clamp(w / scale)) * scale``. Quotients from 6 to 8 become 6, as the
  specification has it.
- ``nvfp4`` (NVIDIA, Pretraining Large Language Models with NVFP4, 2025): blocks of 16 numbers of E2M1 with an E4M3
  scale, and one float32 factor for the matrix, which brings the largest scale to 448:
  ``factor = 448 * 6 / max|matrix|``, ``scale = E4M3(factor * max|w| / 6) / factor``. The product is rounded to
  bfloat16, as compressed-tensors unpacks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from invarlock.models.precision import for_float64
from invarlock.quantization.scheme import Scheme

Clip = tuple[float, float]
"""The smallest and the largest number that clipping leaves."""
E4M3 = torch.float8_e4m3fn
LARGEST = {"fp8": torch.finfo(E4M3).max, "mxfp4": 6.0, "nvfp4": 6.0}
EMAX = 2
"""Exponent of the largest power of two of E2M1."""
BIAS = 127
"""Of the exponent in E8M0 and in float32."""
POWER_OF_TWO = 0x7F800000
"""Bits of a float32 that are the largest power of two in it."""
SMALLEST_E4M3 = 2.0**-9
"""A block of zeros needs a scale that is not zero."""


@dataclass(slots=True)
class FloatGrid:
    """Small floating-point numbers times ``scale``, which is float32 and broadcasts against the weights."""

    format: str
    scale: Tensor
    finite: bool
    """True if the weights surely hold no NaN and no Inf: both would be in the scale."""
    factor: Tensor | None = None
    """By which the scales of ``nvfp4`` are multiplied to be stored in E4M3; float32, one number."""
    zero: None = None

    @classmethod
    def over(
        cls, part: Tensor, scheme: Scheme, clip: Clip | None, dtype: torch.dtype, factor: Tensor | None = None
    ) -> FloatGrid:
        """The grids of weights whose last axis shares a scale; the formulas are in the docstring of this module.

        :param dtype: of the scales, where the format leaves that open.
        """
        low, high = part.amin(-1, keepdim=True).float(), part.amax(-1, keepdim=True).float()
        if clip:
            low, high = low.clamp_(*clip), high.clamp_(*clip)
        largest = torch.maximum(high, low.neg_())
        if not scheme.per_channel:
            largest = largest.amax(0, keepdim=True)
        finite = math.isfinite(float(for_float64(largest).sum(dtype=torch.float64)))
        if factor is not None:
            return cls(scheme.format, _e4m3_scale(largest, factor), finite, factor)
        scale = _power_of_two(largest) if scheme.format == "mxfp4" else _plain_scale(largest, dtype)
        return cls(scheme.format, scale, finite)

    def snap_(self, block: Tensor) -> Tensor:
        """Move float32 numbers to the grid, in place."""
        elements_(self.format, block.div_(self.scale)).mul_(self.scale)
        return block if self.factor is None else block.copy_(block.to(torch.bfloat16))


def grid_over(matrix: Tensor, scheme: Scheme, clip: Clip | None) -> Callable[..., FloatGrid]:
    """``FloatGrid.over`` for parts of a matrix."""
    return partial(FloatGrid.over, factor=_factor(matrix, clip) if scheme.format == "nvfp4" else None)


def elements_(format_: str, quotients: Tensor) -> Tensor:
    """Round float32 quotients of weights and scales to the numbers of a format, in place."""
    largest = LARGEST[format_]
    quotients.clamp_(-largest, largest)
    return quotients.copy_(quotients.to(E4M3)) if format_ == "fp8" else _e2m1_(quotients)


def codes(format_: str, rounded: Tensor, scales: Tensor) -> Tensor:
    """The numbers of the format that a rounded matrix (out, in) consists of, float32 and in its shape.

    :param scales: (out, groups), (out, 1) or (1, 1).
    """
    quotients = rounded.float().reshape(rounded.shape[0], scales.shape[-1], -1) / scales.float().unsqueeze(-1)
    return elements_(format_, quotients).view(rounded.shape)


def exponents(scales: Tensor) -> Tensor:
    """Powers of two as E8M0: biased exponents in bytes."""
    return (scales.float().view(torch.int32) >> 23).to(torch.uint8)


def _plain_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales for FP8 in float32, rounded to the dtype that they are stored in."""
    limits = torch.finfo(dtype)
    # A tensor, not a number: CUDA would multiply with the reciprocal of that, and get other bits than a CPU.
    scale = (largest / largest.new_full((), LARGEST["fp8"])).to(dtype).float()
    smallest = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    # No number of the format times its scale may overflow.
    return scale.clamp_(smallest, limits.max / LARGEST["fp8"])


def _power_of_two(largest: Tensor) -> Tensor:
    """Scales for MXFP4; of a block of zeros any would do."""
    # From the bits: a power by exp2 need not be exact on every device.
    exponent = (largest.view(torch.int32) >> 23) - EMAX
    return exponent.clamp_(1, 2 * BIAS).bitwise_left_shift_(23).view(torch.float32)


def _factor(matrix: Tensor, clip: Clip | None) -> Tensor:
    """Factor for NVFP4 that brings the largest scale of the finite rows to the largest number of E4M3."""
    low, high = matrix.amin(1).float(), matrix.amax(1).float()
    if clip:
        low, high = low.clamp_(*clip), high.clamp_(*clip)
    largest = torch.maximum(high, low.neg_()).nan_to_num_(0, 0, 0).amax()
    whole = largest.new_full((), LARGEST["fp8"] * LARGEST["nvfp4"])
    return (whole / largest).clamp_(max=torch.finfo(torch.float32).max)


def _e4m3_scale(largest: Tensor, factor: Tensor) -> Tensor:
    stored = (largest / largest.new_full((), LARGEST["nvfp4"]) * factor).clamp_(SMALLEST_E4M3, LARGEST["fp8"])
    return stored.to(E4M3).float() / factor


def _e2m1_(numbers: Tensor) -> Tensor:
    """Round float32 numbers from -6 to 6 to E2M1, in place: in steps of 0.5 up to 2, of 1 up to 4, then of 2."""
    powers = (numbers.view(torch.int32) & POWER_OF_TWO).view(torch.float32)
    # A number this much larger has no room for less than a step, half a power of two: the sum is rounded to even.
    added = powers.clamp_(min=1).mul_(1.5 * 2**22)
    return numbers.add_(added).sub_(added)
