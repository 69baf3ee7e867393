"""Checkpoints of transformers: one adapter for each kind of language model, and a generic one that answers last."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.api import (
    InputError,
    ModelAdapter,
    NotStreamedError,
    Ranks,
    UsageError,
    check_folder,
    complaints_of,
    hookimpl,
    local_rank,
    one_line,
)
from plugins_builtin.adapters.building import check_counts, check_size
from plugins_builtin.adapters.locating import architectures, folder_of, is_here, read_config

if TYPE_CHECKING:
    from invarlock.api import Checkpoint

BALANCED = "balanced"
UNPACKERS = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",)}
"""Packages that transformers needs to unpack weights of a method and does not ask for by itself."""
POOLER = "pooler."
MARGIN = 1.2
"""Ratio of free memory to weights that a device needs: activations take some, too."""


class _TransformersAdapter(ModelAdapter):
    """Loader of safetensors; a pickled checkpoint is refused."""

    architecture_suffixes: ClassVar[tuple[str, ...]]
    """Endings of the architecture names that this adapter owns under ``adapter: auto``."""
    auto_class: ClassVar[str]

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Load a checkpoint folder, or an id from a hub, in evaluation mode.

        :param device: also ``balanced``: spread over all devices of this machine.
        :param kwargs: ``dtype`` (by default the checkpoint's), ``trust_remote_code`` (off), ``revision``, ``stream`` to
            leave the weights on disk, and ``parallel`` where several processes may share the model.
        :raises UsageError: when there is no such checkpoint, or it is broken, incomplete or pickled.
        """
        options = {"trust_remote_code": False, **kwargs}
        streamed, wanted = options.pop("stream", False), options.pop("parallel", None)
        with complaints_of(f"{model_id}: cannot be loaded"):
            import transformers

            loader = getattr(transformers, self.auto_class_for(model_id, options))
            if streamed or is_here(model_id):
                # Before transformers reads what an index names, wherever it is, or builds what the configuration says.
                checkpoint = _checked(folder_of(model_id, options), loader, options)
            if streamed:
                return _streamed(checkpoint, loader, device, options)
            settings = {**_parallel(model_id, device, wanted, options), **_dequantized(model_id, options)}
            options = {"dtype": "auto", "use_safetensors": True, **options, **settings}
            return load_checkpoint(loader, model_id, device, **options)

    def auto_class_for(self, model_id: str, options: Mapping[str, Any]) -> str:
        return self.auto_class

    @hookimpl
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return self.load_model(model_id, device, **options) if self.owns(model_id, options) else None

    def owns(self, model_id: str, options: Mapping[str, Any]) -> bool:
        names = architectures(model_id, options)
        return any(name.endswith(self.architecture_suffixes) for name in names)


class HF_Causal_Adapter(_TransformersAdapter):
    """Causal language models: Llama, GPT-2, Mixtral, ..."""

    name = "hf_causal"
    architecture_suffixes = ("ForCausalLM", "LMHeadModel")
    auto_class = "AutoModelForCausalLM"


class HF_MLM_Adapter(_TransformersAdapter):
    """Masked language models: BERT, RoBERTa, ..."""

    name = "hf_mlm"
    architecture_suffixes = ("ForMaskedLM",)
    auto_class = "AutoModelForMaskedLM"


class HF_Seq2Seq_Adapter(_TransformersAdapter):
    """Encoder-decoder language models: T5, BART, ..."""

    name = "hf_seq2seq"
    architecture_suffixes = ("ForConditionalGeneration",)
    auto_class = "AutoModelForSeq2SeqLM"

    def owns(self, model_id: str, options: Mapping[str, Any]) -> bool:
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

        # Vision-language and speech models carry the same suffix, and the automatic class does not load them.
        kind = read_config(model_id, options).get("model_type")
        return super().owns(model_id, options) and kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


class HF_Auto_Adapter(_TransformersAdapter):
    """Fallback: the class of transformers that the checkpoint's ``architectures`` names; asked last."""

    name = "hf_auto"
    architecture_suffixes = ("",)

    def auto_class_for(self, model_id: str, options: Mapping[str, Any]) -> str:
        import transformers

        if is_here(model_id):
            check_folder(folder_of(model_id, options))
        names = architectures(model_id, options)
        for name in names:
            if hasattr(transformers, name):
                return name
        raise InputError(f"{model_id}: config.json names no known class of transformers (architectures: {names})")

    def owns(self, model_id: str, options: Mapping[str, Any]) -> bool:
        # Whatever is there and nobody else's, so that the reason why it cannot be loaded is found.
        there = Path(model_id).exists() and not model_id.endswith(".gguf")
        return there or super().owns(model_id, options)

    @hookimpl(trylast=True)
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return super().invarlock_load_model(model_id, device, options)


