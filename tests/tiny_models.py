"""Tiny models of real classes, one for each task, with random but seeded weights and the demo model's tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import DEMO

VOCABULARY = 1024
"""Of the demo model's tokenizer."""
SIZE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = SIZE | {"num_key_value_heads": 2}
MAMBA = SIZE | {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4, "use_mambapy": False}
JAMBA = GROUPED | {
    "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2, "expert_layer_period": 2,
    "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 32, "num_mel_bins": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_source_positions": 50, "max_target_positions": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip
PATCHES = {
    "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0, "scale_decoder_outputs": False,
}  # fmt: skip
LLAMA, CLIP_TOWER = GROUPED | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}
MLLAMA = {
    "text_config": GROUPED | {"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "vision_config": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attention_heads": 4, "image_size": 32,
        "patch_size": 8, "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 64,
        "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2]],
    },
}  # fmt: skip
SOUND = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32,
    "max_source_positions": 50,
}  # fmt: skip
LFM2 = GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
GRIFFIN = GROUPED | {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64}
LABELS = {"num_labels": 3}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}}


def built(name: str, **settings: Any) -> Any:
    """A model of a class of transformers."""
    model_class = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).eval()
        for path, parameter in model.named_parameters():
            if path.endswith("_gate"):
                # Llama 3.2 starts without its images.
                torch.nn.init.ones_(parameter)
            if parameter.ndim > 1 and not re.search("conv1d|convolution", path) and not path.endswith("A_log"):
                torch.nn.init.normal_(parameter, std=0.4)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: built("LlamaForCausalLM", **GROUPED),
    "BertForMaskedLM": lambda: built("BertForMaskedLM", **SIZE),
    "T5ForConditionalGeneration": lambda: built("T5ForConditionalGeneration", **T5),
    "BertModel": lambda: built("BertModel", **SIZE),
    "BertForSequenceClassification": lambda: built("BertForSequenceClassification", **SIZE, **LABELS),
    "BertForTokenClassification": lambda: built("BertForTokenClassification", **SIZE, **LABELS),
    "LlamaForSequenceClassification": lambda: built("LlamaForSequenceClassification", **GROUPED, num_labels=1),
    "ViTForImageClassification": lambda: built("ViTForImageClassification", **VISION, **LABELS),
    "SwinForImageClassification": lambda: built("SwinForImageClassification", **SWIN, **LABELS),
    "ResNetForImageClassification": lambda: built("ResNetForImageClassification", **RESNET, **LABELS),
    "CLIPModel": lambda: built("CLIPModel", text_config=SIZE, vision_config=VISION, projection_dim=16),
    "WhisperForConditionalGeneration": lambda: built("WhisperForConditionalGeneration", **WHISPER),
    "LlavaForConditionalGeneration": lambda: built(
        "LlavaForConditionalGeneration",
        text_config=LLAMA,
        vision_config=CLIP_TOWER,
        image_token_index=5,
    ),
    "LlavaNextForConditionalGeneration": lambda: built(
        "LlavaNextForConditionalGeneration",
        text_config=LLAMA,
        vision_config=CLIP_TOWER,
        image_token_index=5,
        image_grid_pinpoints=[[32, 64], [64, 32]],
    ),
    "Idefics3ForConditionalGeneration": lambda: built(
        "Idefics3ForConditionalGeneration", text_config=LLAMA, vision_config=VISION, scale_factor=2, image_token_id=5
    ),
    "InternVLForConditionalGeneration": lambda: built(
        "InternVLForConditionalGeneration",
        text_config=LLAMA,
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=5,
    ),
    "Mistral3ForConditionalGeneration": lambda: built(
        "Mistral3ForConditionalGeneration",
        text_config=LLAMA,
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
        image_token_index=5,
    ),
    "MllamaForConditionalGeneration": lambda: built("MllamaForConditionalGeneration", **MLLAMA, image_token_index=5),
    "Qwen2VLForConditionalGeneration": lambda: built(
        "Qwen2VLForConditionalGeneration",
        text_config=GROUPED | {"rope_parameters": ROPE},
        vision_config=PATCHES,
        image_token_id=5,
        vision_start_token_id=6,
        vision_end_token_id=7,
        video_token_id=8,
    ),
    "Qwen2AudioForConditionalGeneration": lambda: built(
        "Qwen2AudioForConditionalGeneration", text_config=LLAMA, audio_config=SOUND, audio_token_index=5
    ),
    "BloomForCausalLM": lambda: built("BloomForCausalLM", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "Lfm2ForCausalLM": lambda: built("Lfm2ForCausalLM", **LFM2),
    "RecurrentGemmaForCausalLM": lambda: built("RecurrentGemmaForCausalLM", **GRIFFIN),
    "MambaForCausalLM": lambda: built("MambaForCausalLM", **MAMBA),
    "JambaForCausalLM": lambda: built("JambaForCausalLM", **JAMBA),
}
"""By class."""


def save(model: Any, folder: Path) -> Path:
    """A checkpoint with the demo model's tokenizer, which here has a mask token."""
    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for file in (DEMO / "checkpoint").glob("tokenizer*.json"):
        shutil.copyfile(file, folder / file.name)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": "<|endoftext|>"}))
    return folder
