"""Round-to-nearest in place: the arithmetic, for one weight.

The numbers are those of compressed-tensors (``calculate_qparams`` and ``_quantize_dequantize``), so that a checkpoint
exported in that format carries what was judged here. With b bits, codes from -2^(b-1) to 2^(b-1) - 1, and rounding half
to even; the formulas are in ``quantization.integers``, and those of floating-point grids in ``quantization.floats``.

The scale is rounded to the dtype of the weight, or to the one that a format stores scales in, before it is used;
everything else is float32, and the product is rounded to the dtype of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from invarlock.core.results import EditedWeight
from invarlock.models.kernels import takes_triton
from invarlock.models.precision import for_float64
from invarlock.models.sizes import sizes_of
from invarlock.quantization.clipping import clip_bounds, finite_rows
from invarlock.quantization.floats import Clip, FloatGrid, grid_over
from invarlock.quantization.integers import IntegerGrid, MinimumGrid, scale_limits
from invarlock.quantization.layout import WeightLayout
from invarlock.quantization.scheme import PlanError, Scheme
from invarlock.quantization.sums import Sums, effects
from invarlock.quantization.tightening import tightened

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

AnyGrid: TypeAlias = IntegerGrid | MinimumGrid | FloatGrid
GridOver = Callable[..., AnyGrid]
"""As ``IntegerGrid.over``."""


@dataclass(frozen=True)
class RoundedWeight:
    """The effect of rounding on a weight, and the scales and zero points of its codes.

    These are (out, groups), (out, 1) or, where all of a matrix has one, (1, 1). Fused experts have a third axis, in
    front. The values of a row with NaN or Inf mean nothing. They are joined on demand: few weights are stored as codes.
    """

    sums: Sums
    grids: Sequence[Sequence[Sequence[AnyGrid]]]
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

    @cached_property
    def minimums(self) -> Tensor | None:
        """The numbers at the zero points, float32; None where these are zero."""
        has_minimum = isinstance(self.grids[0][0][0], MinimumGrid)
        return self._joined(lambda grid: grid.minimum) if has_minimum else None

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
        units = rounded.float().reshape(*self.scales.shape, -1)
        if self.minimums is not None:
            units = units - self.minimums.unsqueeze(-1)
        codes = (units / self.scales.float().unsqueeze(-1)).round_()
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
    columns: Tensor | None = None,
) -> RoundedWeight:
    """Round a weight to a grid in place, on the device where it lives; it stays of its dtype.

    :param weight: float32, bfloat16 or float16, with the axes that ``layout`` says: (out, in) or (expert, out, in), the
        same with the last two exchanged, or (out, in, ...). Every expert is a matrix of its own.
    :param measure: whether to work out the error figures, which takes about half as long again.
    :param workspace: memory to use again; a caller with many weights passes the same one each time.
    :param scale_dtype: that scales are rounded to, for a format that stores no other; by default the weight's. Grids
        that are not symmetric then have a minimum of this dtype and no zero point, see ``quantization.integers``.
    :param columns: how much the loss depends on each input, float32 (..., in), for scales ``fisher``.
    :returns: the figures of the weight, its scales and zero points.
    :raises PlanError: the weight is not there (``meta``), or its dtype or number of axes is not one of these.

    With ``clamp_ratio`` c, each matrix is first clipped to its quantiles c/2 and 1 - c/2, linearly interpolated. A row
    (an output channel) with NaN or Inf is left exactly as it is, and the others are rounded as if it were not there.
    """
    (rounded,) = fake_quantize_alike_(
        [weight],
        scheme,
        layout=layout,
        measure=measure,
        workspace=workspace,
        scale_dtype=scale_dtype,
        columns=columns,
    )
    return rounded


def fake_quantize_alike_(
    weights: Sequence[Tensor],
    scheme: Scheme,
    *,
    layout: WeightLayout = WeightLayout.OUT_IN,
    measure: bool = True,
    workspace: Workspace | None = None,
    scale_dtype: torch.dtype | None = None,
    columns: Tensor | None = None,
) -> list[RoundedWeight]:
    """Round weights of one shape, dtype, device and order in memory, as ``fake_quantize_`` rounds each.

    Where a kernel takes them, one launch rounds them all.

    :raises PlanError: as of ``fake_quantize_``; nothing has been changed then.
    """
    memory = workspace or Workspace()
    rounders = [_Rounder.of(weight, scheme, layout, measure, memory, scale_dtype, columns) for weight in weights]
    kernel = rounders[0].kernel()
    if kernel and not scheme.clamp_ratio:
        _launch_(kernel, [(rounder, matrix) for rounder in rounders for matrix in rounder.matrices], None)
    else:
        for rounder in rounders:
            rounder.round_(kernel)
    return [rounder.done() for rounder in rounders]


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


@dataclass
class _Rounder:
    """One weight on its way: how it is rounded, with what memory, and its sums and grids so far."""

    weight: Tensor
    matrices: Sequence[Tensor]
    """The weight as matrices (out, in): views, or of a convolution that has none a copy."""
    scheme: Scheme
    sums: Sums
    workspace: Workspace
    scale_dtype: torch.dtype
    minimums: bool
    columns: Tensor | None
    """As of ``fake_quantize_``."""
    grids: list[list[list[AnyGrid]]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        scheme: Scheme,
        layout: WeightLayout,
        measure: bool,
        workspace: Workspace,
        scale_dtype: torch.dtype | None,
        columns: Tensor | None,
    ) -> _Rounder:
        """
        :raises PlanError: as of ``fake_quantize_``.
        """
        if reason := unfit(weight, layout):
            raise PlanError(f"the weight {reason}")
        sums = Sums(weight.numel(), str(weight.device), scheme.bitwidth, measure)
        # Scales of blocks are of a format's own type, which float32 holds.
        kept = torch.float32 if scheme.of_floats and scheme.of_floats.block else weight.dtype
        minimums = scale_dtype is not None and not scheme.symmetric
        weight = weight.detach()
        whole = layout.matrices(weight)
        matrices: Sequence[Tensor] = () if not weight.numel() else whole.unbind() if whole.ndim == 3 else (whole,)
        return cls(weight, matrices, scheme, sums, workspace, scale_dtype or kept, minimums, columns)

    def round_(self, kernel: Callable[..., Any] | None) -> None:
        """Round the matrices in place, one by one."""
        for number, matrix in enumerate(self.matrices):
            clip = clip_bounds(matrix, self.scheme.clamp_ratio) if self.scheme.clamp_ratio else None
            if kernel:
                _launch_(kernel, [(self, matrix)], clip)
            else:
                columns = None if self.columns is None else self.columns.reshape(-1, self.columns.shape[-1])[number]
                self.grids.append(self._in_blocks_(matrix, clip, columns))

    def kernel(self) -> Callable[..., Any] | None:
        """``round_rows_`` of the kernel that rounds the matrices in one pass; None where plain operations have to."""
        if self.minimums or self.columns is not None or self.scheme.of_floats or not takes_triton(self.weight):
            return None
        from invarlock.quantization.fused import round_rows_, takes

        return round_rows_ if self.matrices and takes(self.matrices[0], self.scheme) else None

    def done(self) -> RoundedWeight:
        """The result, once all matrices are rounded."""
        if self.matrices and self.matrices[0].data_ptr() != self.weight.data_ptr():
            (copied,) = self.matrices
            self.weight.copy_(copied.view(self.weight.shape))
        return RoundedWeight(self.sums, self.grids, self.scale_dtype)

    def _in_blocks_(self, matrix: Tensor, clip: Clip | None, columns: Tensor | None) -> list[list[AnyGrid]]:
        at_once = _rows_at_once(matrix)
        together = _blocks(matrix, at_once) if self.scheme.per_channel else (matrix,)
        over: GridOver = MinimumGrid.over if self.minimums else IntegerGrid.over
        if self.scheme.of_floats:
            over = grid_over(matrix, self.scheme, clip)
        return [self._rows_(rows, at_once, clip, over, columns) for rows in together]

    def _rows_(
        self, rows: Tensor, at_once: int, clip: Clip | None, over: GridOver, columns: Tensor | None
    ) -> list[AnyGrid]:
        """Round rows that share no scale with rows elsewhere."""
        parts = _parts(rows, self.scheme.group_size)
        grids = [over(part, self.scheme, clip, self.scale_dtype) for part in parts]
        if clip or not all(grid.finite for grid in grids):
            finite = finite_rows(rows)
            if not finite.all():
                kept = rows[finite]
                self.sums.non_finite_rows += len(rows) - len(kept)
                of_finite = self._rows_(kept, at_once, clip, over, columns) if len(kept) else grids
                rows[finite] = kept
                return grids if self.scheme.per_channel else of_finite
        if columns is not None:
            weights = _parts(columns.unsqueeze(0), self.scheme.group_size)
            for part, grid, of_part in zip(parts, grids, weights, strict=True):
                grid.scale = tightened(grid.scale, part, of_part, self.scheme.code_range, self.scale_dtype)
        for part, grid in zip(parts, grids, strict=True):
            for block in _blocks(part, at_once):
                self._block_(block, grid, clip)
        return grids

    def _block_(self, block: Tensor, grid: AnyGrid, clip: Clip | None) -> None:
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


def _launch_(kernel: Callable[..., Any], each: Sequence[tuple[_Rounder, Tensor]], clip: Clip | None) -> None:
    """Round matrices that are alike by one launch of a kernel, each for its weight."""
    first, _ = each[0]
    found = kernel(
        [matrix for _, matrix in each],
        first.scheme,
        clip=clip,
        measure=first.sums.measure,
        scale_dtype=first.scale_dtype,
        scale_limits=scale_limits(first.scale_dtype, first.scheme.bitwidth),
    )
    for (rounder, _), rows in zip(each, found, strict=True):
        rounder.sums.of_device.append(rows.sums)
        grid = IntegerGrid(rows.scales, rows.zero_points, *first.scheme.code_range, finite=True)
        rounder.grids.append([[grid]])


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


def _energy(flat: Tensor) -> float:
    """The sum of squares of a float32 vector, in float64 where float32 would overflow or lose small numbers."""
    energy = float(torch.dot(flat, flat))
    if 1e-25 < energy < math.inf:
        return energy
    return float(torch.linalg.vector_norm(for_float64(flat), dtype=torch.float64)) ** 2
