"""Rounding of activations and of the cache that a checkpoint declares, simulated as compressed-tensors rounds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invarlock.checkpoints.packing import compressed_tensors, fine_grained, modelopt, torchao
from invarlock.checkpoints.packing.packed import broken, stems, unsound
from invarlock.checkpoints.packing.unpacked import configuration_of, layout_of, method_of, settings_of
from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.inputs import complaints_of
from invarlock.models.facts import text_config_of
from invarlock.models.simulation import ACTIVATIONS, CACHE, NONE, CacheRounding, Simulation

FP8 = {"num_bits": 8, "type": "float"}
TORCHAO: Mapping[str, Mapping[str, Any]] = {
    "QuantizeTensorToFloat8Kwargs": FP8,
    "QuantizeTensorToInt8Kwargs": {"num_bits": 8, "type": "int"},
}
"""Numbers that inputs are rounded to, by the class of torchao that describes it."""
KEYS, VALUES = (".k_scale", ".k_proj.k_scale"), (".v_scale", ".v_proj.v_scale")
"""Names of the scales of a cache, by compressed-tensors and by ModelOpt."""
SIMULATED_ATTENTION = "sdpa"
"""The implementation of transformers whose keys and values can be told apart."""


@dataclass(frozen=True)
class ActivationRounding:
    """Rounding by arguments of compressed-tensors, with scales that are stored, or found anew for each input."""

    arguments: Any
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    factor: Tensor | None = None
    """By which the scales of NVFP4 are multiplied to be E4M3."""

    def __call__(self, numbers: Tensor) -> Tensor:
        from compressed_tensors.quantization.lifecycle.forward import fake_quantize
        from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

        # A scale per token is one for each place along the first two axes.
        tokens = numbers.float().reshape(1, -1, numbers.shape[-1])
        scale, zero_point, factor = (
            None if part is None else part.to(numbers.device) for part in (self.scale, self.zero_point, self.factor)
        )
        if self.arguments.dynamic:
            scale, zero_point = compute_dynamic_scales_and_zp(tokens, self.arguments, None, global_scale=factor)
        rounded: Tensor = fake_quantize(tokens, scale, zero_point, self.arguments, global_scale=factor)
        return rounded.reshape(numbers.shape).to(numbers.dtype)

    def takes(self, layer: nn.Linear) -> bool:
        """True if its inputs are whole groups."""
        return layer.in_features % (self.arguments.group_size or 1) == 0

    def __str__(self) -> str:
        return f"{compressed_tensors.format_of(self.arguments)}, {'dynamic' if self.arguments.dynamic else 'static'}"


Inputs = Iterator[tuple[str, ActivationRounding | None]]
"""Names of modules whose inputs are rounded; None where that cannot be simulated."""


def simulation_of(model: nn.Module, folder: Path) -> Simulation:
    """The rounding that a checkpoint declares for the model in it.

    Activations are rounded in all modules for which that is declared, or in none: what is reported is one or the other.

    :raises InputError: a stored scale is zero or not finite.
    """
    config = configuration_of(folder) if folder.is_dir() else {}
    find, settings = INPUTS.get(method_of(config)), settings_of(config)
    if find is None or layout_of(folder) is None:
        return NONE
    with complaints_of(f"{folder}: its quantization_config cannot be read"):
        # As it is stored, with the scales.
        checkpoint = Checkpoint(folder)
        inputs, caches = dict(find(checkpoint, settings)), dict(_caches(checkpoint, settings))
    words, linear = {}, {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    roundings = {name: each for name, each in inputs.items() if each and name in linear and each.takes(linear[name])}
    if roundings and roundings.keys() == inputs.keys():
        kinds = " and ".join(sorted({str(rounding) for rounding in roundings.values()}))
        words[ACTIVATIONS] = f"{kinds}, of the inputs of {len(roundings)} layers"
    else:
        roundings = {}
    if caches and _caches_alike(model, len(caches)):
        words[CACHE] = f"{next(iter(caches.values())).keys}, of {len(caches)} layers"
    else:
        caches = {}
    return Simulation(roundings, caches, words)


def _caches_alike(model: nn.Module, layers: int) -> bool:
    """True if as many layers as the model has keep keys and values where the simulation finds them."""
    config = text_config_of(model)
    implementation = getattr(config, "_attn_implementation", None)
    return implementation == SIMULATED_ATTENTION and getattr(config, "num_hidden_layers", None) == layers


# -- by method ---------------------------------------------------------------------------------------------------------


def _of_compressed_tensors(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Inputs:
    for stem, scheme in compressed_tensors.schemes(checkpoint, settings):
        arguments = scheme.input_activations
        if scheme.output_activations is not None:
            yield stem, None
        elif arguments is not None:
            yield stem, _stored_or_dynamic(checkpoint, stem, arguments)


def _of_modelopt(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Inputs:
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme

    algorithm = str(settings.get("quant_algo")).upper()
    for stem in stems(checkpoint, modelopt.SCALE):
        scale = _scale(checkpoint, f"{stem}.input_scale")
        if f"{stem}{modelopt.SMOOTHING}" in checkpoint:
            # Inputs are multiplied before they are rounded, and here the factors are in the weight.
            yield stem, None
        elif scale is not None and f"{stem}{modelopt.SECOND}" in checkpoint:
            blocks = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
            yield stem, ActivationRounding(blocks, factor=1 / scale)
        elif scale is not None:
            yield stem, ActivationRounding(_per_tensor(), scale)
        elif algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            yield stem, ActivationRounding(QuantizationArgs(**FP8, strategy="token", dynamic=True))
        elif algorithm in ("FP8", "NVFP4"):
            yield stem, None


def _of_fine_grained(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Inputs:
    from compressed_tensors.quantization import QuantizationArgs

    block, scheme = settings.get("weight_block_size"), settings.get("activation_scheme")
    for stem in stems(checkpoint, fine_grained.SCALE):
        if scheme == "static":
            scale = _scale(checkpoint, f"{stem}.activation_scale")
            yield stem, None if scale is None else ActivationRounding(_per_tensor(), scale)
        elif scheme == "dynamic":
            groups = block and QuantizationArgs(**FP8, strategy="group", group_size=block[1], dynamic=True)
            yield stem, ActivationRounding(groups) if groups else None


def _of_torchao(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Inputs:
    for name, description in torchao.descriptions(checkpoint.folder).items():
        if (declared := torchao.activations_of(description)) is not None:
            yield name.rpartition(".")[0], _dynamic(declared)


def _dynamic(declared: Any) -> ActivationRounding | None:
    """Rounding that torchao declares with scales found anew for each input."""
    from compressed_tensors.quantization import QuantizationArgs

    if declared == "int8_asym_per_token":
        return ActivationRounding(QuantizationArgs(num_bits=8, strategy="token", symmetric=False, dynamic=True))
    if not isinstance(declared, Mapping) or declared["_type"] not in TORCHAO:
        return None
    strategy = {"PerRow": "token", "PerTensor": "tensor"}.get(declared["_data"]["granularity"]["_type"])
    asymmetric = declared["_data"].get("mapping_type", {}).get("_data") == "ASYMMETRIC"
    kind = {**TORCHAO[declared["_type"]], "symmetric": not asymmetric}
    return ActivationRounding(QuantizationArgs(**kind, strategy=strategy, dynamic=True)) if strategy else None


def _per_tensor() -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**FP8, strategy="tensor")


INPUTS = {
    "compressed-tensors": _of_compressed_tensors,
    "modelopt": _of_modelopt,
    "fp8": _of_fine_grained,
    "torchao": _of_torchao,
}
"""By method, as ``method_of`` has it."""


def _caches(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Iterator[tuple[str, CacheRounding]]:
    arguments = _cache_arguments(settings)
    if arguments is None or arguments.dynamic or arguments.strategy != "tensor":
        return
    for of_keys, of_values in zip(KEYS, VALUES, strict=True):
        for stem in stems(checkpoint, of_keys):
            keys, values = _scale(checkpoint, stem + of_keys), _scale(checkpoint, stem + of_values)
            if values is not None:
                yield stem, CacheRounding(ActivationRounding(arguments, keys), ActivationRounding(arguments, values))


def _cache_arguments(settings: Mapping[str, Any]) -> Any:
    """Arguments of compressed-tensors for a cache; ModelOpt has few of them, or the name of an algorithm."""
    from compressed_tensors.quantization import QuantizationArgs

    scheme = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    scheme = FP8 if scheme == "FP8" else scheme
    if not isinstance(scheme, Mapping):
        return None
    return QuantizationArgs(**{name: scheme[name] for name in QuantizationArgs.model_fields if name in scheme})


def _stored_or_dynamic(checkpoint: Checkpoint, stem: str, arguments: Any) -> ActivationRounding | None:
    """Rounding with scales as compressed-tensors stores them, or None where these are missing."""
    scale, factor = _scale(checkpoint, f"{stem}.input_scale"), _scale(checkpoint, f"{stem}.input_global_scale")
    needed = factor if arguments.strategy == "tensor_group" else scale
    if needed is None and (arguments.dynamic is not True or arguments.strategy == "tensor_group"):
        return None
    return ActivationRounding(arguments, scale, checkpoint.get(f"{stem}.input_zero_point"), factor)


def _scale(checkpoint: Checkpoint, name: str) -> Tensor | None:
    if name not in checkpoint:
        return None
    scale = checkpoint[name].float()
    if scale.numel() != 1:
        raise broken(checkpoint, f"{name} has shape {tuple(scale.shape)}, and is a scale for a whole tensor")
    if wrong := unsound(scale):
        raise broken(checkpoint, f"{name} holds scales that are {wrong}")
    return scale.reshape(1)
