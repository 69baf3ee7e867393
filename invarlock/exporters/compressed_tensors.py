"""Export as compressed-tensors, ``pack-quantized``: integer codes in int32 words, with a scale a channel or group.

vLLM and transformers load it. The numbers are those of ``code * scale``, as they stand in the model, exactly.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.exporters.exporter import Exporter, SavedModel
from invarlock.quantization.rounding import RoundedWeight
from invarlock.quantization.scheme import Plan
from invarlock.quantization.selection import WeightTarget


class CompressedTensors(Exporter):
    name = "compressed-tensors"
    stores_codes = True

    def refuse(self, plan: Plan, targets: Sequence[WeightTarget], model: Any, tokenizer: Any) -> str | None:
        if not plan.symmetric:
            return "it is written for symmetric grids only (`symmetric`)"
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return "transformers cannot load packed weights of an encoder-decoder model"
        for target in targets:
            if type(target.module) is not nn.Linear:
                return f"it holds weights of Linear only, and {target.name} is one of {type(target.module).__name__}"
            columns = target.parameter.shape[1]
            if plan.group_size and columns % plan.group_size:
                return (
                    f"its groups have to be whole, and `group_size` {plan.group_size} does not divide the "
                    f"{columns} inputs of {target.name}"
                )
        return None

    def store(self, name: str, weight: Tensor, plan: Plan, parameters: RoundedWeight | None) -> dict[str, Tensor]:
        if parameters is None:
            return {name: weight}
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        scales = parameters.scales
        return {
            f"{name}_packed": pack_to_int32(parameters.codes(weight), plan.bitwidth),
            f"{name}_scale": scales if plan.per_channel else scales.flatten(),
            f"{name}_shape": torch.tensor(weight.shape),
        }

    def finish(self, folder: Path, saved: SavedModel) -> None:
        """Say in ``config.json`` which weights are packed, and how."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        plan = saved.plan
        strategy = "group" if plan.group_size else "channel" if plan.per_channel else "tensor"
        weights = QuantizationArgs(
            num_bits=plan.bitwidth, type="int", symmetric=True, strategy=strategy, group_size=plan.group_size
        )
        linear = (name for name, module in saved.model.named_modules() if isinstance(module, nn.Linear))
        described = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            format="pack-quantized",
            quantization_status="compressed",
            ignore=[name for name in linear if f"{name}.weight" not in saved.quantized],
        )
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] = described.model_dump(mode="json")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


EXPORTER = CompressedTensors()
