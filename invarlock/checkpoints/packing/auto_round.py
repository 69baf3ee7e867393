"""AutoRound's export, which packs weights in the layouts of others; ``packing_format`` says in which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from invarlock.checkpoints.packing import compressed_tensors, modelopt, word_layouts
from invarlock.checkpoints.packing.packed import PackedWeight, broken
from invarlock.checkpoints.reader import Checkpoint

PRESETS = {("nv_fp", 4): "NVFP4A16", ("mx_fp", 4): "MXFP4A16", ("mx_fp", 8): "MXFP8A16"}
"""Schemes of compressed-tensors by kind of number and bits."""
OWN = "auto_round"


def packed_weights(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[PackedWeight]:
    """As ``Layout`` says.

    Its own layout of words, before it wrote those of GPTQ, stores zero points as they are, which is version 2 of GPTQ.
    """
    layout = str(settings.get("packing_format") or settings.get("backend") or OWN)
    if "awq" in layout:
        return word_layouts.awq_weights(checkpoint, settings)
    if "gptq" in layout:
        return word_layouts.gptq_weights(checkpoint, settings)
    if "fp8" in layout:
        return modelopt.packed_weights(checkpoint, settings)
    if "llm_compressor" in layout:
        return compressed_tensors.packed_weights(checkpoint, _as_compressed_tensors(checkpoint, settings))
    if layout.startswith(OWN):
        return word_layouts.gptq_weights(checkpoint, {**settings, "checkpoint_format": "gptq_v2"})
    raise broken(checkpoint, f"config.json: quantization_config.packing_format is {layout!r}, which is not known")


def _as_compressed_tensors(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme
    from torch.nn import Linear

    data_type, bits = settings.get("data_type"), settings.get("bits")
    preset = next(
        (name for (kind, size), name in PRESETS.items() if size == bits and str(data_type).startswith(kind)), None
    )
    if preset is None:
        known = f"{data_type!r} of {bits} bits, which is not known"
        raise broken(checkpoint, f"config.json: quantization_config.data_type is {known}")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    return {"config_groups": {"group_0": scheme.model_dump()}, "format": infer_module_format(Linear, scheme).value}
