"""Round-to-nearest in place: the arithmetic, for one weight.

The numbers are those of compressed-tensors (``calculate_qparams`` and ``_quantize_dequantize``), so that a checkpoint
exported in that format carries what was judged here. With b bits, codes from -2^(b-1) to 2^(b-1) - 1, and rounding half
to even:

- symmetric: ``scale = max|w| / ((2^b - 1) / 2)``, ``code = clamp(round(w / scale))``, ``w = code * scale``;
- asymmetric: the range is widened to hold zero, ``scale = (max - min) / (2^b - 1)``,
  ``zero = clamp(round(-2^(b-1) - min / scale))``, ``code = clamp(round(w / scale + zero))``,
  ``w = (code - zero) * scale``.

The scale is rounded to the dtype of the weight, or to the one that a format stores scales in, before it is used;
everything else is float32, and the product is rounded to the dtype of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invarlock.core.results import EditedWeight
from invarlock.models.kernels import takes_triton
from invarlock.models.sizes import sizes_of
from invarlock.quantization.floats import Clip, FloatGrid, grid_over
from invarlock.quantization.layout import WeightLayout
from invarlock.quantization.scheme import PlanError, Scheme
from invarlock.quantization.sums import Sums, effects

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

GridOver = Callable[..., "_Grid | FloatGrid"]
"""As ``_Grid.over``."""


@dataclass(frozen=True)
class RoundedWeight:
    """The effect of rounding on a weight, and the scales and zero points of its codes.

    These are (out, groups), (out, 1) or, where all of a matrix has one, (1, 1). Fused experts have a third axis, in
    front. The values of a row with NaN or Inf mean nothing. They are joined on demand: few weights are stored as codes.
    """

    sums: Sums
    grids: Sequence[Sequence[Sequence[_Grid | FloatGrid]]]
    """Of each matrix, of its rows that were rounded together, of each part of these: whole groups, and a short one."""
    scale_dtype: torch.dtype

    @property
    def effect(self) -> EditedWeight:
        """The effect, without a name and a role, which a weight by itself has not; waits for the device."""
        return effects([self.sums])[0]

    @cached_property
    def scales(self) -> Tensor:
        """In the dtype that they were rounded to."""
        return self._joined(lambda grid: grid.scale).to(self.scale_dtype)

    @cached_property
    def zero_points(self) -> Tensor | None:
        """Whole numbers, float32; None where zero is in the middle of the grid."""
        return None if self.grids[0][0][0].zero is None else self._joined(lambda grid: grid.zero)

    def _joined(self, of: Callable[[Any], Any]) -> Tensor:
        matrices = [
            torch.cat([torch.cat([of(grid).flatten(1) for grid in parts], dim=1) for parts in rows])
            for rows in self.grids
        ]
        return torch.stack(matrices) if len(matrices) > 1 else matrices[0]

    def codes(self, rounded: Tensor) -> Tensor:
        """Codes of a matrix (out, in) of whole groups that ``fake_quantize_`` left, as int8 and in its shape.

        They are not kept from the rounding: those of all weights would take half as much memory as a 16-bit model.
        """
        # In float32: in 16 bits the quotient can be off by a code.
        codes = (rounded.float().reshape(*self.scales.shape, -1) / self.scales.float().unsqueeze(-1)).round_()
        if self.zero_points is not None:
            codes.add_(self.zero_points.unsqueeze(-1))
        return codes.to(torch.int8).view(rounded.shape)


class Workspace:
    """Float32 memory for one block, used again by every block of every weight of a device.

    Fresh memory costs more than all the arithmetic: the system has to hand over every page of it.
    """

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def like(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialized memory as a vector, and in the shape and order of ``block``; valid until the next call."""
        if self._flat.numel() < block.numel() or self._flat.device != block.device:
            self._flat = torch.empty(block.numel(), dtype=torch.float32, device=block.device)
        flat = self._flat[: block.numel()]
        if block.stride(0) < block.stride(-1):
            return flat, flat.view(*block.shape[1:], block.shape[0]).movedim(-1, 0)
        return flat, flat.view(block.shape)


