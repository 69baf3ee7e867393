"""Checkpoints of transformers: one adapter for each kind of language model, and a generic one that answers last."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
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
)
from plugins_builtin.adapters.building import check_counts, check_size
from plugins_builtin.adapters.locating import architectures, folder_of, is_here, read_config
from plugins_builtin.adapters.unpacking import (
    UnpackingLoader,
    add_generation_config,
    check_unpackable,
    packing_left_out,
    unpacked,
)

if TYPE_CHECKING:
    from invarlock.api import Checkpoint, UnpackedCheckpoint

BALANCED = "balanced"
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

            from invarlock.api import LAYOUTS, UnpackedCheckpoint

            loader = getattr(transformers, self.auto_class_for(model_id, options))
            checkpoint = None
            if streamed or is_here(model_id) or check_unpackable(model_id, options) in LAYOUTS:
                # Before transformers reads what an index names, wherever it is, or builds what the configuration says.
                checkpoint = _checked(folder_of(model_id, options), loader, options)
            if streamed and checkpoint is not None:
                return _streamed(checkpoint, loader, device, options)
            options |= _parallel(loader, model_id, device, wanted, options)
            if isinstance(checkpoint, UnpackedCheckpoint):
                loader = _unpacking(loader, checkpoint, options)
            options = {"dtype": "auto", "use_safetensors": True, **options}
            return load_checkpoint(loader, model_id, device, **options)

    def auto_class_for(self, model_id: str, options: Mapping[str, Any]) -> str:
        mapped = _own_classes(model_id, options)
        return mapped[0] if mapped and self.auto_class not in mapped else self.auto_class

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
    keeps_class = True

    def auto_class_for(self, model_id: str, options: Mapping[str, Any]) -> str:
        import transformers

        if is_here(model_id):
            check_folder(folder_of(model_id, options))
        if mapped := _own_classes(model_id, options):
            return mapped[0]
        names = architectures(model_id, options)
        for name in names:
            if hasattr(transformers, name):
                return name
        todo = ""
        if read_config(model_id, options).get("auto_map"):
            todo = "; it may need code beside the weights: set model.trust_remote_code: true if you trust that code"
        raise InputError(f"{model_id}: config.json names no known class of transformers (architectures: {names}){todo}")

    def owns(self, model_id: str, options: Mapping[str, Any]) -> bool:
        # Whatever is there and nobody else's, so that the reason why it cannot be loaded is found.
        there = Path(model_id).exists() and not model_id.endswith(".gguf")
        return there or super().owns(model_id, options)

    @hookimpl(trylast=True)
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return super().invarlock_load_model(model_id, device, options)


def _own_classes(model_id: str, options: Mapping[str, Any]) -> list[str]:
    """Auto classes that load code beside the weights, if that is trusted: those with a head first."""
    mapped = read_config(model_id, options).get("auto_map") if options.get("trust_remote_code") else None
    names = [name for name in mapped if name.startswith("AutoModel")] if isinstance(mapped, dict) else []
    return sorted(names, key=lambda name: not name.startswith("AutoModelFor"))


def _config_of(model_id: str, options: Mapping[str, Any]) -> Any:
    """The checkpoint's configuration as transformers has it."""
    from transformers import AutoConfig

    trust = bool(options.get("trust_remote_code"))
    return AutoConfig.from_pretrained(model_id, revision=options.get("revision"), trust_remote_code=trust)


def _checked(folder: Path, loader: Any, options: Mapping[str, Any]) -> Checkpoint:
    """The tensors of a checkpoint, once its configuration is known to fit them."""
    # Only here: torch is slow to import.
    from invarlock.api import UnpackedCheckpoint, open_checkpoint

    check_folder(folder)
    check_unpackable(str(folder), options)
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, UnpackedCheckpoint):
        checkpoint.check_scales()
    check_counts(read_config(str(folder), options), checkpoint)
    config = _config_of(str(folder), options)
    check_size(config, partial(_built, loader, config, options), checkpoint)
    return checkpoint


