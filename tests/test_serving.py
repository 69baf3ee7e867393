"""Guard ``serving``: what surrounds the weights, compared by effect; harmless edits raise no finding."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import DEMO, read_report, slow
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from invarlock.adapters import HF_Causal_Adapter
from invarlock.testing import architectures
from invarlock.testing.checkpoint_edits import HARMFUL, HARMLESS, FolderEdit, changed, chatting, config, stored, tokens

FOUND = {
    "another stop token": ("rollback", "stop tokens: '<|endoftext|>' became '.'"),
    "one more stop token": ("warn", "stop tokens: '<|endoftext|>' became '<|endoftext|>', '.'"),
    "temperature": ("warn", "generation defaults: do_sample unset became True, temperature unset became 0.1"),
    "no template": ("warn", "there is no chat template any more"),
    "another role": ("warn", "chat template: a conversation is rendered as 'assistant: ' became 'model: '"),
    "a template that refuses": ("warn", "refused: TemplateError"),
    "ids rotated": ("rollback", "524 tokens have another id"),
    "a space before every text": ("warn", "is split into other tokens"),
    "no decoder": ("warn", "the same ids are decoded to other text"),
    "activation": ("rollback", "which is the activation function"),
    "epsilon": ("rollback", "which normalizes hidden states"),
    "nothing is quantized": ("warn", "declares 4 bits, and nothing is quantized"),
    "scales of the cache": ("warn", "scales of the FP8 key-value cache are missing"),
    "consolidated weights": ("warn", "2 sets of weights, model.safetensors, consolidated weights"),
}
BESIDES = {
    "a stop string": "generation defaults: stop_strings unset became",
    "another stop token of the configuration alone": "eos_token_id of the configuration adds '.', at which some servers",
    "padding that no token has": "generation_config: pad_token_id is 99999, which no token has: there are 1024",
    "always a generation prompt": "chat template: a conversation is rendered as '' became 'assistant: '",
    "a switch for thinking": "chat template: a conversation is rendered as '' became '<think></think>'",
    "two templates": "chat_template.jinja and chat_template of tokenizer_config.json differ",
    "characters composed": "is split into other tokens",
    "a special token that takes the space before it": "'a<|endoftext|>b <|endoftext|> c' is split into other tokens",
    "a shorter longest text of the tokenizer": "(model_max_length) became 32 tokens",
    "a shard beside": "2 sets of weights, model.safetensors, model-00001-of-00002.safetensors",
    "a bias that no module has": "stored without a place in the model: lm_head.bias; some loaders",
    "a layer beyond the last": " more; some loaders pass over that, others fail",
}
ALSO = {
    "a least length": "generation defaults: min_new_tokens unset became 40",
    "several answers": "num_return_sequences unset became 3",
    "a stop token that is a word": "generation_config: eos_token_id is ['x'], which no token has",
    "a norm that no module has": "stored without a place in the model: q_norm.weight; some loaders",
    "a variant beside": "2 sets of weights, model.safetensors, model.fp16.safetensors",
}
OF_LLAMAS = {
    "an honest head",
    "rope_theta as older files have it",
    "another name of the activation",
    "the size of heads spelled out",
}
OF_ANY = {"settings that change no text", "a stop token as a list", "leftovers of training", "an empty normalizer"}
"""Cases that do not depend on the architecture: one is enough."""


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two architectures that chat, one with an untied head."""
    folder = tmp_path_factory.mktemp("baselines")
    model = architectures.gpt2(vocab_size=1024, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder / "gpt2")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(folder / "gpt2")
    sources = {"llama": DEMO / "checkpoint", "gpt2": folder / "gpt2"}
    return {name: chatting(source, folder / f"{name}-chat") for name, source in sources.items()}


def judged(invarlock, baseline: Path, edit: FolderEdit, *more: str) -> tuple[int, dict[str, Any]]:
    subject = Path("subject")
    shutil.copytree(baseline, subject)
    edit(subject)
    arguments = ("--weights-only", "--strict", "--set", "guards.order=[invariants,serving]", "--out", "out", *more)
    done = invarlock("compare", "--baseline", baseline, "--subject", subject, *arguments)
    assert done.code in (0, 1), done.err
    return done.code, next(guard for guard in read_report(Path("out"))["guards"] if guard["name"] == "serving")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", FOUND)
def test_what_a_server_would_notice_is_named(invarlock, baselines, architecture, name) -> None:
    action, message = FOUND[name]
    status, serving = judged(invarlock, baselines[architecture], HARMFUL[name])
    assert (serving["action"], status) == (action, 1), serving
    assert message in serving["message"]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *zip(cycle(["llama", "gpt2"]), BESIDES),
        *slow(*product(["llama", "gpt2"], ALSO), *zip(cycle(["gpt2", "llama"]), BESIDES)),
    ],
)
def test_servers_that_read_otherwise_are_thought_of(invarlock, baselines, architecture, name) -> None:
    status, serving = judged(invarlock, baselines[architecture], HARMFUL[name])
    assert (serving["action"], status) == ("warn", 1), serving
    assert {**BESIDES, **ALSO}[name] in serving["message"]


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("llama", name) for name in HARMLESS),
        *(("gpt2", name) for name in HARMLESS if name not in OF_LLAMAS | OF_ANY),
    ],
)
def test_representation_and_bookkeeping_raise_no_finding(invarlock, baselines, architecture, name) -> None:
    status, serving = judged(invarlock, baselines[architecture], HARMLESS[name])
    assert (serving["action"], status) == ("continue", 0), serving


