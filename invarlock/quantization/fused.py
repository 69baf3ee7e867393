"""Round-to-nearest in one pass over matrices, as a Triton kernel: a program takes a row from memory and puts it back.

The formulas are in the docstring of ``invarlock.quantization.rounding``; the codes, scales and zero points are equal to
those of its plain operations bit for bit. So is every quotient: a program works out one reciprocal per scale, and two
fused multiply-adds correct each product with it to what IEEE division gives (Markstein 1990, "Computation of elementary
functions on the IBM RISC System/6000 processor"), as CUDA's own division does after an approximate reciprocal.

Triton's interpreter has no fused multiply-add, and cuts bfloat16 off where hardware rounds. There ``compiled`` is
false, and division and rounding are done by arithmetic that leaves a backend no choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from invarlock.quantization.scheme import Scheme

LONGEST_ROW = 1 << 16
"""Columns, rounded up to whole powers of two: a program holds its row in registers, and more than this spills."""

ALIGNED = 16
"""Numbers that two matrices are a multiple of apart, for which vectors are loaded and stored."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True)
class RoundedRows:
    """Grids of a matrix (out, in) that was rounded in place, and its sums; all on the device of the matrix."""

    scales: Tensor
    """Float32, (out, groups)."""
    zero_points: Tensor | None
    """Whole numbers in float32, (out, groups); None where zero is in the middle of the grid."""
    sums: Tensor
    """Float64, (out, 4), of each row: squares of the weights, squares of the errors, clipped weights, 1 for NaN or Inf.

    The squares are 0 where errors were not to be measured.
    """


def takes(matrix: Tensor, scheme: Scheme) -> bool:
    """True if the kernel can round a matrix (out, in) under a scheme."""
    groups, width = _tile(matrix.shape[1], scheme.group_size)
    return scheme.per_channel and groups * width <= LONGEST_ROW