def fake_quantize_(
    weight: Tensor,
    scheme: Scheme,
    *,
    layout: WeightLayout = WeightLayout.OUT_IN,
    measure: bool = True,
    workspace: Workspace | None = None,
    scale_dtype: torch.dtype | None = None,
) -> RoundedWeight:
    """Round a weight to a grid in place, on the device where it lives; it stays of its dtype.

    :param weight: float32, bfloat16 or float16, with the axes that ``layout`` says: (out, in) or (expert, out, in), the
        same with the last two exchanged, or (out, in, ...). Every expert is a matrix of its own.
    :param measure: whether to work out the error figures, which takes about half as long again.
    :param workspace: memory to use again; a caller with many weights passes the same one each time.
    :param scale_dtype: that scales are rounded to, for a format that stores no other; by default the weight's.
    :returns: the figures of the weight, its scales and zero points.
    :raises PlanError: the weight is not there (``meta``), or its dtype or number of axes is not one of these.

    With ``clamp_ratio`` c, each matrix is first clipped to its quantiles c/2 and 1 - c/2, linearly interpolated. A row
    (an output channel) with NaN or Inf is left exactly as it is, and the others are rounded as if it were not there.
    """
    if reason := unfit(weight, layout):
        raise PlanError(f"the weight {reason}")
    sums = Sums(weight.numel(), str(weight.device), scheme.bitwidth, measure)
    # Scales of blocks are of a format's own type, which float32 holds.
    kept = torch.float32 if scheme.of_floats and scheme.of_floats.block else weight.dtype
    rounder = _Rounder(scheme, sums, workspace or Workspace(), scale_dtype or kept)
    if weight.numel():
        target = weight.detach()
        matrices = layout.matrices(target)
        for matrix in matrices.unbind() if matrices.ndim == 3 else (matrices,):
            rounder.matrix_(matrix)
        if matrices.data_ptr() != target.data_ptr():
            target.copy_(matrices.view(target.shape))
    return RoundedWeight(sums, rounder.grids, rounder.scale_dtype)


def unfit(weight: Tensor, layout: WeightLayout) -> str | None:
    """The reason why ``fake_quantize_`` cannot take a weight, to follow its name in a sentence, or None."""
    if weight.is_meta:
        return (
            "is offloaded or not loaded (device meta), so there is nothing to quantize; load the whole model onto its "
            "devices or leave this out with `exclude`"
        )
    if weight.dtype not in DTYPES:
        return (
            f"is {str(weight.dtype).removeprefix('torch.')}, but RTN takes float32, bfloat16 or float16; load the "
            "model in one of these or leave this out with `exclude`"
        )
    if weight.ndim < 2 or (layout is not WeightLayout.CONV and weight.ndim > 3):
        return f"has shape {tuple(weight.shape)}, which is not {layout}"
    return None


@dataclass(slots=True)
class _Grid:
    """The numbers that weights are rounded to: ``scale`` and ``zero`` are float32 and broadcast against them."""

    scale: Tensor
    zero: Tensor | None
    lowest: int
    highest: int
    finite: bool
    """True if the weights surely hold no NaN and no Inf: both would be in the scale, and so would too wide a range."""

    @classmethod
    def over(cls, part: Tensor, scheme: Scheme, clip: Clip | None, dtype: torch.dtype) -> _Grid:
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
        floor, ceiling = _scale_limits(dtype, scheme.bitwidth)
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


@cache
def _scale_limits(dtype: torch.dtype, bitwidth: int) -> tuple[float, float]:
    """The smallest and the largest scale: no code times its scale may overflow."""
    limits = torch.finfo(dtype)
    # An all-zero unit needs a scale that is not zero, even where hardware flushes subnormal numbers to zero.
    smallest = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    return smallest, limits.max / 2 ** (bitwidth - 1)


