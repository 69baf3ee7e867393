"""Random numbers that are the same on every device: integer hashes of a seed and of their places.

A device's own generator gives other numbers than a CPU's, and a model would write other windows there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from invarlock.models.sizes import sizes_of

BITS = 23
"""Of a uniform number: as many as leave float32 one more, for the half that keeps it off 0 and 1."""


@dataclass
class Noise:
    """A stream of random numbers for rows of text; each call goes on where the last one ended.

    The numbers of a row do not depend on how many rows are written at once.
    """

    seed: int
    device: torch.device
    first: int = 0
    """Number of the first row."""
    _calls: count[int] = field(init=False, default_factory=count)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 numbers between 0 and 1, neither of them included; the first axis is one of rows."""
        return torch.cat([*self._few_rows(shape)])

    def exponential(self, *shape: int) -> Tensor:
        """Float32 numbers of the exponential distribution with mean 1."""
        return torch.cat([_exponential_(numbers) for numbers in self._few_rows(shape)])

    def drawn(self, logits: Tensor) -> Tensor:
        """A place along the last axis of logits (rows, ..., tokens), each drawn by its softmax, int64 (rows, ...).

        It is that of the largest of logits plus Gumbel noise, -log of an exponential number (Gumbel 1954).
        """
        places, first = [], 0
        for numbers in self._few_rows(logits.shape):
            of_rows = logits[first : first + len(numbers)]
            places.append(_exponential_(numbers).log_().sub_(of_rows).argmin(dim=-1))
            first += len(numbers)
        return torch.cat(places)

    def below(self, limit: int, *shape: int) -> Tensor:
        """Whole numbers from 0 to ``limit`` - 1, int64."""
        return (self.uniform(*shape) * limit).long().clamp_(max=limit - 1)

    def _few_rows(self, shape: Sequence[int]) -> Iterator[Tensor]:
        """Uniform numbers, as of ``uniform``, a few rows at a time: as many as stay in a cache, for many operations."""
        rows, places = (
            torch.arange(start, start + size, dtype=torch.int32, device=self.device)
            for start, size in ((self.first, shape[0]), (0, math.prod(shape[1:])))
        )
        keys = _hashed(_hashed(rows + _signed(self.seed * 0x9E3779B1)) + _signed(next(self._calls)))
        # Two keys, one before a hash and one after it: rows of which one is alike do not share their numbers.
        first, second = keys.unsqueeze(1), _hashed(keys + 1).unsqueeze(1)
        hashed = _hashed(places)
        at_once = max(1, sizes_of(self.device).hashes // max(1, len(places)))
        for of_rows in zip(torch.split(first, at_once), torch.split(second, at_once), strict=True):
            yield _fractions(hashed, *of_rows).view(-1, *shape[1:])


def _fractions(hashed: Tensor, first: Tensor, second: Tensor) -> Tensor:
    mixed = _hashed(_hashed(hashed + first).bitwise_xor_(second))
    return (mixed >> (32 - BITS)).bitwise_and_((1 << BITS) - 1).float().add_(0.5).mul_(1 / (1 << BITS))


def _exponential_(uniform: Tensor) -> Tensor:
    return uniform.neg_().log1p_().neg_()


def _hashed(numbers: Tensor) -> Tensor:
    """32-bit integers mixed so that each bit depends on all: lowbias32 of C. Wellons, "Hash Prospector"."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = (numbers >> shift).bitwise_and_((1 << (32 - shift)) - 1).bitwise_xor_(numbers).mul_(_signed(factor))
    return (numbers >> 16).bitwise_and_(0xFFFF).bitwise_xor_(numbers)


def _signed(number: int) -> int:
    """The 32-bit integer of the same bits, as torch has it."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) if number >> 31 else number