def _built(loader: Any, config: Any, options: Mapping[str, Any], **settings: Any) -> Any:
    """A model built from a configuration, with random weights."""
    if hasattr(loader, "from_config"):
        return loader.from_config(config, trust_remote_code=bool(options.get("trust_remote_code")), **settings)
    return loader._from_config(config, **settings)


def _unpacking(loader: Any, checkpoint: UnpackedCheckpoint, options: Mapping[str, Any]) -> UnpackingLoader:
    config = packing_left_out(_config_of(str(checkpoint.folder), options))
    return UnpackingLoader(partial(_built, loader, config, options), config, checkpoint)


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
    model = unpacked(model, model_id).eval()
    model.unread_tensors = tuple(sorted(loading["unexpected_keys"]))
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


def _parallel(
    loader: Any, model_id: str, device: str, wanted: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Options that let transformers spread a model over the processes; empty where each holds all of it."""
    if wanted is None:
        return {}
    import torch.distributed as dist
    from transformers.distributed import DistributedConfig

    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    if wanted == "auto":
        fits = _fits(loader, model_id, _resolve(device), options, ranks.on_this_machine())
        # All do the same, though each sees the memory that is free on its own device.
        if all(ranks.gather(fits)):
            return {}
    refusal = _indivisible(model_id, options, ranks.size)
    if wanted == "tensor" and refusal:
        raise UsageError(f"model.parallel: tensor: {refusal}; set it to fully_sharded")
    dimension = "fsdp_size" if refusal or wanted == "fully_sharded" else "tp_size"
    return {"distributed_config": DistributedConfig(**{dimension: ranks.size})}


def _fits(loader: Any, model_id: str, device: str, options: Mapping[str, Any], sharing: int) -> bool:
    """True if a model fits on a device with room for activations; ``sharing`` processes share the memory."""
    import torch

    from invarlock.api import free_memory

    config = packing_left_out(_config_of(model_id, options))
    with torch.device("meta"):
        # Of codes it is their weights that will be in memory.
        model = _built(loader, config, options, dtype=_dtype_of(config, options))
    needed = sum(parameter.nbytes for parameter in model.parameters())
    on_device = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_device else free_memory() // sharing
    return bool(needed * MARGIN < free)


def _dtype_of(config: Any, options: Mapping[str, Any]) -> Any:
    """The dtype that a checkpoint is loaded in."""
    import torch

    wanted = options.get("dtype", "auto")
    return config.dtype or torch.float32 if wanted == "auto" else getattr(torch, wanted)


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
    from accelerate import init_empty_weights

    from invarlock.api import UnpackedCheckpoint, attach
    from plugins_builtin.adapters.conversions import left_over, parts_of

    folder = checkpoint.folder
    method = check_unpackable(str(folder), options)
    if method and not isinstance(checkpoint, UnpackedCheckpoint):
        raise NotStreamedError(f"{folder}: cannot be streamed, its weights are packed by {method}")
    if isinstance(checkpoint, UnpackedCheckpoint):
        checkpoint.device = torch.device(_resolve(device))
    config = packing_left_out(_config_of(str(folder), options))
    config.dtype = dtype = _dtype_of(config, options)
    # Its buffers are real: rotary angles and masks are computed, not stored.
    with init_empty_weights(include_buffers=False):
        model = _built(loader, config, options, dtype=dtype).eval()
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or set()
    kept |= (getattr(model, "_keep_in_fp32_modules", None) or set()) if dtype == torch.float16 else set()
    if kept and dtype != torch.float32:
        raise NotStreamedError(f"{folder}: cannot be streamed as {dtype}, it keeps {min(kept)} in float32")
    model.tie_weights()
    parts = parts_of(model, checkpoint)
    attach(model, checkpoint, parts, device=_resolve(device))
    model.unread_tensors = left_over(model, checkpoint, parts)
    add_generation_config(model, folder)
    return model


def _resolve(device: str) -> str:
    import torch

    if device != "auto":
        return device
    if torch.cuda.is_available():
        # Each process of a run has a device of its own.
        return f"cuda:{local_rank() % torch.cuda.device_count()}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
