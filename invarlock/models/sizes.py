"""Sizes of the pieces that a device works on at once, from its caches or its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """Largest pieces on one device; more than one kind of them is never there at the same time."""

    weights: int
    """Weights that are rounded at once."""
    words: int
    """32-bit words of which a digest is made at once; their products take four times as much memory."""
    hashes: int
    """Random numbers that are hashed at once; four times as many bytes, a few times over."""
    log_probs: int
    """Bytes of float32 log-probabilities at once."""
    logits: int
    """Bytes of a batch's logits in float32."""
    batch_tokens: int
    """Tokens of a batch."""
    cache: int
    """Bytes of keys and values of the windows that a model writes at once."""


CPU = Sizes(
    weights=1 << 22,
    words=1 << 16,
    hashes=1 << 18,
    log_probs=4 * MIB,
    logits=128 * MIB,
    batch_tokens=2048,
    cache=1024 * MIB,
)
"""For caches of a few MiB: larger pieces are slower, smaller ones pay more for each call."""


def sizes_of(device: torch.device) -> Sizes:
    """Sizes for a device.

    A GPU has thousands of cores and no large cache: a piece that does not fill it pays for the start of each kernel. So
    pieces are as large as its memory allows, 2 GiB at most for the largest. All of its memory counts, not what is free
    at the moment: both passes of a run have to see the same batches, for their sums to be the same to the last bit.
    """
    if device.type == "cpu":
        return CPU
    room = min(2048 * MIB, _memory(device) // 16)
    return Sizes(
        weights=room // 16,
        words=room // 32,
        hashes=room // 32,
        log_probs=room // 8,
        logits=room // 2,
        batch_tokens=1 << 14,
        cache=room // 2,
    )


def _memory(device: torch.device) -> int:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return 8192 * MIB
