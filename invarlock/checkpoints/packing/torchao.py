"""Torchao's tensors in safetensors, each described in JSON in the header of its file: INT8, INT1 to INT7, FP8.

A weight is stored as ``_weight_qdata`` and ``_weight_scale``, integers with ``_weight_zero_point``, too: the number is
``(code - zero point) * scale``. Source: torchao/prototype/safetensors/safetensors_support.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import PackedWeight, Tensors, broken, expect
from invarlock.checkpoints.reader import Checkpoint, header_of
from invarlock.core.inputs import complaints_of

NUMBERS = {
    "Float8Tensor": {torch.float8_e4m3fn: "FP8 (E4M3)", torch.float8_e5m2: "FP8 (E5M2)"},
    "Int8Tensor": {torch.int8: "INT8"},
    "IntxUnpackedToInt8Tensor": {torch.int8: "INT{bits}"},
}
"""Classes of tensors that are unpacked here; by the type of their codes, the numbers as reports name them."""
PARTS = {"qdata", "scale", "zero_point"}

Description = Mapping[str, Any]


def descriptions(folder: Path) -> dict[str, Description]:
    """Descriptions of the weights that are stored as codes.

    :raises InputError: a file or its header is broken.
    """
    described: dict[str, Description] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with complaints_of(f"{path}: its header cannot be read"):
            tensors = {name: json.loads(text) for name, text in header_of(path).items() if text.startswith("{")}
        described |= {name: entry for name, entry in tensors.items() if entry.get("_type") != "Tensor"}
    return described


def are_described(folder: Path) -> bool:
    """True if all weights that are stored as codes are matrices that are unpacked here; others take the library.

    :raises InputError: a header is broken.
    """
    described = descriptions(folder).values()
    with complaints_of(f"{folder}: the descriptions in the header of a file cannot be read"):
        return bool(described) and all(map(_is_known, described))


def _is_known(entry: Description) -> bool:
    if entry["_type"] not in NUMBERS:
        return False
    return len(entry["_data"]["block_size"]) == 2 and PARTS.issuperset(entry["_tensor_data_names"])


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says."""
    for name, description in descriptions(checkpoint.folder).items():
        with complaints_of(f"{checkpoint.folder}: the description of {name} in the header of its file cannot be read"):
            yield _packed(checkpoint, name, description)


def _packed(checkpoint: Checkpoint, name: str, description: Description) -> PackedWeight:
    stem, _, last = name.rpartition(".")
    stored = {part: f"{stem}._{last}_{part}" for part in description["_tensor_data_names"]}
    kind, data = description["_type"], description["_data"]
    codes = checkpoint.entries.get(stored["qdata"])
    if codes is None or codes.dtype not in NUMBERS[kind] or len(codes.shape) != 2:
        raise broken(checkpoint, f"{name} is described as {kind}, but {stored['qdata']} is not a matrix of such codes")
    rows, columns = codes.shape
    down, across = data["block_size"]
    grid = (-(-rows // down), -(-columns // across))
    # One scale of a whole tensor may lack axes.
    shapes = [grid, *([(), (1,)] if grid == (1, 1) else [])]
    for part in sorted(stored.keys() - {"qdata"}):
        expect(checkpoint, stored[part], *shapes, of=name)
    bits = int(data["target_dtype"]["_data"].removeprefix("int")) if "target_dtype" in data else 8

    def unpack(tensors: Tensors) -> Tensor:
        numbers = tensors["qdata"].float()
        if "zero_point" in tensors:
            numbers = numbers - _spread(tensors["zero_point"])
        return numbers * _spread(tensors["scale"])

    def _spread(of_blocks: Tensor) -> Tensor:
        spread = of_blocks.float().reshape(grid).repeat_interleave(down, 0).repeat_interleave(across, 1)
        return spread[:rows, :columns]

    symmetric = "zero_point" not in stored or not checkpoint[stored["zero_point"]].any()
    grain = _grain(codes.shape, (down, across))
    return PackedWeight(
        name,
        stored,
        codes.shape,
        getattr(torch, data["dtype"]["_data"]),
        f"{NUMBERS[kind][codes.dtype].format(bits=bits)}, {'' if symmetric else 'asymmetric, '}{grain}",
        bits,
        unpack,
    )


def activations_of(description: Description) -> Any:
    """How the inputs of a weight's module are rounded, as torchao says it; None where they are not."""
    return description["_data"].get("act_quant_kwargs") or description["_data"].get("activation_quantization")


def _grain(shape: tuple[int, ...], block: tuple[int, int]) -> str:
    if block == shape:
        return "per tensor"
    if block[0] == 1:
        return "per channel" if block[1] == shape[1] else f"groups of {block[1]}"
    return f"blocks of {block[0]} x {block[1]}"
