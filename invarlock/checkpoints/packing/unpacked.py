"""A checkpoint of codes and scales, read as the weights that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invarlock.checkpoints.packing import (
    auto_round,
    bitsandbytes,
    compressed_tensors,
    fine_grained,
    modelopt,
    mxfp4,
    torchao,
    word_layouts,
)
from invarlock.checkpoints.packing.packed import CODES, ZERO, Layout, PackedWeight, broken, unsound
from invarlock.checkpoints.reader import Checkpoint, Entry
from invarlock.checkpoints.soundness import read_json
from invarlock.core.inputs import complaints_of

LAYOUTS: Mapping[str, Layout] = {
    "compressed-tensors": compressed_tensors.packed_weights,
    "fp8": fine_grained.packed_weights,
    "gptq": word_layouts.gptq_weights,
    "awq": word_layouts.awq_weights,
    "mlx": word_layouts.mlx_weights,
    "modelopt": modelopt.packed_weights,
    "bitsandbytes": bitsandbytes.packed_weights,
    "mxfp4": mxfp4.packed_weights,
    "auto-round": auto_round.packed_weights,
    "torchao": torchao.packed_weights,
}
"""By method, as ``method_of`` has it."""
MODELOPT = "hf_quant_config.json"
OTHER_NAMES = {"modelopt": "modelopt", "intel/auto-round": "auto-round"}
"""Names of methods by how a name begins that some versions write."""


class UnpackedCheckpoint(Checkpoint):
    """Tensors by name, packed ones unpacked when asked for; what else belongs to these is left out.

    :raises InputError: also where packed tensors do not fit each other.
    """

    def __init__(self, folder: Path, layout: Layout, settings: Mapping[str, Any]) -> None:
        self.packed: Mapping[str, PackedWeight] = {}
        self.device = torch.device("cpu")
        """Where packed weights are unpacked."""
        super().__init__(folder)
        with complaints_of(f"{folder}: its quantization_config cannot be read"):
            packed = {weight.name: weight for weight in layout(self, settings)}
        self._stored = self.entries
        used = {name for weight in packed.values() for name in weight.stored.values()}
        self.packed = packed
        self.entries = {name: entry for name, entry in self._stored.items() if name not in used}
        for name, entry in self.entries.items():
            if name.endswith(".weight") and entry.dtype in CODES and name not in packed:
                raise broken(self, f"{name} is stored as codes ({entry.dtype}), and its scales are missing")
        self.entries |= {weight.name: self._entry(weight) for weight in packed.values()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.packed:
            return super().__getitem__(name)
        weight = self.packed[name]
        stored = {part: self._read(self._stored[name].file, name) for part, name in weight.stored.items()}
        parts = {part: tensor.to(self.device) for part, tensor in stored.items()}
        with complaints_of(f"{self.folder}: {name} cannot be unpacked"):
            return weight.unpack(parts).to(weight.dtype)

    def check_scales(self) -> None:
        """Refuse scales and offsets that no quantizer writes; reads all of them.

        :raises InputError: a scale is zero, or either is not finite.
        """
        for weight in self.packed.values():
            for part in (*weight.scales, *weight.offsets):
                name = weight.stored[part]
                wrong = unsound(self._read(self._stored[name].file, name))
                if wrong and not (wrong == ZERO and (weight.zero_scales or part in weight.offsets)):
                    raise broken(
                        self, f"{name} holds {'numbers' if part in weight.offsets else 'scales'} that are {wrong}"
                    )

    def nbytes_stored(self, weight: PackedWeight) -> int:
        """Bytes that a weight takes, scales and all."""
        return sum(self._stored[name].nbytes for name in weight.stored.values())

    def _entry(self, weight: PackedWeight) -> Entry:
        return Entry(self._stored[next(iter(weight.stored.values()))].file, weight.shape, weight.dtype)


def open_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint, its packed weights unpacked where the layout is known.

    :raises InputError: as ``Checkpoint`` and ``UnpackedCheckpoint`` say.
    """
    layout = layout_of(folder)
    settings = settings_of(configuration_of(folder))
    return UnpackedCheckpoint(folder, layout, settings) if layout else Checkpoint(folder)


def layout_of(folder: Path) -> Layout | None:
    """The layout of a checkpoint's packed weights; None where there are none, or only a library unpacks them.

    :raises InputError: a file or its header is broken.
    """
    method = method_of(configuration_of(folder))
    return None if method == "torchao" and not torchao.are_described(folder) else LAYOUTS.get(method)


def configuration_of(folder: Path) -> dict[str, Any]:
    """The configuration of a checkpoint; ModelOpt may say in a file of its own how weights are packed."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "quantization_config" in config or not (folder / MODELOPT).is_file():
        return config
    section = read_json(folder / MODELOPT).get("quantization")
    return {**config, "quantization_config": {"quant_method": "modelopt", **(section or {})}}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section of a configuration that says how weights are packed; empty where they are not."""
    section = config.get("quantization_config") or config.get("quantization")
    return section if isinstance(section, Mapping) else {}


def method_of(config: Mapping[str, Any]) -> str:
    """The method that packed a checkpoint's weights; empty where none did.

    MLX writes no name of a method, and a section ``quantization`` besides.
    """
    settings = settings_of(config)
    if not settings:
        # Anything but a section is reported as an unknown method.
        return str(config.get("quantization_config") or "")
    method = settings.get("quant_method", settings.get("quant_library", "mlx" if "quantization" in config else "None"))
    return next((ours for theirs, ours in OTHER_NAMES.items() if str(method).startswith(theirs)), str(method))