def round_rows_(
    matrices: Sequence[Tensor],
    scheme: Scheme,
    *,
    clip: tuple[float, float] | None,
    measure: bool,
    scale_dtype: torch.dtype,
    scale_limits: tuple[float, float],
) -> list[RoundedRows]:
    """Round matrices (out, in) in place. Rows with NaN or Inf stay exactly as they are, and are in no other sum.

    :param matrices: of one shape, dtype, device and order in memory; one launch rounds them all, because a device
        rounds a matrix in the time in which Python launches a kernel.
    :param clip: the smallest and the largest number that clipping leaves.
    :param measure: whether to sum the squares of weights and errors.
    :param scale_dtype: dtype that scales are rounded to.
    :param scale_limits: the smallest and the largest scale.
    """
    first, count = matrices[0], len(matrices)
    rows, columns = first.shape
    size = min(scheme.group_size or columns, columns)
    groups = -(-columns // size)
    lowest, highest = scheme.code_range
    limits = torch.finfo(first.dtype)
    compiled = first.is_cuda
    grids = torch.empty(1 if scheme.symmetric else 2, count, rows, groups, device=first.device)
    sums = torch.empty(count, rows, 4, dtype=torch.float64, device=first.device)
    places = [(matrix.data_ptr() - first.data_ptr()) // first.itemsize for matrix in matrices]
    padded_groups, padded_size = _tile(columns, scheme.group_size)
    _round_row[(count * rows,)](
        first if compiled or first.dtype != torch.bfloat16 else first.view(torch.int16),
        torch.tensor(places, device=first.device),
        grids,
        sums,
        count * rows,
        rows,
        columns,
        *first.stride(),
        lowest,
        highest,
        scheme.levels,
        *scale_limits,
        limits.max * (1 - limits.eps),
        *(clip or (0.0, 0.0)),
        symmetric=scheme.symmetric,
        clip=clip is not None,
        measure=measure,
        groups=groups,
        size=size,
        padded_groups=padded_groups,
        padded_size=padded_size,
        dtype=_DTYPES[first.dtype],
        scale_dtype=_DTYPES[scale_dtype],
        compiled=compiled,
        alignment=ALIGNED if all(place % ALIGNED == 0 for place in places) else 1,
        num_warps=max(1, min(16, padded_groups * padded_size // 512)),
        enable_fp_fusion=False,
    )
    zeros: Iterable[Tensor | None] = repeat(None) if scheme.symmetric else grids[1]
    return [RoundedRows(*each) for each in zip(grids[0], zeros, sums, strict=False)]


@cache
def _tile(columns: int, group_size: int | None) -> tuple[int, int]:
    """Groups of a row, and columns of a group, each rounded up to a power of two: what Triton takes as shapes."""
    size = min(group_size or columns, columns)
    groups, width = triton.next_power_of_2(triton.cdiv(columns, size)), triton.next_power_of_2(size)
    return int(groups), int(width)


@triton.jit
def _float32(stored, dtype: tl.constexpr, compiled: tl.constexpr):
    """Numbers as they are stored, in float32; bfloat16 is int16 in the interpreter."""
    if dtype == tl.bfloat16 and not compiled:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def _stored(x, dtype: tl.constexpr, compiled: tl.constexpr):
    """Float32 numbers that a dtype holds exactly, as they are stored."""
    if dtype == tl.bfloat16 and not compiled:
        return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
    else:
        return x.to(dtype)


@triton.jit
def _round_to(x, dtype: tl.constexpr, compiled: tl.constexpr):
    """Float32 numbers rounded to a dtype, half to even."""
    if dtype == tl.bfloat16 and not compiled:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def _round_half_to_even(x):
    """Whole numbers next to numbers below 2^22, minus zero included: adding 2^23 leaves no bit for a fraction."""
    return _with_sign_of(x, (tl.abs(x) + 8388608.0) - 8388608.0)


@triton.jit
def _with_sign_of(x, size):
    """Float32 numbers of a size and with the signs of others."""
    bits = (size.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | (x.to(tl.int32, bitcast=True) & -0x80000000)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _quotient(x, divisor, reciprocal, compiled: tl.constexpr):
    """``x / divisor``, correctly rounded for divisors between 2^-100 and 2^100.

    :param reciprocal: of the divisor, correctly rounded.
    """
    if compiled:
        quotient = x * reciprocal
        quotient = tl.fma(tl.fma(-divisor, quotient, x), reciprocal, quotient)
        quotient = tl.fma(tl.fma(-divisor, quotient, x), reciprocal, quotient)
        # The corrections of minus zero add up to zero.
        return _with_sign_of(x, quotient)
    else:
        return tl.div_rn(x, divisor)


# Numbers of matrices and rows differ from weight to weight, and each variant would be compiled for itself.
@triton.jit(do_not_specialize=["programs", "rows"])
def _round_row(
    weights,
    places,
    grids,
    sums,
    programs,
    rows,
    columns,
    row_stride,
    column_stride,
    lowest,
    highest,
    levels,
    smallest_scale,
    largest_scale,
    largest_weight,
    clip_low,
    clip_high,
    symmetric: tl.constexpr,
    clip: tl.constexpr,
    measure: tl.constexpr,
    groups: tl.constexpr,
    size: tl.constexpr,
    padded_groups: tl.constexpr,
    padded_size: tl.constexpr,
    dtype: tl.constexpr,
    scale_dtype: tl.constexpr,
    compiled: tl.constexpr,
    alignment: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program % rows).to(tl.int64)
    # Where nothing is known of the place of a matrix, numbers are loaded one by one.
    weights += tl.multiple_of(tl.load(places + program // rows), alignment)
    group = tl.arange(0, padded_groups)
    within = tl.arange(0, padded_size)
    column = group[:, None] * size + within[None, :]
    there = (within[None, :] < size) & (column < columns)
    place = weights + row * row_stride + column.to(tl.int64) * column_stride
    # Numbers that are not there are 0: every grid holds zero, so that they change none.
    weight = _float32(tl.load(place, mask=there, other=0), dtype, compiled)
    infinite = tl.sum(tl.sum(tl.where(tl.abs(weight) < float("inf"), 0, 1), 1), 0)
    finite = infinite == 0
    kept = there & (tl.zeros([padded_groups, padded_size], tl.int32) + infinite == 0)
    original = weight
    outside = 0
    if clip:
        beyond = there & ((weight < clip_low) | (weight > clip_high))
        outside = tl.sum(tl.sum(beyond.to(tl.int32), 1), 0)
        weight = tl.where(there, tl.minimum(tl.maximum(weight, clip_low), clip_high), 0.0)

    if symmetric:
        scale = tl.div_rn(tl.max(tl.abs(weight), 1), tl.zeros([padded_groups], tl.float32) + levels)
        zero = tl.zeros([padded_groups], tl.float32)
    else:
        low = tl.minimum(tl.min(weight, 1), 0.0)
        high = tl.maximum(tl.max(weight, 1), 0.0)
        scale = tl.div_rn(high - low, tl.zeros([padded_groups], tl.float32) + levels)
        zero = low
    scale = tl.minimum(tl.maximum(_round_to(scale, scale_dtype, compiled), smallest_scale), largest_scale)
    scale = tl.where(finite, scale, 1.0)
    if not symmetric:
        zero = tl.minimum(tl.maximum(lowest - tl.div_rn(zero, scale), lowest), highest)
        zero = _round_half_to_even(zero)
        # With zero off the middle, codes reach further than the limits of the scale allow for.
        reach = tl.maximum(highest - zero, zero - lowest)
        held = tl.div_rn(tl.zeros([padded_groups], tl.float32) + 1.0, reach) * largest_weight
        scale = tl.minimum(scale, _round_to(held, dtype, compiled))

    # Both sides of a division times the same power of two, with which neither leaves float32.
    unit = tl.where(scale < 2.0**-60, 2.0**60, tl.where(scale > 2.0**60, 2.0**-60, 1.0))
    divisor = scale * unit
    reciprocal = tl.div_rn(tl.zeros([padded_groups], tl.float32) + 1.0, divisor)
    codes = _quotient(weight * unit[:, None], divisor[:, None], reciprocal[:, None], compiled)
    if not symmetric:
        codes += zero[:, None]
    codes = _round_half_to_even(tl.minimum(tl.maximum(codes, lowest), highest))
    rounded = _round_to((codes - zero[:, None]) * scale[:, None], dtype, compiled)
    tl.store(place, _stored(rounded, dtype, compiled), mask=kept)

    of_group = program.to(tl.int64) * groups + group
    tl.store(grids + of_group, scale, mask=group < groups)
    if not symmetric:
        tl.store(grids + programs * groups + of_group, zero, mask=group < groups)
    signal = tl.zeros([padded_groups], tl.float32)
    noise = tl.zeros([padded_groups], tl.float32)
    if measure:
        # In units of the scale: no square overflows or vanishes in float32.
        each = (unit * reciprocal)[:, None]
        parts, errors = original * each, (original - rounded) * each
        signal, noise = tl.sum(parts * parts, 1), tl.sum(errors * errors, 1)
    square = scale.to(tl.float64) * scale.to(tl.float64)
    of_row = sums + program * 4
    tl.store(of_row, tl.where(finite, tl.sum(square * signal, 0), 0.0))
    tl.store(of_row + 1, tl.where(finite, tl.sum(square * noise, 0), 0.0))
    tl.store(of_row + 2, tl.where(finite, outside, 0).to(tl.float64))
    tl.store(of_row + 3, tl.where(finite, 0.0, 1.0).to(tl.float64))
