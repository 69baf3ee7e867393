"""Export as compressed-tensors, ``pack-quantized``: integer codes in int32 words, with a scale a channel or group.

vLLM and transformers load it. The numbers are those of ``code * scale``, as they stand in the model, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import WeightTarget


def refusal(scheme: Scheme, targets: Sequence[WeightTarget], model: nn.Module) -> str | None:
    """Why the format cannot hold what a plan makes of these weights, or None."""
    if not scheme.symmetric:
        return "it is written for symmetric grids only (edit.plan.symmetric)"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "transformers cannot load packed weights of an encoder-decoder model"
    for target in targets:
        if type(target.module) is not nn.Linear:
            return f"it holds weights of Linear only, and {target.name} is one of {type(target.module).__name__}"
        columns = target.parameter.shape[1]
        if scheme.group_size and columns % scheme.group_size:
            return (
                f"its groups have to be whole, and edit.plan.group_size {scheme.group_size} does not divide the "
                f"{columns} inputs of {target.name}"
            )
    return None


def save(folder: Path, model: Any, scheme: Scheme, scales: Mapping[str, Tensor]) -> None:
    """Write weights and configuration to an empty folder.

    :param scales: of each quantized weight, by the name of the parameter.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        state |= pack(name, tensor, scales[name], scheme) if name in scales else {name: tensor}
    model.save_pretrained(folder, state_dict=state)
    configure(folder, model, scheme, scales)


def configure(folder: Path, model: nn.Module, scheme: Scheme, quantized: Container[str]) -> None:
    """Say in the ``config.json`` of a folder which weights are packed, and how.

    :param quantized: the names of their parameters.
    """
    from compressed_tensors.quantization import QuantizationConfig

    linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    described = QuantizationConfig(
        config_groups={"group_0": _library_scheme(scheme)},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[name for name in linear if f"{name}.weight" not in quantized],
    )
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = described.model_dump(mode="json")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def pack(name: str, weight: Tensor, scale: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """What is stored of a quantized weight, by name."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor

    scale = scale if scheme.per_channel else scale.flatten()
    # In float32: in 16 bits the quotient can be off by a code.
    wide = {"weight": weight.float(), "weight_scale": scale.float()}
    parts = PackedQuantizationCompressor.compress(wide, _library_scheme(scheme)) | {"weight_scale": scale}
    return {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}


def _library_scheme(scheme: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if scheme.group_size else "channel" if scheme.per_channel else "tensor"
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=scheme.bitwidth, type="int", symmetric=True, strategy=strategy, group_size=scheme.group_size
        ),
    )
