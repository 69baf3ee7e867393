"""Damage to one weight, in place: of any shape with two axes or more, in float32, bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WeightDamage = Callable[[Tensor, torch.Generator], Any]


def _shuffle(weight: Tensor, seed: torch.Generator) -> None:
    weight.copy_(weight[torch.randperm(len(weight), generator=seed)])


def _transpose(weight: Tensor, seed: torch.Generator) -> None:
    """The numbers in the other order, as a loader with the wrong layout reads them."""
    weight.copy_(weight.mT.clone().reshape(weight.shape))


def _truncate(weight: Tensor, seed: torch.Generator) -> None:
    weight[len(weight) // 2 :] = 0


def _outliers(weight: Tensor, seed: torch.Generator) -> None:
    places = torch.randint(weight.numel(), (max(8, weight.numel() // 2000),), generator=seed)
    signs = torch.sign(torch.randn(len(places), generator=seed)).to(weight.dtype)
    weight.view(-1)[places] = 40 * weight.abs().mean() * signs


def _flip_bits(weight: Tensor, seed: torch.Generator) -> None:
    """The highest bit of the exponent, in 1 of 20,000 weights: 0.01 becomes 1e36 in float32 and bfloat16."""
    places = torch.randint(weight.numel(), (max(2, weight.numel() // 20_000),), generator=seed)
    bits = weight.view({2: torch.int16, 4: torch.int32}[weight.itemsize])
    bits.view(-1)[places] ^= 1 << (8 * weight.itemsize - 2)


def _noise(weight: Tensor, seed: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=seed) * weight.std())


WEIGHT_DAMAGES: dict[str, WeightDamage] = {
    "zeroed": lambda weight, seed: weight.zero_(),
    "negated": lambda weight, seed: weight.neg_(),
    "scaled by 4": lambda weight, seed: weight.mul_(4),
    "shuffled": _shuffle,
    "transposed": _transpose,
    "truncated": _truncate,
    "with outliers": _outliers,
    "with bit flips": _flip_bits,
    "overflown": lambda weight, seed: weight[3].fill_(float("inf")),
    "with one NaN": lambda weight, seed: weight.view(-1)[0].fill_(float("nan")),
    "replaced by noise": _noise,
}


def _some(weight: Tensor, seed: torch.Generator) -> Tensor:
    """One row of ten."""
    return torch.randperm(len(weight), generator=seed)[: max(2, int(0.1 * len(weight)))]


def _shuffle_rows(weight: Tensor, seed: torch.Generator) -> None:
    rows = _some(weight, seed)
    weight[rows] = weight[rows.roll(1)]


def _zero_rows(weight: Tensor, seed: torch.Generator) -> None:
    weight[_some(weight, seed)] = 0


def _replace_rows(weight: Tensor, seed: torch.Generator) -> None:
    rows = _some(weight, seed)
    weight[rows] = torch.randn(len(rows), weight.shape[1], generator=seed).to(weight.dtype) * weight.std()


ROW_DAMAGES: dict[str, WeightDamage] = {
    "shuffled": _shuffle_rows,
    "zeroed": _zero_rows,
    "replaced by noise": _replace_rows,
}
"""Of an embedding."""