def test_a_flag_that_the_stored_head_contradicts_is_named(invarlock, baselines) -> None:
    """Of a baseline that has the same contradiction no finding is made: it is not the edit's doing."""
    tied = config(tie_word_embeddings=True)
    status, serving = judged(invarlock, baselines["gpt2"], tied)
    assert (serving["action"], status) == ("rollback", 1)
    assert "tie_word_embeddings is true, and lm_head.weight is stored and differs" in serving["message"]
    contradicting = Path("contradicting")
    shutil.copytree(baselines["gpt2"], contradicting)
    tied(contradicting)
    shutil.rmtree("subject")
    assert judged(invarlock, contradicting, lambda folder: None, "--force")[1]["action"] == "continue"


def test_positions_that_are_turned_otherwise_are_the_cause(invarlock, baselines) -> None:
    _, serving = judged(invarlock, baselines["llama"], HARMFUL["positions"])
    assert [cause["cause"] for cause in serving["metrics"]["causes"]] == ["rope_parameters.rope_theta"]
    assert "turns positions into angles: 10000.0 became 500000.0" in serving["message"]


def test_rules_of_a_tokenizer_class_do_not_hide_those_of_the_file(invarlock, baselines, tmp_path) -> None:
    """The class for Qwen2 normalizes and splits by rules of its own; servers without transformers read the file."""
    model = Qwen2ForCausalLM(Qwen2Config(**architectures.UNTIED | {"vocab_size": 1024}))
    model.save_pretrained(tmp_path / "qwen2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(baselines["llama"] / name, tmp_path / "qwen2")
    compose = tokens(lambda found: found.update(normalizer={"type": "NFKC"}))
    _, serving = judged(invarlock, tmp_path / "qwen2", compose)
    assert serving["message"].startswith("tokenizer.json: ") and "is split into other tokens" in serving["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapters_note_tensors_that_have_no_place(baselines, tmp_path, architecture, stream) -> None:
    folder = tmp_path / "both"
    shutil.copytree(baselines[architecture], folder)
    assert HF_Causal_Adapter().load_model(str(folder), "cpu", stream=stream).unread_tensors == ()
    for name in ("a norm that no module has", "a layer beyond the last"):
        HARMFUL[name](folder)
    unread = HF_Causal_Adapter().load_model(str(folder), "cpu", stream=stream).unread_tensors
    assert "q_norm.weight" in unread and len(unread) >= 10


def test_tensors_that_a_model_has_no_place_for_are_named(invarlock, baselines, tmp_path) -> None:
    """But not those that the baseline has, too, nor what older files store, nor scales of a cache."""
    name, scale = "model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.self_attn.k_scale"
    harmless = stored(lambda tensors: tensors.update({name: torch.ones(16), scale: torch.ones(1)}))
    _, serving = judged(invarlock, baselines["llama"], harmless)
    assert (serving["action"], serving["metrics"]["warn"]) == ("continue", []), serving
    both = tmp_path / "both"
    shutil.copytree(baselines["llama"], both)
    HARMFUL["a norm that no module has"](both)
    shutil.rmtree("subject")
    status, serving = judged(invarlock, both, HARMFUL["a bias that no module has"], "--force")
    assert status == 1
    assert serving["message"].startswith("stored without a place in the model: lm_head.bias; ")
    assert "cp " not in str(read_report(Path("out"))["what_next"])


@pytest.mark.parametrize("name", ["another stop token", "temperature", "no template", "another role", "no decoder"])
def test_files_of_the_baseline_are_offered_where_they_differ(invarlock, baselines, name) -> None:
    judged(invarlock, baselines["llama"], HARMFUL[name])
    assert "generation_config.json" in str(read_report(Path("out"))["what_next"])


def test_layers_that_attend_alike_are_no_finding(invarlock, tmp_path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**architectures.UNTIED))
    model.save_pretrained(tmp_path / "qwen2")
    _, serving = judged(invarlock, tmp_path / "qwen2", config(max_window_layers=1, head_dim=8))
    assert (serving["action"], serving["metrics"]["causes"]) == ("continue", []), serving


def test_another_first_token_of_the_decoder_is_named(invarlock, tmp_path) -> None:
    architectures.t5(eos_token_id=1, pad_token_id=0).save_pretrained(tmp_path / "t5")
    status, serving = judged(invarlock, tmp_path / "t5", config(decoder_start_token_id=9))
    assert (serving["action"], status) == ("rollback", 1)
    assert "decoder_start_token_id, which is what the decoder reads first: 0 became 9" in serving["message"]


def test_a_configuration_that_makes_the_forward_pass_fail_is_wrong_input(invarlock, tmp_path) -> None:
    model = architectures.t5(vocab_size=1024, eos_token_id=1, pad_token_id=0, relative_attention_num_buckets=32)
    for side, distance in (("baseline", 128), ("subject", 16)):
        model.config.relative_attention_max_distance = distance
        model.save_pretrained(tmp_path / side)
        AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(tmp_path / side)
    sizes = ("--set", "dataset.seq_len=64", "--set", "dataset.preview_n=2", "--set", "dataset.final_n=2")
    sides = ("--baseline", tmp_path / "baseline", "--subject", tmp_path / "subject")
    done = invarlock("compare", *sides, "--dataset", DEMO / "text.jsonl", *sizes)
    assert (done.code, "Traceback" in done.err) == (2, False), done.err
    assert "subject: T5ForConditionalGeneration fails on a window: IndexError: index out of range" in done.err


# -- declared against stored -------------------------------------------------------------------------------------------

INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
FORMATS = {"pack-quantized": INT4, "float-quantized": FLOAT8}


def packed_rows(name: str, rows: torch.Tensor, form: str) -> dict[str, torch.Tensor]:
    """The tensors of a weight in a format of compressed-tensors."""
    if form == "float-quantized":
        scale = rows.abs().amax(dim=1, keepdim=True) / 448
        return {name: (rows / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    scale = rows.abs().amax(dim=1, keepdim=True) / 7.5
    codes = (rows / scale).round().clamp(-8, 7).to(torch.int8)
    return {
        f"{name}_packed": pack_to_int32(codes, 4),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(rows.shape),
    }


def pack(folder: Path, wanted: str, left: str, form: str, ignore: tuple[str, ...] = ()) -> None:
    """Pack weights whose names match, but those left, and declare it."""
    packed: dict[str, torch.Tensor] = {}
    for name, rows in load_file(folder / "model.safetensors").items():
        taken = re.search(wanted, name) and not re.search(left, name)
        packed |= packed_rows(name, rows, form) if taken else {name: rows}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    section = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*gate$", *ignore],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": FORMATS[form]}},
    }
    config(quantization_config=section)(folder)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of two architectures whose experts are stored one by one, and of one without experts."""
    folder = tmp_path_factory.mktemp("untouched")
    sizes = {**architectures.UNTIED, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}
    models = {
        "mixtral": lambda: architectures.mixtral(num_local_experts=8),
        "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)),
        "llama": architectures.llama,
    }

    def saved(architecture: str) -> Path:
        place = folder / architecture
        if not place.exists():
            models[architecture]().save_pretrained(place)
        return place

    return saved


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_an_expert_that_is_not_quantized_is_named(invarlock, untouched, architecture, form) -> None:
    left = r"layers\.1\..*experts\.3\."
    status, serving = judged(invarlock, untouched(architecture), lambda at: pack(at, r"experts\.\d", left, form))
    assert (serving["action"], status) == ("warn", 1), serving
    assert "1 of 8 experts is not quantized: model.layers.1." in serving["message"]
    assert serving["message"].endswith(".experts.3")
    errors = {each["name"]: each["relative_error"] for each in read_report(Path("out"))["edit"]["modules"]}
    changed = {name for name, error in errors.items() if error}
    assert all("experts" in name for name in changed) and len(changed) == 4
    assert max(errors.values()) < 0.2


def test_a_weight_that_is_not_quantized_is_named(invarlock, untouched) -> None:
    _, serving = judged(
        invarlock, untouched("llama"), lambda at: pack(at, r"mlp\.", r"layers\.1\.mlp\.down", "pack-quantized")
    )
    assert serving["message"].endswith("1 of 6 weights is not quantized: model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["lm_head", "re:.*self_attn.*", "re:.*mlp.*"], "its ignore list names 6 packed weights"),
        (["lm_head"], "8 of 14 weights are not quantized: model.layers.0.self_attn.k_proj"),
    ],
)
def test_an_ignore_list_that_does_not_fit_is_named(invarlock, untouched, ignore, message) -> None:
    def misfit(at: Path) -> None:
        pack(at, r"mlp\.", r"^$", "pack-quantized")
        changed("config.json", lambda found: found["quantization_config"].update(ignore=ignore))(at)

    assert message in judged(invarlock, untouched("llama"), misfit)[1]["message"]


@pytest.mark.parametrize(("architecture", "left"), [("llama", r"1.mlp.down_proj"), ("mixtral", r"1\..*experts\.3\.")])
def test_what_is_left_out_on_purpose_is_no_finding(invarlock, untouched, architecture, left) -> None:
    wanted = r"mlp\.|experts\.\d"
    ignoring = (f"re:.*{left}.*",)
    status, serving = judged(
        invarlock, untouched(architecture), lambda at: pack(at, wanted, left, "pack-quantized", ignoring)
    )
    assert (serving["action"], status) == ("continue", 0), serving
