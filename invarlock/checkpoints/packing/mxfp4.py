"""MXFP4 as GPT-OSS stores it: fused experts in blocks of 32 numbers of E2M1, each with a power of two.

``_blocks`` is (expert, out, blocks, 16) bytes of two numbers, the first one in the low half; ``_scales`` are their
exponents in E8M0. The model has the experts (expert, in, out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import E8M0_BIAS, PackedWeight, Tensors, broken, expect, stems
from invarlock.checkpoints.reader import Checkpoint

BYTES = 16
"""Of a block of 32."""


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says."""
    for name in stems(checkpoint, "_blocks"):
        entry = checkpoint.entries[f"{name}_blocks"]
        if entry.dtype != torch.uint8 or len(entry.shape) != 4 or entry.shape[-1] != BYTES:
            raise broken(checkpoint, f"{name}_blocks is not (experts, out, blocks, {BYTES}) bytes")
        experts, rows, blocks, _ = entry.shape
        stored = {
            "blocks": f"{name}_blocks",
            "scale": expect(checkpoint, f"{name}_scales", (experts, rows, blocks), of=name),
        }
        shape = (experts, 2 * BYTES * blocks, rows)
        yield PackedWeight(name, stored, shape, torch.bfloat16, f"MXFP4, blocks of {2 * BYTES}", 4, _unpacked)


def _unpacked(tensors: Tensors) -> Tensor:
    """Expert by expert: on the way to their numbers they take many times as much memory."""
    return torch.stack([_expert(*each) for each in zip(tensors["blocks"], tensors["scale"], strict=True)])


def _expert(blocks: Tensor, scales: Tensor) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    numbers = unpack_fp4_from_uint8(blocks, scales.numel(), 2 * BYTES, dtype=torch.float32)
    products = numbers * torch.exp2(scales.reshape(-1, 1).float() - E8M0_BIAS)
    weight: Tensor = products.view(len(scales), -1).to(torch.bfloat16).mT.contiguous()
    return weight
