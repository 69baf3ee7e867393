"""Candidates of a search: the schemes that each weight may get, what they cost in bits and in loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invarlock.core.progress import counted
from invarlock.quantization.partners import partners_of
from invarlock.quantization.rounding import Workspace, fake_quantize_
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import WeightTarget
from invarlock.search.fisher import Fisher

BITS = range(2, 9)
GROUPS = (32, 64, 128)
"""Sizes that engines have kernels for."""
SCALE_BITS = 16
"""Of a scale; of a zero point, too, as compressed-tensors stores it next to nothing."""


@dataclass(frozen=True)
class Choice:
    """A scheme for a decision."""

    scheme: Scheme
    bits: int
    """Of all its weights, scales included."""
    rise: float
    """Predicted, of the loss, in nats per token."""


@dataclass(frozen=True)
class Decision:
    """Weights that get the same scheme, and the schemes that they may get."""

    names: tuple[str, ...]
    """Of the weights, as rules match them."""
    weights: int
    choices: tuple[Choice, ...]


def schemes(base: Scheme) -> list[Scheme]:
    """The schemes that are tried, all else as a plan has it."""
    return [dataclasses.replace(base, bitwidth=bits, group_size=size) for bits in BITS for size in GROUPS]


def bits_of(target: WeightTarget, scheme: Scheme) -> int:
    """The bits that a weight takes with its scales."""
    rows = target.layout.matrices(target.parameter).shape
    groups = -(-rows[-1] // scheme.group_size) if scheme.group_size else 1
    outputs = target.parameter.numel() // rows[-1]
    scales = groups * outputs if scheme.per_channel else 1
    return target.parameter.numel() * scheme.bitwidth + scales * SCALE_BITS
