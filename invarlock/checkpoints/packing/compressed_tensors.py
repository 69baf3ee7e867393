"""Layouts of compressed-tensors, which its own library unpacks: integers, FP8, MXFP4, MXFP6, MXFP8, NVFP4."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import FLOATS, PackedWeight, Tensors, broken, expect, stems
from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.errors import one_line

SCALE = ".weight_scale"
OPTIONAL = {"zero_point": ".weight_zero_point", "global_scale": ".weight_global_scale", "weight_shape": ".weight_shape"}
GRAINS = {"tensor": "per tensor", "channel": "per channel", "token": "per token"}
GROUPED = ("group", "tensor_group")


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says."""
    described = _described(checkpoint, settings)
    for stem, scheme in _schemes(checkpoint, described):
        yield _packed(checkpoint, stem, scheme, described.format)


def schemes(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names of modules whose weights are packed, each with its scheme as the library has it."""
    return _schemes(checkpoint, _described(checkpoint, settings))


def _schemes(checkpoint: Checkpoint, described: Any) -> Iterator[tuple[str, Any]]:
    return ((stem, _scheme_of(checkpoint, described, stem)) for stem in stems(checkpoint, SCALE))


def _described(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Any:
    """The section as the library has it."""
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    known = {name: settings[name] for name in QuantizationConfig.model_fields if name in settings}
    try:
        return QuantizationConfig.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("quantization_config", *first["loc"])))
        raise broken(checkpoint, f"config.json: {where}: {one_line(ValueError(first['msg']))}") from error


def _scheme_of(checkpoint: Checkpoint, described: Any, module: str) -> Any:
    """The scheme of a module's weights: of the group that names it, else of the one that names its class."""
    groups = [group for group in (described.config_groups or {}).values() if group.weights is not None]
    named = (group for group in groups if any(_names(target, module) for target in group.targets))
    of_class = (group for group in groups if not all(target.startswith("re:") for target in group.targets))
    scheme = next(named, None) or next(of_class, None)
    if scheme is None:
        raise broken(checkpoint, f"{module}{SCALE} is stored, and no group in quantization_config is about {module}")
    return scheme


def _names(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _packed(checkpoint: Checkpoint, stem: str, scheme: Any, format_: str) -> PackedWeight:
    compressor = _compressor(checkpoint, scheme, scheme.format or format_)
    name, weights = f"{stem}.weight", scheme.weights
    main = f"{name}_packed" if f"{name}_packed" in checkpoint else name
    if main not in checkpoint:
        raise broken(checkpoint, f"{stem}{SCALE} is stored, and neither {name} nor {name}_packed is")
    stored = {main.removeprefix(f"{stem}."): main, "weight_scale": f"{stem}{SCALE}"}
    stored |= {
        f"weight_{part}".replace("weight_weight", "weight"): f"{stem}{suffix}"
        for part, suffix in OPTIONAL.items()
        if f"{stem}{suffix}" in checkpoint
    }
    shape = _shape(checkpoint, main, stem, weights.num_bits)
    grids = _scale_shapes(shape, weights)
    expect(checkpoint, stored["weight_scale"], *grids, of=name)
    if not weights.symmetric:
        words = math.ceil(shape[0] * weights.num_bits / 32)
        expect(checkpoint, f"{stem}.weight_zero_point", *grids, (words, grids[0][-1] if grids[0] else 1), of=name)
    if weights.strategy == "tensor_group":
        expect(checkpoint, f"{stem}.weight_global_scale", (1,), (), of=name)
    scale = checkpoint.entries[stored["weight_scale"]].dtype

    def unpack(tensors: Tensors) -> Tensor:
        unpacked: Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
        # Padded to whole blocks.
        return unpacked[: shape[0], : shape[1]]

    return PackedWeight(
        name,
        stored,
        shape,
        scale if scale in FLOATS else torch.bfloat16,
        format_of(weights),
        weights.num_bits,
        unpack,
        [part for part in ("weight_scale", "weight_global_scale") if part in stored],
    )


def _compressor(checkpoint: Checkpoint, scheme: Any, format_: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from torch.nn import Linear

    if format_ == "mixed-precision":
        format_ = infer_module_format(Linear, scheme).value
    try:
        return BaseCompressor.get_value_from_registry(str(format_))
    except KeyError as error:
        raise broken(checkpoint, f"config.json: quantization_config: unknown format {format_!r}") from error


def _shape(checkpoint: Checkpoint, main: str, stem: str, bits: int) -> tuple[int, ...]:
    entry = checkpoint.entries[main]
    if len(entry.shape) != 2:
        raise broken(checkpoint, f"{main} has shape {entry.shape}, and a packed weight is a matrix")
    if main.endswith(".weight"):
        return entry.shape
    rows, columns = entry.shape
    if entry.dtype == torch.uint8:
        return rows, columns * 8 // bits
    stated = tuple(map(int, checkpoint[expect(checkpoint, f"{stem}.weight_shape", (2,), of=main)]))
    if (rows, columns) != (stated[0], math.ceil(stated[1] * bits / 32)):
        raise broken(checkpoint, f"{main} has shape {entry.shape}, which does not hold {stated} numbers of {bits} bits")
    return stated


def _scale_shapes(shape: tuple[int, ...], weights: Any) -> list[tuple[int, ...]]:
    rows, columns = shape
    if weights.strategy == "tensor":
        return [(), (1,), (1, 1)]
    if weights.strategy == "channel":
        return [(rows, 1)]
    if weights.strategy == "block":
        height, width = weights.block_structure
        return [(math.ceil(rows / height), math.ceil(columns / width))]
    return [(rows, math.ceil(columns / weights.group_size))]


def format_of(weights: Any) -> str:
    """Name of the numbers that arguments of the library describe, and what shares a scale."""
    grain = GRAINS.get(weights.strategy, "")
    if weights.strategy == "block":
        grain = "blocks of {} x {}".format(*weights.block_structure)
    elif weights.strategy in GROUPED:
        grain = f"{'blocks' if weights.type == 'float' else 'groups'} of {weights.group_size}"
    if weights.type == "int":
        return f"INT{weights.num_bits}, {'' if weights.symmetric else 'asymmetric, '}{grain}"
    if weights.scale_dtype == torch.uint8:
        return f"MXFP{weights.num_bits}, {grain}"
    return f"{'NVFP4' if weights.num_bits == 4 else 'FP8 (E4M3)'}, {grain}"
