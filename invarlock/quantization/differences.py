"""Differences of two tensors, taken a few rows at a time: no copy of a whole tensor is made."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from invarlock.models.precision import for_float64
from invarlock.models.sizes import sizes_of


def are_equal(old: Tensor, new: Tensor) -> bool:
    """True if two tensors of one shape hold the same numbers, of whatever types."""
    return all(torch.equal(before, after) for before, after in in_blocks(old, new))


def is_cast(old: Tensor, new: Tensor, dtype: torch.dtype) -> bool:
    """True if a tensor holds the numbers of another one as a type rounds them."""
    return all(torch.equal(before.to(dtype).float(), after) for before, after in in_blocks(old, new))


def differing_rows(old: Tensor, new: Tensor) -> Tensor:
    """Indices of the rows of a matrix of finite numbers that are not what they were."""
    # Three times as fast as `(before != after).any(1)`.
    largest = [(after - before).abs_().amax(1) for before, after in in_blocks(old, new)]
    return torch.cat(largest).nonzero().flatten()


def relative_error(old: Tensor, new: Tensor) -> float | None:
    """``||new - old|| / ||old||``; None where that is no number."""
    noise = signal = 0.0
    for before, after in in_blocks(old, new):
        noise += _energy(after - before)
        signal += _energy(before)
    quotient = math.sqrt(noise / signal) if signal else math.nan
    return quotient if math.isfinite(quotient) else None


def in_blocks(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Rows of tensors of one shape as float32, at a time as many as stay in a cache with what is made of them.

    On a CPU these are so few that torch works on them with one thread: two that wait for each other after each small
    step take ten times as long where something else keeps the cores busy.
    """
    flat = [tensor.flatten(0, -2) if tensor.ndim > 1 else tensor.reshape(-1) for tensor in tensors]
    numbers = flat[0].numel() // max(1, len(flat[0]))
    at_once = max(1, sizes_of(flat[0].device).words // (len(flat) + 1) // max(1, numbers))
    for rows in zip(*(torch.split(tensor, at_once) for tensor in flat), strict=True):
        yield [block.float() for block in rows]


def _energy(block: Tensor) -> float:
    return float(torch.linalg.vector_norm(for_float64(block), dtype=torch.float64)) ** 2
