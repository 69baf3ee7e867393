"""The sums of ``invarlock.models.digest`` in one pass over a tensor, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 4096
"""Words that a program takes at once: 16 for each of its threads."""


def fused_block_sums(words: Tensor, factors: Tensor) -> Tensor:
    """Sums of each block of words, int64 (blocks, 2).

    :param words: int32, (words,).
    :param factors: int64, (2, words of a block).
    """
    block = factors.shape[1]
    sums = torch.empty(-(-len(words) // block), 2, dtype=torch.int64, device=words.device)
    if len(sums):
        _block_sums[(len(sums),)](words, factors, sums, len(words), block=block, step=STEP, num_warps=8)
    return sums


@triton.jit
def _block_sums(words, factors, sums, count, block: tl.constexpr, step: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, step)
    first = tl.zeros([step], tl.int64)
    second = tl.zeros([step], tl.int64)
    for start in range(0, block, step):
        there = number * block + start + place
        word = tl.load(words + there, mask=there < count, other=0).to(tl.int64)
        first += word * tl.load(factors + start + place)
        second += word * tl.load(factors + block + start + place)
    tl.store(sums + number * 2, tl.sum(first, 0))
    tl.store(sums + number * 2 + 1, tl.sum(second, 0))
