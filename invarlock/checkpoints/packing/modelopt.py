"""Layouts of NVIDIA's Model Optimizer: a weight, its scales, and the factors that its inputs are smoothed with.

- FP8: E4M3 with ``weight_scale`` for the tensor, each channel, or each block, ``(rows, 1, columns, 1)`` blocks.
- NVFP4: pairs of E2M1 in bytes, ``weight_scale`` in E4M3 for each block of 16, ``weight_scale_2`` for the tensor.
- INT4 (AWQ): two output channels in a byte, ``weight_scale`` for each group. INT8: ``weight_scale`` for each channel.
- MXFP8 and MXFP4: ``weight_scale`` in E8M0 for each block of 32.

What a number is multiplied with are the scales themselves. ``pre_quant_scale`` multiplies the inputs, so it belongs to
the columns of the weight.
Sources: modelopt/torch/export/quant_utils.py, and vLLM's model_executor/layers/quantization/modelopt.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import E8M0_BIAS, PackedWeight, Tensors, broken, expect, stems
from invarlock.checkpoints.reader import Checkpoint, Entry

SCALE, SECOND, SMOOTHING = ".weight_scale", ".weight_scale_2", ".pre_quant_scale"
E4M3 = torch.float8_e4m3fn
NVFP4_BLOCK, MX_BLOCK = 16, 32


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says; the dtypes of weights and scales tell formats apart, which may be mixed."""
    for stem in stems(checkpoint, SCALE):
        name = f"{stem}.weight"
        entry, scale = checkpoint.entries.get(name), checkpoint.entries[f"{stem}{SCALE}"]
        if entry is None or len(entry.shape) != 2:
            raise broken(checkpoint, f"{stem}{SCALE} is stored, but {name} is not a matrix")
        stored = {"weight": name, "scale": f"{stem}{SCALE}"}
        shape, format_, bits, scales = _form(checkpoint, stem, entry, scale)
        expect(checkpoint, stored["scale"], *scales, of=name)
        if format_.startswith("NVFP4"):
            stored["second"] = expect(checkpoint, f"{stem}{SECOND}", (), (1,), of=name)
        if f"{stem}{SMOOTHING}" in checkpoint:
            stored["smoothing"] = expect(checkpoint, f"{stem}{SMOOTHING}", shape[1:], of=name)
        factors = [part for part in ("scale", "second", "smoothing") if part in stored]
        yield PackedWeight(name, stored, shape, torch.float32, format_, bits, partial(_unpacked, shape), factors)


def _form(
    checkpoint: Checkpoint, stem: str, entry: Entry, scale: Entry
) -> tuple[tuple[int, int], str, int, list[tuple[int, ...]]]:
    """Shape of a weight, name of its format, bits of a code, and shapes that its scales may have."""
    rows, columns = entry.shape
    if entry.dtype == E4M3 and scale.dtype == torch.uint8:
        return (rows, columns), f"MXFP8, blocks of {MX_BLOCK}", 8, [(rows, math.ceil(columns / MX_BLOCK))]
    if entry.dtype == E4M3:
        grain, shapes = _grain(entry.shape, scale.shape)
        return (rows, columns), f"FP8 (E4M3), {grain}", 8, shapes
    if entry.dtype == torch.int8:
        return (rows, columns), "INT8, per channel", 8, [(rows,), (rows, 1)]
    if entry.dtype == torch.uint8 and scale.dtype == torch.uint8:
        return (rows, 2 * columns), f"MXFP4, blocks of {MX_BLOCK}", 4, [(rows, math.ceil(2 * columns / MX_BLOCK))]
    if entry.dtype == torch.uint8 and scale.dtype == E4M3:
        return (rows, 2 * columns), f"NVFP4, blocks of {NVFP4_BLOCK}", 4, [(rows, 2 * columns // NVFP4_BLOCK)]
    if entry.dtype == torch.uint8 and f"{stem}{SECOND}" not in checkpoint:
        size = columns // (scale.shape[-1] if scale.shape and scale.shape[-1] else 1)
        return (2 * rows, columns), f"INT4, groups of {size}", 4, [(2 * rows, math.ceil(columns / max(size, 1)))]
    types = f"{str(entry.dtype).removeprefix('torch.')} and scales of {str(scale.dtype).removeprefix('torch.')}"
    raise broken(checkpoint, f"{stem}.weight is packed by modelopt in a layout that is not known ({types})")


def _grain(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[str, list[tuple[int, ...]]]:
    """Units that share a scale of FP8, and the shapes of their scales."""
    rows, columns = shape
    if len(scales) == 4 or (len(scales) == 2 and scales[1] > 1):
        down, across = (scales[0], scales[-2]) if len(scales) == 4 else scales
        if down and across and rows % down == columns % across == 0:
            return f"blocks of {rows // down} x {columns // across}", [(down, 1, across, 1), (down, across)]
    if len(scales) and scales[0] > 1:
        return "per channel", [(rows,), (rows, 1)]
    return "per tensor", [(), (1,), (1, 1)]


def _unpacked(shape: tuple[int, int], tensors: Tensors) -> Tensor:
    rows, columns = shape
    scale = _factors(tensors["scale"]).reshape(_grid(tensors["scale"], rows))
    if "second" in tensors:
        scale = scale * tensors["second"].float()
    down, across = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
    spread = scale.repeat_interleave(down, 0).repeat_interleave(across, 1)[:rows, :columns]
    weight = _numbers(tensors, shape).float() * spread
    return weight * tensors["smoothing"].float() if "smoothing" in tensors else weight


def _grid(scale: Tensor, rows: int) -> tuple[int, int]:
    """Rows and columns of scales, however many axes they are stored with."""
    down = rows if scale.shape == (rows,) else scale.shape[0] if scale.ndim > 1 else 1
    return down, scale.numel() // down


def _factors(scale: Tensor) -> Tensor:
    return torch.exp2(scale.float() - E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()


def _numbers(tensors: Tensors, shape: tuple[int, int]) -> Tensor:
    weight = tensors["weight"]
    if weight.dtype != torch.uint8:
        return weight
    if weight.shape[0] == shape[0]:
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        numbers: Tensor = unpack_fp4_from_uint8(weight, *shape, dtype=torch.float32)
        return numbers
    nibbles = torch.stack([weight & 15, weight >> 4], dim=1).flatten(0, 1).to(torch.int8)
    return torch.where(nibbles < 8, nibbles, nibbles - 16)
