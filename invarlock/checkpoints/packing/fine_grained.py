"""FP8 as DeepSeek and transformers store it: E4M3 with ``weight_scale_inv``, a scale for each block or the tensor.

Despite its name the scale is what a number is multiplied with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import PackedWeight, Tensors, broken, expect, stems
from invarlock.checkpoints.reader import Checkpoint

SCALE = ".weight_scale_inv"


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says."""
    block = settings.get("weight_block_size")
    for stem in stems(checkpoint, SCALE):
        name = f"{stem}.weight"
        entry = checkpoint.entries.get(name)
        if entry is None or entry.dtype != torch.float8_e4m3fn or len(entry.shape) != 2:
            raise broken(checkpoint, f"{stem}{SCALE} is stored, but {name} is not a matrix of E4M3 numbers")
        rows, columns = entry.shape
        shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
        if block:
            shapes = [(math.ceil(rows / block[0]), math.ceil(columns / block[1]))]
        expect(checkpoint, f"{stem}{SCALE}", *shapes, of=name)
        grain = f"blocks of {block[0]} x {block[1]}" if block else "per tensor"
        yield PackedWeight(
            name,
            {"weight": name, "scale": f"{stem}{SCALE}"},
            entry.shape,
            torch.float32,
            f"FP8 (E4M3), {grain}",
            8,
            _unpacker(block or entry.shape),
        )


def _unpacker(block: tuple[int, int]) -> Any:
    def unpack(tensors: Tensors) -> Tensor:
        weight, scale = tensors["weight"].float(), tensors["scale"].float().reshape(-1, 1)
        if tensors["scale"].ndim == 2:
            scale = tensors["scale"].float()
        spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return weight * spread[: weight.shape[0], : weight.shape[1]]

    return unpack
