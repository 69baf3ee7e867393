"""Layouts of words of 32 bits: GPTQ (v1 and v2), AWQ (gemm) and MLX (affine)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing.packed import WORDS, PackedWeight, Tensors, broken, expect, stems, words_unpacked
from invarlock.checkpoints.reader import Checkpoint

WHOLE, OF_GPTQ = (2, 4, 8), (2, 3, 4, 8)
"""Bits whose codes do not cross words, and those of GPTQ."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in a word of each of eight output channels: AutoAWQ interleaves them for its kernels."""


def gptq_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says: words along the inputs, ``w = (code - zero) * scale``.

    Version 1 (``checkpoint_format`` gptq) stores each zero point less one, version 2 as it is; ``g_idx`` has the group
    of each input. A module may have settings of its own.
    """
    first = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for stem in stems(checkpoint, ".qweight"):
        own = _own(settings, stem)
        bits, size = _bits(checkpoint, own, "bits", only=OF_GPTQ), int(own.get("group_size", -1))
        rows, columns = _matrix(checkpoint, f"{stem}.qweight")
        inputs, groups = rows * 32 // bits, _groups(rows * 32 // bits, size)
        parts = _parts(checkpoint, stem, (groups, columns), (groups, columns * bits // 32))
        order: dict[str, str] = {}
        if f"{stem}.g_idx" in checkpoint:
            order = {"order": expect(checkpoint, f"{stem}.g_idx", (inputs,), of=f"{stem}.weight")}
        yield _weight(checkpoint, stem, parts | order, (columns, inputs), bits, size, partial(_gptq, bits, size, first))


def awq_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says: interleaved words along the outputs, ``w = (code - zero) * scale``."""
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise broken(checkpoint, f"its weights are packed by awq in version {version}; only gemm can be unpacked")
    for stem in stems(checkpoint, ".qweight"):
        own = _own(settings, stem)
        bits, size = _bits(checkpoint, own, "bits", only=(4,)), int(own.get("group_size", 128))
        inputs, words = _matrix(checkpoint, f"{stem}.qweight")
        columns, groups = words * 32 // bits, _groups(inputs, size)
        parts = _parts(checkpoint, stem, (groups, columns), (groups, words))
        yield _weight(checkpoint, stem, parts, (columns, inputs), bits, size, partial(_awq, bits, size))


def mlx_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says: words along the inputs, ``w = code * scale + bias``.

    A module may have settings of its own, under its name.
    """
    for stem in stems(checkpoint, ".biases"):
        own = settings.get(stem)
        of_module = {**settings, **(own if isinstance(own, Mapping) else {})}
        if (mode := of_module.get("mode", "affine")) != "affine":
            raise broken(checkpoint, f"{stem} is packed by mlx in mode {mode}; only affine can be unpacked")
        bits, size = _bits(checkpoint, of_module, "bits"), int(of_module.get("group_size", 64))
        name = f"{stem}.weight"
        rows, words = _matrix(checkpoint, name)
        grid = (rows, _groups(words * 32 // bits, size))
        parts = {
            "codes": name,
            "scale": expect(checkpoint, f"{stem}.scales", grid, of=name),
            "bias": expect(checkpoint, f"{stem}.biases", grid, of=name),
        }
        yield _weight(checkpoint, stem, parts, (rows, words * 32 // bits), bits, size, partial(_mlx, bits, size))


def _own(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Settings of a module: AutoRound has them by its name, GPTQModel by the first regular expression that fits."""
    named = (settings.get("extra_config") or {}).get(module, {})
    dynamic = (settings.get("dynamic") or {}).items()
    matched = (own for pattern, own in dynamic if re.match(pattern.removeprefix("+:"), module))
    return {**settings, **next(matched, {}), **named}


def _gptq(bits: int, size: int, first: int, tensors: Tensors) -> Tensor:
    codes = words_unpacked(tensors["codes"].mT.contiguous(), bits)
    zeros = words_unpacked(tensors["zeros"], bits) + first
    order = tensors.get("order", torch.arange(codes.shape[1]) // (size if size > 0 else codes.shape[1])).long()
    weight: Tensor = (codes - zeros[order].mT).float() * tensors["scale"].float()[order].mT
    return weight.to(tensors["scale"].dtype)


def _awq(bits: int, size: int, tensors: Tensors) -> Tensor:
    places = torch.tensor(AWQ_ORDER)
    codes, zeros = (
        words_unpacked(tensors[part], bits).reshape(len(tensors[part]), -1, 8)[..., places].flatten(-2)
        for part in ("codes", "zeros")
    )
    spread = partial(_spread, inputs=len(codes), size=size)
    weight: Tensor = (codes - spread(zeros)).float() * spread(tensors["scale"]).float()
    return weight.mT.contiguous().to(tensors["scale"].dtype)


def _mlx(bits: int, size: int, tensors: Tensors) -> Tensor:
    codes = words_unpacked(tensors["codes"], bits)
    scale, bias = (tensors[part].float().repeat_interleave(size, 1) for part in ("scale", "bias"))
    return (codes.float() * scale + bias).to(tensors["scale"].dtype)


def _spread(groups: Tensor, inputs: int, size: int) -> Tensor:
    """Rows of groups as rows of inputs."""
    return groups.repeat_interleave(size if size > 0 else inputs, 0)[:inputs]


def _bits(checkpoint: Checkpoint, settings: Mapping[str, Any], key: str, only: tuple[int, ...] = WHOLE) -> int:
    bits = settings.get(key)
    if bits not in only:
        known = " or ".join(map(str, only))
        raise broken(checkpoint, f"config.json: quantization_config.{key} is {bits!r}; only {known} can be unpacked")
    return int(bits)


def _groups(inputs: int, size: int) -> int:
    return -(-inputs // size) if size > 0 else 1


def _matrix(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    entry = checkpoint.entries.get(name)
    if entry is None or len(entry.shape) != 2 or entry.dtype not in WORDS:
        raise broken(checkpoint, f"{name} is not a matrix of 32-bit words")
    return entry.shape[0], entry.shape[1]


def _parts(checkpoint: Checkpoint, stem: str, scales: tuple[int, int], zeros: tuple[int, int]) -> dict[str, str]:
    name = f"{stem}.weight"
    return {
        "codes": f"{stem}.qweight",
        "scale": expect(checkpoint, f"{stem}.scales", scales, of=name),
        "zeros": expect(checkpoint, f"{stem}.qzeros", zeros, of=name),
    }


def _weight(
    checkpoint: Checkpoint,
    stem: str,
    parts: dict[str, str],
    shape: tuple[int, int],
    bits: int,
    size: int,
    unpack: Callable[[Tensors], Tensor],
) -> PackedWeight:
    grain = f"groups of {size}" if size > 0 else "per channel"
    dtype = checkpoint.entries[parts["scale"]].dtype
    format_, offsets = f"INT{bits}, asymmetric, {grain}", [part for part in ("bias",) if part in parts]
    return PackedWeight(f"{stem}.weight", parts, shape, dtype, format_, bits, unpack, offsets=offsets)
