"""A digest of a tensor that is made where the tensor lies, and is the same on every device.

Each block of the tensor, as 32-bit words w_i, is reduced to two sums of w_i f_i modulo 2^64 with odd factors f_i that
depend on the place alone (Lemire and Kaser 2014, "Strongly universal string hashing is fast", MULTILINEAR). Sums of
integers do not depend on their order, so that any device makes them as it likes; only the sums, 16 bytes for 256 KiB,
are copied to the host and hashed there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.nn import functional

from invarlock.models.kernels import takes_triton
from invarlock.models.sizes import sizes_of

BLOCK = 1 << 16
"""Words of a block: few enough for a processor's cache, with their products; part of the digest's definition."""
SUMS = 2


def block_sums(tensor: Tensor) -> Tensor:
    """Sums of a tensor's blocks, int64 (blocks, 2), on its device; the last block may be a short one.

    A tensor on ``meta`` has none.
    """
    if tensor.is_meta:
        return torch.empty(0, SUMS, dtype=torch.int64)
    words = _words(tensor)
    factors = _factors(words.device)
    if takes_triton(words):
        from invarlock.models.fused_sums import fused_block_sums

        return fused_block_sums(words, factors)
    whole = len(words) // BLOCK * BLOCK
    at_once = max(1, sizes_of(words.device).words // BLOCK)
    parts = [*torch.split(words[:whole].view(-1, BLOCK), at_once), words[whole:].view(1, -1)]
    sums = [_sums(part, factors[:, : part.shape[1]]) for part in parts if part.numel()]
    return torch.cat(sums) if sums else factors.new_empty(0, SUMS)


def digest_of(description: str, numbers: Tensor) -> str:
    """128-bit digest, as hexadecimal digits, of a text and of numbers: a tensor's sums, or its bytes."""
    state = xxhash.xxh3_128(description.encode())
    state.update(numbers.cpu().numpy().data)
    return state.hexdigest()


def octets_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8, not copied where they lie side by side; none of a tensor on ``meta``."""
    if tensor.is_meta:
        return torch.empty(0, dtype=torch.uint8)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _sums(words: Tensor, factors: Tensor) -> Tensor:
    """Sums (blocks, 2) of words (blocks, n) and factors (2, n)."""
    if words.device.type == "cpu":
        # Without products in memory, numpy takes half of the time of torch, which has two threads wait for each other.
        of_place = factors.numpy().view(np.uint64)
        sums = np.stack([of_place @ block.astype(np.int64).view(np.uint64) for block in words.numpy()])
        return torch.from_numpy(sums.view(np.int64))
    # The factors make the products 64 bits wide: in 32, the sign bits of two words would cancel out.
    return torch.stack([(words * of_place).sum(1) for of_place in factors], dim=1)


def _words(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as int32 words, zeros after the last."""
    octets = octets_of(tensor)
    missing = -len(octets) % 4
    if missing or octets.storage_offset() % 4:
        octets = functional.pad(octets, (0, missing)) if missing else octets.clone()
    return octets.view(torch.int32)


@cache
def _factors(device: torch.device) -> Tensor:
    """Odd factors for every place in a block, int64 (2, BLOCK): splitmix64 of it (Steele, Lea and Flood 2014)."""
    places = np.arange(1, SUMS * BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    places = (places ^ (places >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    places = (places ^ (places >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    places = (places ^ (places >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(places.view(np.int64).reshape(SUMS, BLOCK)).to(device)
