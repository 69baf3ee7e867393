"""bitsandbytes: NF4 and FP4, with scales that may be quantized themselves, and LLM.int8.

Two codes lie in a byte, the first one in the high half, row by row: ``w = quant_map[code] * absmax[block]``. Where
scales are codes too, they are ``nested_quant_map[code] * nested_absmax[block] + nested_offset``. In LLM.int8
``w = code * SCB / 127``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import PackedWeight, Tensors, broken, expect, stems
from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.errors import one_line

STATE = ".quant_state.bitsandbytes__"
"""Name, up to the kind of numbers, of the tensor that holds a weight's shape and size of blocks, as JSON in bytes."""
KINDS = {"nf4": "NF4", "fp4": "FP4 (bitsandbytes)"}
LEVELS = 127
"""Codes of LLM.int8 on either side of zero."""


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says."""
    for stem in stems(checkpoint, ".SCB"):
        name = f"{stem}.weight"
        entry = checkpoint.entries.get(name)
        if entry is None or entry.dtype != torch.int8 or len(entry.shape) != 2:
            raise broken(checkpoint, f"{stem}.SCB is stored, but {name} is not a matrix of int8")
        stored = {"codes": name, "scale": expect(checkpoint, f"{stem}.SCB", entry.shape[:1], of=name)}
        yield PackedWeight(name, stored, entry.shape, torch.float16, "INT8, per channel", 8, _int8, zero_scales=True)
    for kind in KINDS:
        for name in stems(checkpoint, f"{STATE}{kind}"):
            yield _of_four_bits(checkpoint, name, kind)


def _of_four_bits(checkpoint: Checkpoint, name: str, kind: str) -> PackedWeight:
    stored = {
        "codes": name,
        "map": expect(checkpoint, f"{name}.quant_map", (16,), of=name),
        "state": f"{name}{STATE}{kind}",
    }
    try:
        state = json.loads(bytes(checkpoint[stored["state"]].tolist()))
        shape, size, dtype = tuple(state["shape"]), int(state["blocksize"]), getattr(torch, state["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(checkpoint, f"{stored['state']} does not describe the weight: {one_line(error)}") from error
    count = math.prod(shape)
    if name not in checkpoint or checkpoint.entries[name].nbytes != -(-count // 2):
        raise broken(checkpoint, f"{name} does not hold {shape} numbers of 4 bits")
    blocks = -(-count // size)
    stored["scale"] = expect(checkpoint, f"{name}.absmax", (blocks,), of=name)
    if "nested_blocksize" in state:
        nested = -(-blocks // int(state["nested_blocksize"]))
        stored["nested"] = expect(checkpoint, f"{name}.nested_absmax", (nested,), of=name)
        stored["nested_map"] = expect(checkpoint, f"{name}.nested_quant_map", (256,), of=name)
    scales = ["nested"] if "nested" in stored else ["scale"]
    levels = [part for part in ("map", "nested_map") if part in stored]
    format_, unpack = f"{KINDS[kind]}, blocks of {size}", partial(_unpacked, state)
    return PackedWeight(name, stored, shape, dtype, format_, 4, unpack, scales, zero_scales=True, offsets=levels)


def _int8(tensors: Tensors) -> Tensor:
    return tensors["codes"].float() * tensors["scale"].float().unsqueeze(1) / LEVELS


def _unpacked(state: Mapping[str, Any], tensors: Tensors) -> Tensor:
    pairs, scale = tensors["codes"].contiguous().view(torch.uint8).flatten(), tensors["scale"]
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: math.prod(state["shape"])]
    if "nested" in tensors:
        spread = tensors["nested"].repeat_interleave(state["nested_blocksize"])[: len(scale)]
        scale = tensors["nested_map"][scale.int()] * spread + state["nested_offset"]
    numbers = tensors["map"].float()[codes.int()]
    weight: Tensor = numbers * scale.float().repeat_interleave(state["blocksize"])[: len(numbers)]
    return weight.view(state["shape"])
