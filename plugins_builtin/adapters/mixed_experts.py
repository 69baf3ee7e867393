"""Layers in which some experts are packed and others are not: transformers stacks only those that are stored alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from invarlock.api import Checkpoint
from plugins_builtin.packing import experts_among, left_out, plain_modules


def has_mixed_experts(checkpoint: Checkpoint) -> bool:
    return bool(experts_among(left_out(list(checkpoint))))


@dataclass(frozen=True)
class Unpacking:
    """A class of transformers that is given all weights of a checkpoint of compressed-tensors unpacked."""

    model_class: Any
    checkpoint: Checkpoint

    def from_pretrained(self, model_id: str, *, config: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
        import torch
        from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
        from transformers import GenerationConfig

        dequantizer = CompressedTensorsDequantizer(
            self.checkpoint.folder, ignore=plain_modules(list(self.checkpoint)), dtype=config.dtype or torch.float32
        )
        weights = dequantizer.process(dict(self.checkpoint))
        del config.quantization_config
        model, loading = self.model_class.from_pretrained(None, config=config, state_dict=weights, **options)
        # Without a folder it is told neither of these.
        model.name_or_path = model_id
        if (self.checkpoint.folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)
        return model, loading
