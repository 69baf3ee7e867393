"""The grid that a weight lies on: how somebody else quantized it, read off the numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invarlock.quantization.layout import WeightLayout

GROUP_SIZES = (32, 64, 128, 256)
MOST_LEVELS = 256
"""Of 8 bits, the widest grid of the schemes that are told apart."""
STEPS_TO_SMALLEST = 12
"""A small group need not hold its grid's smallest step; its smallest number is at most so many."""
STEPS_TO_SOME = 4
"""Few units of any grid have a smallest number of more steps: where all do, it is none."""
SHARE = 0.98
"""Of the units that must lie on a grid: in a small group the smallest number can be many steps."""
FEW = 16
"""Units looked at first: enough to tell what lies on no grid."""
SHARE_OF_FEW = 0.8
"""Of these units, which are too few to hold them to ``SHARE``."""
MOST = 256
"""Units looked at in the end, evenly spaced: of a block of rows that breaks ``SHARE`` several are among them, and a
large weight takes no longer than a small one."""


@dataclass(frozen=True)
class Grid:
    """Numbers that are whole multiples of a scale."""

    bits: int
    """The fewest that hold as many levels as any unit spans, of those that were looked at."""
    group_size: int | None
    """None where a whole output channel shares a scale."""

    def __str__(self) -> str:
        grain = f"group of {self.group_size}" if self.group_size else "row"
        return f"a grid of {2**self.bits} levels a {grain} ({self.bits} bits)"


@torch.no_grad()
def infer_grid(weight: Tensor, layout: WeightLayout = WeightLayout.OUT_IN) -> Grid | None:
    """The coarsest grid of at most 256 levels that a weight lies on, or None.

    :param weight: a matrix, or several (fused experts, convolutions), as ``layout`` says; of any floating dtype.

    A unit (a row, or a group of it) lies on a grid if all its numbers are whole multiples of one scale, up to the
    rounding of the weight's dtype. The scale is read off the small codes, where rounding cannot hide it: the smallest
    magnitude is taken for a few steps, and the numbers up to sixteen steps refine it by least squares. A few units are
    looked at first, and more of them only where these lie on a grid.
    """
    rows, eps = layout.matrices(weight.detach()).flatten(0, -2), torch.finfo(weight.dtype).eps
    for group_size in (None, *reversed(GROUP_SIZES)):
        if group_size is not None and (rows.shape[1] <= group_size or rows.shape[1] % group_size):
            continue
        if _levels(_units(rows, group_size, FEW), eps, SHARE_OF_FEW) is None:
            continue
        levels = _levels(_units(rows, group_size, MOST), eps, SHARE)
        if levels is not None:
            return Grid(max(2, math.ceil(math.log2(levels))), group_size)
    return None


def some_rows(rows: Tensor, count: int = 64) -> Tensor:
    """At most so many rows of a matrix, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count, device=rows.device).long()]


def _units(rows: Tensor, group_size: int | None, count: int) -> Tensor:
    """At most so many units, evenly spaced, as float32 (units, numbers)."""
    rows = some_rows(rows, count)
    return some_rows(rows if group_size is None else rows.reshape(-1, group_size), count).float()


def _levels(units: Tensor, eps: float, share: float) -> int | None:
    """The most levels that a unit spans, if a share of the units lies on a grid."""
    magnitudes = units.abs()
    smallest = torch.where(magnitudes > 0, magnitudes, torch.inf).amin(1, keepdim=True)
    smallest = torch.where(smallest.isfinite(), smallest, 1.0)
    if (magnitudes.amax(1, keepdim=True) / smallest > MOST_LEVELS).float().mean() > 1 - share:
        return None
    spans = torch.zeros(len(units), device=units.device)
    left = torch.arange(len(units), device=units.device)
    for steps in range(1, STEPS_TO_SMALLEST + 1):
        spans[left] = _spans(units[left], smallest[left] / steps, eps)
        left = left[spans[left] == 0]
        if not len(left) or (steps == STEPS_TO_SOME and len(left) == len(units)):
            break
    if (spans > 0).float().mean() < share:
        return None
    levels = int(spans.max())
    return levels if levels > 1 else None


def _spans(units: Tensor, step: Tensor, eps: float) -> Tensor:
    """Number of levels that each unit spans on the grid of about this step; 0 for one that does not lie on it."""
    magnitudes = units.abs()
    codes = (magnitudes / step).round_()
    small = codes * (codes <= 16)
    fitted = (magnitudes * small).sum(1, keepdim=True) / (codes * small).sum(1, keepdim=True).clamp(min=1)
    step = torch.where(fitted > 0, fitted, step)
    codes = (units / step).round_()
    spans = codes.amax(1).clamp(min=0) - codes.amin(1).clamp(max=0) + 1
    on_grid = ((units - codes * step).abs() <= 2 * eps * magnitudes + 1e-4 * step).all(1) & (spans <= MOST_LEVELS)
    return torch.where(on_grid, spans, 0.0)
