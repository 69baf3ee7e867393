"""Export as compressed-tensors: integer codes in int32 words, FP8, MXFP4 or NVFP4, with their scales.

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
from invarlock.quantization.floats import E4M3, FloatGrid, codes, exponents
from invarlock.quantization.rounding import RoundedWeight
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import WeightTarget

LAYOUTS = {
    "int": "pack-quantized", "fp8": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized",
}  # fmt: skip
"""The library's name for the layout of each format of a plan."""
SCALE_DTYPES = {"mxfp4": torch.uint8, "nvfp4": E4M3}
"""As the library's own presets have them."""


class CompressedTensors(Exporter):
    name = "compressed-tensors"
    stores_codes = True
    mixes = True
    # As vLLM wants it.
    shares_fused = True

    def refuse(self, plan: Scheme, targets: Sequence[WeightTarget], model: Any, tokenizer: Any) -> str | None:
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

    def store(self, name: str, weight: Tensor, plan: Scheme, parameters: RoundedWeight | None) -> dict[str, Tensor]:
        if parameters is None:
            return {name: weight}
        pack = _integers if plan.format == "int" else _fp8 if plan.format == "fp8" else _fp4
        return {f"{name}{suffix}": tensor for suffix, tensor in pack(weight, plan, parameters).items()}

    def finish(self, folder: Path, saved: SavedModel) -> None:
        """Say in ``config.json`` which weights are packed, and how: a group for each scheme."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

        linear = [name for name, module in saved.model.named_modules() if isinstance(module, nn.Linear)]
        modules = _modules_by_scheme(saved)
        layouts = [LAYOUTS[scheme.format] for scheme in modules]
        described = QuantizationConfig(
            config_groups={
                f"group_{number}": QuantizationScheme(
                    # One scheme is named by the type, as everybody does.
                    targets=names if len(modules) > 1 else ["Linear"],
                    weights=_described(scheme),
                    format=layout if len(set(layouts)) > 1 else None,
                )
                for number, ((scheme, names), layout) in enumerate(zip(modules.items(), layouts, strict=True))
            },
            format=layouts[0] if len(set(layouts)) == 1 else "mixed-precision",
            quantization_status="compressed",
            ignore=[name for name in linear if f"{name}.weight" not in saved.quantized],
        )
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["quantization_config"] = described.model_dump(mode="json")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


EXPORTER = CompressedTensors()


def _modules_by_scheme(saved: SavedModel) -> dict[Scheme, list[str]]:
    """Names of the packed modules; rules that differ in their patterns alone have one scheme."""
    grouped: dict[Scheme, list[str]] = {}
    for name, scheme in saved.schemes.items():
        grouped.setdefault(scheme.alone, []).append(name.removesuffix(".weight"))
    return grouped


def _described(plan: Scheme) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    blocks = "tensor_group" if plan.format == "nvfp4" else "group"
    scales = SCALE_DTYPES.get(plan.format)
    return QuantizationArgs(
        num_bits=plan.bitwidth,
        type="float" if plan.of_floats else "int",
        symmetric=True,
        strategy=blocks if plan.group_size else "channel" if plan.per_channel else "tensor",
        group_size=plan.group_size,
        **({"scale_dtype": scales, "zp_dtype": scales} if scales else {}),
    )


def _integers(weight: Tensor, plan: Scheme, parameters: RoundedWeight) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    return {
        "_packed": pack_to_int32(parameters.codes(weight), plan.bitwidth),
        "_scale": _scales(plan, parameters),
        "_shape": torch.tensor(weight.shape),
    }


def _fp8(weight: Tensor, plan: Scheme, parameters: RoundedWeight) -> dict[str, Tensor]:
    numbers = codes(plan.format, weight, parameters.scales)
    return {"": numbers.to(E4M3), "_scale": _scales(plan, parameters)}


def _fp4(weight: Tensor, plan: Scheme, parameters: RoundedWeight) -> dict[str, Tensor]:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    scales, grid = parameters.scales, parameters.grids[0][0][0]
    packed = {"_packed": pack_fp4_to_uint8(codes(plan.format, weight, scales).to(torch.bfloat16))}
    if isinstance(grid, FloatGrid) and grid.factor is not None:
        return {**packed, "_scale": (scales * grid.factor).to(E4M3), "_global_scale": grid.factor.view(1)}
    return {**packed, "_scale": exponents(scales)}


def _scales(plan: Scheme, parameters: RoundedWeight) -> Tensor:
    return parameters.scales if plan.per_channel else parameters.scales.flatten()