@dataclass
class _Rounder:
    """One weight on its way: how it is rounded, with what memory, and its sums and grids so far."""

    scheme: Scheme
    sums: Sums
    workspace: Workspace
    scale_dtype: torch.dtype
    grids: list[list[list[_Grid | FloatGrid]]] = field(default_factory=list)

    def matrix_(self, matrix: Tensor) -> None:
        """Round a matrix (out, in) in place."""
        clip = _clip_bounds(matrix, self.scheme.clamp_ratio) if self.scheme.clamp_ratio else None
        round_rows_ = kernel_for(matrix, self.scheme)
        if round_rows_ is None:
            self.grids.append(self._in_blocks_(matrix, clip))
            return
        rows = round_rows_(
            matrix,
            self.scheme,
            clip=clip,
            measure=self.sums.measure,
            scale_dtype=self.scale_dtype,
            scale_limits=_scale_limits(self.scale_dtype, self.scheme.bitwidth),
        )
        self.sums.of_device.append(rows.sums)
        self.grids.append([[_Grid(rows.scales, rows.zero_points, *self.scheme.code_range, finite=True)]])

    def _in_blocks_(self, matrix: Tensor, clip: Clip | None) -> list[list[_Grid | FloatGrid]]:
        at_once = _rows_at_once(matrix)
        together = _blocks(matrix, at_once) if self.scheme.per_channel else (matrix,)
        over = grid_over(matrix, self.scheme, clip) if self.scheme.of_floats else _Grid.over
        return [self._rows_(rows, at_once, clip, over) for rows in together]

    def _rows_(self, rows: Tensor, at_once: int, clip: Clip | None, over: GridOver) -> list[_Grid | FloatGrid]:
        """Round rows that share no scale with rows elsewhere."""
        parts = _parts(rows, self.scheme.group_size)
        grids = [over(part, self.scheme, clip, self.scale_dtype) for part in parts]
        if clip or not all(grid.finite for grid in grids):
            finite = _finite_rows(rows)
            if not finite.all():
                kept = rows[finite]
                self.sums.non_finite_rows += len(rows) - len(kept)
                of_finite = self._rows_(kept, at_once, clip, over) if len(kept) else grids
                rows[finite] = kept
                return grids if self.scheme.per_channel else of_finite
        for part, grid in zip(parts, grids, strict=True):
            for block in _blocks(part, at_once):
                self._block_(block, grid, clip)
        return grids

    def _block_(self, block: Tensor, grid: _Grid | FloatGrid, clip: Clip | None) -> None:
        in_place = block.dtype == torch.float32
        if in_place and not self.sums.measure:
            grid.snap_(self._clip_(block, clip) if clip else block)
            return
        flat, copy = self.workspace.like(block)
        copy.copy_(block)
        if self.sums.measure:
            self.sums.signal += _energy(flat)
        if in_place:
            copy.sub_(grid.snap_(self._clip_(block, clip) if clip else block))
        else:
            rounded = grid.snap_(self._clip_(copy, clip) if clip else copy).to(block.dtype)
            if self.sums.measure:
                copy.copy_(rounded).sub_(block)
            block.copy_(rounded)
        if self.sums.measure:
            self.sums.noise += _energy(flat)

    def _clip_(self, block: Tensor, clip: Clip) -> Tensor:
        low, high = clip
        self.sums.clipped += int(torch.count_nonzero(block < low)) + int(torch.count_nonzero(block > high))
        return block.clamp_(low, high)


def kernel_for(matrix: Tensor, scheme: Scheme) -> Callable[..., Any] | None:
    """``round_rows_`` of the kernel that rounds a matrix in one pass, or None where plain operations have to."""
    if not takes_triton(matrix):
        return None
    if scheme.of_floats:
        return None
    from invarlock.quantization.fused import round_rows_, takes

    return round_rows_ if takes(matrix, scheme) else None


def _finite_rows(rows: Tensor) -> Tensor:
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()


def _blocks(part: Tensor, at_once: int) -> Sequence[Tensor]:
    # A view of a whole costs as much time as an operation on a small weight.
    return (part,) if part.shape[0] <= at_once else torch.split(part, at_once)


def _rows_at_once(matrix: Tensor) -> int:
    """Number of rows in a block. Float32 copies of 16-bit blocks must stay below the size of the matrix."""
    most = sizes_of(matrix.device).weights
    elements = most if matrix.dtype == torch.float32 else min(most, matrix.numel() // 4)
    return max(1, elements // matrix.shape[1])


def _parts(rows: Tensor, group_size: int | None) -> list[Tensor]:
    """Views of rows (out, in) whose last axis shares a scale: the rows, or their groups and the short last group."""
    columns = rows.shape[1]
    if group_size is None or group_size >= columns:
        return [rows]
    whole = columns // group_size * group_size
    parts = [rows[:, :whole].view(rows.shape[0], -1, group_size)]
    if whole < columns:
        parts.append(rows[:, whole:])
    return parts


def _clip_bounds(matrix: Tensor, ratio: float) -> Clip | None:
    """The quantiles ratio/2 and 1 - ratio/2 over the finite rows, linearly interpolated; None without such rows.

    On the host, with numpy: ``torch.quantile`` takes neither 16-bit dtypes nor more than 2^24 numbers.
    """
    finite = _finite_rows(matrix)
    if not finite.any():
        return None
    rows = matrix if finite.all() else matrix[finite]
    numbers = rows.to(device="cpu", dtype=torch.float32, copy=True).numpy().ravel(order="K")
    # As float64: numpy would otherwise look for the place in the order in float32, too coarse for millions of numbers.
    places = np.array([ratio / 2, 1 - ratio / 2], dtype=np.float64)
    low, high = np.quantile(numbers, places, overwrite_input=True).astype(np.float32).tolist()
    return low, high


def _energy(flat: Tensor) -> float:
    """The sum of squares of a float32 vector, in float64 where float32 would overflow or lose small numbers."""
    energy = float(torch.dot(flat, flat))
    if 1e-25 < energy < math.inf:
        return energy
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
