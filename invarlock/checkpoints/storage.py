"""Formats and sizes in which checkpoints store their weights, read off headers; no weight is read."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invarlock.checkpoints.packing.unpacked import (
    UnpackedCheckpoint,
    configuration_of,
    layout_of,
    method_of,
    open_checkpoint,
)
from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.errors import InputError
from invarlock.core.storage import Storage, StoredType

PLAIN = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

OF_ACTIVATIONS = re.compile(r"(_scale|_zero_point)$")
"""Names of what is stored to round activations or the cache, and is no weight's."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight as a checkpoint stores it."""

    format: str
    parameters: int
    nbytes: int
    """Scales and zero points counted."""
    bits: int | None = None
    """Of each code, where the weight is stored as codes."""

    @property
    def change(self) -> str:
        """The format as the change of a weight, with its bits."""
        return f"{self.format} ({self.bits} bits)"


@dataclass(frozen=True)
class BlockWeight(StoredWeight):
    """A weight in the blocks of a GGUF file, whose scales belong to the type."""

    @property
    def change(self) -> str:
        return f"{self.format} ({8 * self.nbytes / self.parameters:.5g} bits per weight)"


def weights_in(checkpoint: Path) -> dict[str, StoredWeight]:
    """The weights of a folder or a GGUF file, by the names that it has for them; empty where that cannot be told.

    :raises InputError: the checkpoint is broken.
    """
    if checkpoint.suffix == ".gguf":
        return dict(_blocks(checkpoint))
    if not checkpoint.is_dir():
        return {}
    if method_of(configuration_of(checkpoint)) and layout_of(checkpoint) is None:
        # Its tensors are not the weights.
        return {}
    return dict(_tensors(open_checkpoint(checkpoint)))


def storage_of(checkpoint: Path) -> Storage | None:
    """The storage of a checkpoint, or None where it cannot be told."""
    try:
        weights = weights_in(checkpoint)
    except InputError:
        # Whoever loaded it has told what is wrong, or reads it in a way of its own.
        return None
    files = [checkpoint] if checkpoint.is_file() else checkpoint.glob("*.safetensors")
    return _summed(weights.values(), sum(path.stat().st_size for path in files)) if weights else None


def _summed(weights: Iterable[StoredWeight], file_bytes: int) -> Storage:
    of_format: defaultdict[str, list[StoredWeight]] = defaultdict(list)
    for weight in weights:
        of_format[weight.format].append(weight)
    counts = {format_: sum(weight.parameters for weight in found) for format_, found in of_format.items()}
    nbytes = {format_: sum(weight.nbytes for weight in found) for format_, found in of_format.items()}
    total = sum(counts.values())
    types = [
        StoredType(format_, count, count / total, 8 * nbytes[format_] / count)
        for format_, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return Storage(file_bytes, total, 8 * sum(nbytes.values()) / total, types)


def _tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredWeight]]:
    packed: Mapping[str, Any] = checkpoint.packed if isinstance(checkpoint, UnpackedCheckpoint) else {}
    for name, entry in checkpoint.entries.items():
        count = math.prod(entry.shape)
        if isinstance(checkpoint, UnpackedCheckpoint) and (weight := packed.get(name)):
            yield name, StoredWeight(weight.format, count, checkpoint.nbytes_stored(weight), weight.bits)
        elif entry.dtype in PLAIN and count and not OF_ACTIVATIONS.search(name):
            yield name, StoredWeight(PLAIN[entry.dtype], count, entry.nbytes)


def _blocks(file: Path) -> Iterator[tuple[str, StoredWeight]]:
    import gguf

    for tensor in gguf.GGUFReader(file).tensors:
        count, kind = int(tensor.n_elements), tensor.tensor_type
        if gguf.GGML_QUANT_SIZES[kind][0] == 1:
            yield tensor.name, StoredWeight(kind.name, count, int(tensor.n_bytes))
        elif bits := re.search(r"\d", kind.name):
            yield tensor.name, BlockWeight(kind.name, count, int(tensor.n_bytes), int(bits[0]))