def _config_of(model_id: str, options: Mapping[str, Any]) -> Any:
    """The checkpoint's configuration as transformers has it."""
    from transformers import AutoConfig

    trust = bool(options.get("trust_remote_code"))
    return AutoConfig.from_pretrained(model_id, revision=options.get("revision"), trust_remote_code=trust)


def _checked(folder: Path, loader: Any, options: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a checkpoint, once its configuration is known to fit them."""
    # Only here: torch is slow to import.
    from invarlock.api import Checkpoint

    check_folder(folder)
    checkpoint = Checkpoint(folder)
    check_counts(read_config(str(folder), options), checkpoint)
    _check_unpackable(str(folder), options)
    config = _config_of(str(folder), options)
    check_size(config, partial(_built, loader, config, options), checkpoint)
    return checkpoint


def _built(loader: Any, config: Any, options: Mapping[str, Any], **settings: Any) -> Any:
    """A model built from a configuration, with random weights."""
    if hasattr(loader, "from_config"):
        return loader.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")), **settings)
    return loader._from_config(config, **settings)


def _check_unpackable(model_id: str, options: Mapping[str, Any]) -> str:
    """The method that packed the weights, once it is known that it can be undone; empty where they are not packed."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    packing = read_config(model_id, options).get("quantization_config")
    if packing is None:
        return ""
    method = str(packing.get("quant_method")) if isinstance(packing, dict) else str(packing)
    if not any(known.startswith(method) for known in AUTO_QUANTIZATION_CONFIG_MAPPING):
        raise InputError(f"{model_id}: config.json: quantization_config: unknown method {method!r}")
    missing = [package for package in UNPACKERS.get(method, ()) if find_spec(package) is None]
    if missing:
        raise InputError(
            f"{model_id}: its weights are packed by {method}; to unpack them: pip install {' '.join(missing)}"
        )
    return method


def _dequantized(model_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that let transformers dequantize packed weights while loading; empty for any other checkpoint."""
    if _check_unpackable(model_id, options) != "compressed-tensors":
        return {}
    config = _config_of(model_id, options)
    config.quantization_config["dequantize"] = True
    return {"config": config}


def load_checkpoint(loader: Any, model_id: str, device: str, **options: Any) -> Any:
    """Call a transformers class's ``from_pretrained``.

    :raises UsageError: when weights are missing from the checkpoint: transformers would invent them.
    """
    if device == BALANCED:
        options["device_map"] = BALANCED
    # Mismatches are among what it tells; else it prints a table.
    model, loading = loader.from_pretrained(model_id, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    shown = Path(model_id, options.get("gguf_file", ""))
    for name, stored, described in sorted(loading.get("mismatched_keys", [])):
        raise InputError(
            f"{shown}: {name} has shape {tuple(stored)}, but the configuration describes {tuple(described)}"
        )
    unloaded = sorted(loading["missing_keys"])
    if unloaded and all(name.startswith(POOLER) for name in unloaded) and _may_lack_pooler(loader, options):
        return load_checkpoint(loader, model_id, device, **options, add_pooling_layer=False)
    if unloaded:
        raise InputError(f"{shown}: {len(unloaded)} weights are missing: {', '.join(unloaded[:3])}")
    model = _unpacked(model, model_id).eval()
    if hasattr(model, "set_reshard_after_forward"):
        # By default the outermost weights stay gathered, and the model would not be what it was.
        model.set_reshard_after_forward(True)
    if "distributed_config" in options or device == BALANCED:
        return model
    try:
        return model.to(_resolve(device))
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"model.device: {device}: {str(error).splitlines()[0]}") from error


def _may_lack_pooler(loader: Any, options: Mapping[str, Any]) -> bool:
    """True for a class that can be built without the head for pairs of sentences: many embedding models have none."""
    return "add_pooling_layer" in inspect.signature(loader).parameters and "add_pooling_layer" not in options


def _parallel(model_id: str, device: str, wanted: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that let transformers spread a model over the processes; empty where each holds all of it."""
    if wanted is None:
        return {}
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if wanted == "auto":
        fits = _fits(model_id, _resolve(device), options, ranks.on_this_machine())
        # All do the same, though each sees the memory that is free on its own device.
        if all(ranks.gather(fits)):
            return {}
    refusal = _indivisible(model_id, options, ranks.size)
    if wanted == "tensor" and refusal:
        raise UsageError(f"model.parallel: tensor: {refusal}; set it to fully_sharded")
    dimension = "fsdp_size" if refusal or wanted == "fully_sharded" else "tp_size"
    return {"distributed_config": DistributedConfig(**{dimension: ranks.size})}


def _fits(model_id: str, device: str, options: Mapping[str, Any], sharing: int) -> bool:
    """True if a checkpoint fits on a device with room for activations; ``sharing`` processes share the memory."""
    import torch

    from invarlock.api import free_memory

    stored = sum(path.stat().st_size for path in Path(model_id).glob("*.safetensors"))
    if options.get("dtype") == "float32" and read_config(model_id, options).get("dtype") in ("bfloat16", "float16"):
        stored *= 2
    on_device = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_device else free_memory() // sharing
    return bool(stored * MARGIN < free)


def _indivisible(model_id: str, options: Mapping[str, Any], size: int) -> str | None:
    """Reason why tensor parallelism cannot spread a model over ``size`` processes, or None."""
    config = _config_of(model_id, options)
    if not getattr(config, "base_model_tp_plan", None):
        return f"transformers has no plan for {config.model_type} models"
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None) or size
        if count % size:
            return f"{name} is {count}, which {size} processes cannot share evenly"
    return None


def _streamed(checkpoint: Checkpoint, loader: Any, device: str, options: Mapping[str, Any]) -> Any:
    """A model whose weights stay in its safetensors files."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    from invarlock.api import attach
    from plugins_builtin.adapters.conversions import parts_of

    folder = checkpoint.folder
    if read_config(str(folder), options).get("quantization_config"):
        raise NotStreamedError(f"{folder}: cannot be streamed, its weights are packed")
    config = _config_of(str(folder), options)
    wanted = options.get("dtype", "auto")
    dtype = config.dtype or torch.float32 if wanted == "auto" else getattr(torch, wanted)
    config.dtype = dtype
    # Its buffers are real: rotary angles and masks are computed, not stored.
    with init_empty_weights(include_buffers=False):
        model = _built(loader, config, options, dtype=dtype).eval()
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    kept |= (getattr(model, "_keep_in_fp32_modules", None) or set()) if dtype == torch.float16 else set()
    if kept and dtype != torch.float32:
        raise NotStreamedError(f"{folder}: cannot be streamed as {dtype}, it keeps {min(kept)} in float32")
    model.tie_weights()
    attach(model, checkpoint, parts_of(model, checkpoint), device=_resolve(device))
    if getattr(model, "generation_config", None) and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, trust_remote_code=False)
    return model


def _unpacked(model: Any, model_id: str) -> Any:
    """The model with dequantized weights and no quantization config, so that it can be moved, edited and saved."""
    from torch import Tensor
    from torch.nn import Parameter

    if getattr(model.config, "quantization_config", None) is None:
        return model
    method = model.config.quantization_config.quant_method
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        try:
            model = model.dequantize()
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            raise InputError(f"{model_id}: weights packed by {method} cannot be unpacked: {one_line(error)}") from error
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Torchao's codes call themselves floating-point weights.
            if hasattr(type(parameter.data), "dequantize") and type(parameter.data) not in (Tensor, Parameter):
                setattr(module, name, Parameter(parameter.data.dequantize(), requires_grad=False))
    for name, module in list(model.named_modules()):
        if hasattr(module, "qweight"):
            model.set_submodule(name, _dense(module))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model


def _dense(packed: Any) -> Any:
    """Linear layer that computes what a packed layer of gptqmodel computes."""
    import torch

    bias, packed.bias = packed.bias, None
    dense = torch.nn.Linear(packed.in_features, packed.out_features, bias=bias is not None, device="meta")
    with torch.no_grad():
        # One product per number: no sum that could be rounded.
        rows = packed(torch.eye(packed.in_features, dtype=packed.scales.dtype, device=packed.scales.device))
    dense.weight = torch.nn.Parameter(rows.T.contiguous(), requires_grad=False)
    if bias is not None:
        dense.bias = torch.nn.Parameter(bias, requires_grad=False)
    return dense


def _resolve(device: str) -> str:
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        # Each process of a run has a device of its own.
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
