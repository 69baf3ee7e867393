"""Classes that differ from their neighbours: how they take images, where their projections are, which task is theirs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from conftest import texts_of
from media import draw
from PIL import Image
from tiny_models import MODELS, SIZE, VISION

from invarlock.config.schema import DatasetConfig
from invarlock.core.errors import InputError
from invarlock.models.facts import ModelClass
from invarlock.pipeline.tasks import find_task
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.selection import find_weights
from invarlock.quantization.unrounded import warn_of_unrounded
from plugins_builtin.guards.reconstruction import ReconstructionGuard
from plugins_builtin.tasks.classification import SequenceClassification
from plugins_builtin.tasks.image_text import ImageText
from plugins_builtin.tasks.language import Causal
from plugins_builtin.tasks.vision_language import VisionLanguage

SMALL: dict[str, Any] = {"seq_len": 16, "preview_n": 1, "final_n": 2}
GENERATED = DatasetConfig(provider="generated", **SMALL)
TEXT = SIZE | {"num_hidden_layers": 1, "projection_size": 32}
TOWER = VISION | {"num_hidden_layers": 1}
PATCHES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "patch_size": 8,
}


SQUARE = {"height": 32, "width": 32}
PROCESSORS: dict[str, dict[str, Any]] = {
    "LlavaNextForConditionalGeneration": {
        "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 32}, "crop_size": SQUARE,
        "image_grid_pinpoints": [[32, 64], [64, 32]],
    },
    "Idefics3ForConditionalGeneration": {
        "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 64},
        "max_image_size": {"longest_edge": 32},
    },
    "InternVLForConditionalGeneration": {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE},
    "Mistral3ForConditionalGeneration": {
        "image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 32}, "patch_size": SQUARE,
    },
    "MllamaForConditionalGeneration": {
        "image_processor_type": "MllamaImageProcessor", "size": SQUARE, "max_image_tiles": 2,
    },
}  # fmt: skip


DBRX = {
    "vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 1, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
}  # fmt: skip
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip


def blip(kind: str) -> Any:
    return tiny_models.built(kind, text_config=TEXT | {"encoder_hidden_size": 32}, vision_config=TOWER)


def last_logits(model: Any, given: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**given | {"pixel_values": pixels}).logits[:, -1]


def test_a_model_that_hands_no_cache_over_writes_by_reading_all_again() -> None:
    model = MODELS["RecurrentGemmaForCausalLM"]()
    _, final = Causal().make_windows(model, GENERATED, None, None)
    assert final.input_ids.shape == (SMALL["final_n"], SMALL["seq_len"])


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_a_model_reads_depends_on_the_image(name: str) -> None:
    model, task = MODELS[name](), VisionLanguage()
    _, final = task.make_windows(model, GENERATED, None, None)
    assert task.towers == {"vision"}
    given = final.inputs()
    seen, other = (last_logits(model, given, sign * given["pixel_values"]) for sign in (1, -1))
    assert len(seen) == SMALL["final_n"] and not torch.allclose(seen, other, atol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_files_of_any_size_are_images_of_as_many_tokens(name: str) -> None:
    model, folder = MODELS[name](), Path(name)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    model.config._name_or_path = str(folder)
    draw(Path("images"))
    Image.open("images/0.png").resize((90, 20)).save("images/0.png")
    data, task = DatasetConfig(provider="local_images", path="images", **SMALL), VisionLanguage()
    _, final = task.make_windows(model, data, None, texts_of(data))
    assert task.towers == {"vision"} and task.made_up_media == "text that the baseline writes"
    with torch.no_grad():
        assert model(**final.inputs()).logits.shape[:2] == final.input_ids.shape


def test_images_in_rows_of_patches_have_vectors() -> None:
    model = tiny_models.built("Siglip2Model", text_config=TEXT, vision_config=PATCHES | {"num_patches": 16})
    _, final = ImageText().make_windows(model, GENERATED, None, None)
    assert ImageText().vectors(model, final.inputs())["images"].shape == (SMALL["final_n"], 32)


def test_samples_end_where_a_classifier_reads_the_label() -> None:
    model = tiny_models.built("BartForSequenceClassification", **BART)
    _, final = SequenceClassification().make_windows(model, GENERATED, None, None)
    assert SequenceClassification().vectors(model, final.inputs())["labels"].shape == (SMALL["final_n"], 3)


@pytest.mark.parametrize(
    ("task", "build"),
    [
        (VisionLanguage, lambda: blip("BlipForConditionalGeneration")),
        (ImageText, lambda: blip("BlipForImageTextRetrieval")),
    ],
)
def test_a_model_that_takes_its_inputs_otherwise_is_refused(task: Any, build: Any) -> None:
    with pytest.raises(InputError, match=r"^Blip\w+ takes its inputs otherwise than the .* invarlock_tasks$"):
        task().make_windows(build(), GENERATED, None, None)


@pytest.mark.parametrize(
    ("name", "encoder_decoder", "task"),
    [
        ("T5ForConditionalGeneration", False, "seq2seq"),
        ("VoxtralForConditionalGeneration", False, "causal"),
        ("WhisperForConditionalGeneration", True, "speech"),
        ("GitForCausalLM", False, "vision-language"),
        ("MoonshineForConditionalGeneration", True, None),
        ("Florence2ForConditionalGeneration", True, None),
        ("VisionEncoderDecoderModel", True, None),
    ],
)
def test_a_class_belongs_to_the_task_that_makes_its_inputs(name: str, encoder_decoder: bool, task: str | None) -> None:
    plugins, model_class = PluginManager.load(Selection(autoload=False)), ModelClass((name,), encoder_decoder)
    if task is not None:
        assert find_task(plugins, model_class).name == task
        return
    with pytest.raises(InputError, match=f"no task measures models of class {name}; there are causal, "):
        find_task(plugins, model_class)


ALIGN = {"width_coefficient": 0.25, "depth_coefficient": 0.1, "image_size": 32, "hidden_dim": 320}


@pytest.mark.parametrize(
    ("build", "name", "role"),
    [
        (MODELS["Lfm2ForCausalLM"], "model.layers.0.conv.in_proj", "attention"),
        (MODELS["Lfm2ForCausalLM"], "model.layers.0.conv.conv", "other"),
        (MODELS["RecurrentGemmaForCausalLM"], "model.layers.0.temporal_block.linear_out", "attention"),
        (MODELS["RecurrentGemmaForCausalLM"], "model.layers.0.mlp_block.up_proj", "ffn"),
        (lambda: tiny_models.built("FNetForMaskedLM", **SIZE), "fnet.encoder.layer.0.intermediate.dense", "ffn"),
        (
            lambda: tiny_models.built("AlignModel", text_config=TEXT, vision_config=ALIGN),
            "vision_model.encoder.blocks.0.projection.project_conv",
            "ffn",
        ),
        (MODELS["Qwen2VLForConditionalGeneration"], "model.visual.patch_embed.proj", "other"),
    ],
)
def test_projections_of_any_mixing_layer_have_roles(build: Any, name: str, role: str) -> None:
    assert {target.name: target.role for target in find_weights(build())}[name] == role


@pytest.mark.parametrize("experts", [True, False])
def test_weights_that_no_plan_rounds_are_named(experts: bool, caplog) -> None:
    model = tiny_models.built("DbrxForCausalLM", **DBRX) if experts else MODELS["RecurrentGemmaForCausalLM"]()
    warn_of_unrounded(model)
    named = r"\d\d % of the weights in blocks are rounded by no plan, as transformer\S+ of a DbrxExpertGLU"
    assert bool(re.search(named, caplog.text)) == bool(caplog.text) == experts


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("MllamaForConditionalGeneration", None),
        ("Qwen2AudioForConditionalGeneration", "model.audio_tower.layers.0.fc1"),
    ],
)
def test_weights_alone_of_a_tower_are_probed_or_warn(name: str, tower: str | None) -> None:
    model, guard = MODELS[name](), ReconstructionGuard()
    guard.prepare(model, None, None, {})
    edited = [{"name": target.name, "change": "quantized"} for target in find_weights(model)]
    result = guard.validate(model, None, {"edit": {"modules": edited}})
    assert result["action"] == ("warn" if tower else "continue")
    assert tower is None or re.search(
        r"edited weights are in blocks that no probe reaches \(as model", result["message"]
    )


def test_the_blocks_of_an_image_model_run_alone() -> None:
    prepared = ReconstructionGuard().prepare(MODELS["SwinForImageClassification"](), None, None, {})
    assert prepared["ready"] and not prepared["not_measured"]
