"""Guard ``serving``: what surrounds the weights, compared by effect; harmless edits raise no finding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.testing import architectures

CHAT = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of two architectures that chat, one with an untied head."""
    llama, gpt2 = (tmp_path_factory.mktemp(name) / "baseline" for name in ("llama", "gpt2"))
    shutil.copytree(DEMO / "checkpoint", llama)
    model = architectures.gpt2(vocab_size=1024, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0)
    model.save_pretrained(gpt2)
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(gpt2)
    for folder in (llama, gpt2):
        (folder / "chat_template.jinja").write_text(CHAT)
        for path in folder.iterdir():
            path.chmod(0o644)
    return {"llama": llama, "gpt2": gpt2}


def edited(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """Change the JSON file of a name."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def fields(**values: Any) -> Edit:
    return edited("config.json", lambda config: config.update(values))


def generation(**values: Any) -> Edit:
    return edited("generation_config.json", lambda config: config.update(values))


def rotate_ids(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    values["model"]["vocab"] = {name: place for place, name in enumerate([*names[:500], *names[501:], names[500]])}


def template(text: str | None) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "chat_template.jinja"
        path.unlink() if text is None else path.write_text(text)

    return edit


def stored(change: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def untied_flag_and_head(folder: Path) -> None:
    """A tied head stored as a copy of the embedding, the flag saying so."""
    stored(lambda tensors: tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone()))(folder)
    fields(tie_word_embeddings=False)(folder)


def shards(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")


def packed(ignored: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["re:.*no_such_layer.*"], "weights": weights}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return section | {"quantization_status": "compressed", "ignore": list(ignored)} | more


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
HARMFUL: dict[str, tuple[Edit, str, str]] = {
    "another stop token": (
        lambda folder: (
            edited("tokenizer_config.json", lambda config: config.update(eos_token="."))(folder),
            generation(eos_token_id=14)(folder),
        ),
        "rollback",
        "stop tokens: '<|endoftext|>' became '.'",
    ),
    "one more stop token": (generation(eos_token_id=[0, 14]), "warn", "stop tokens: '<|endoftext|>' became"),
    "temperature": (generation(temperature=0.1, do_sample=True), "warn", "generation defaults: do_sample"),
    "repetition penalty": (generation(repetition_penalty=1.3), "warn", "repetition_penalty unset became 1.3"),
    "no template": (template(None), "warn", "there is no chat template any more"),
    "another role": (template(CHAT.replace("'assistant: '", "'model: '")), "warn", "chat template: a conversation"),
    "a template that refuses": (template("{{ raise_exception('no') }}"), "warn", "refused: TemplateError"),
    "ids rotated": (edited("tokenizer.json", rotate_ids), "rollback", "524 tokens have another id"),
    "split otherwise": (
        edited("tokenizer.json", lambda config: config["pre_tokenizer"].update(add_prefix_space=True)),
        "warn",
        "is split into other tokens",
    ),
    "activation": (fields(hidden_act="relu", activation_function="relu"), "rollback", "is the activation function"),
    "epsilon": (fields(rms_norm_eps=1e-2, layer_norm_epsilon=1e-2), "rollback", "normalizes hidden states"),
    "nothing is quantized": (fields(quantization_config=packed()), "warn", "declares 4 bits, and nothing is quantized"),
    "cache scales": (
        fields(quantization_config=packed(config_groups={}, format="dense", kv_cache_scheme=CACHE)),
        "warn",
        "scales of the FP8 key-value cache are missing",
    ),
    "two sets": (
        lambda folder: (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes()),
        "warn",
        "2 sets of weights",
    ),
}
HARMLESS: dict[str, Edit] = {
    "nothing": lambda folder: None,
    "float32": stored(lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()})),
    "names and versions": fields(_name_or_path="elsewhere", transformers_version="4.40.0", use_cache=False),
    "training settings": fields(attention_dropout=0.3, attn_pdrop=0.3, initializer_range=0.5),
    "unknown field": fields(unsloth_version="2026.1"),
    "default sampling": generation(temperature=1.0, top_p=1.0, do_sample=False),
    "template with a comment": template("{# as before #}" + CHAT),
    "shards": shards,
}


def judged(invarlock, baseline: Path, edit: Edit, *more: str) -> tuple[int, dict[str, Any]]:
    subject = Path("subject")
    shutil.copytree(baseline, subject)
    edit(subject)
    arguments = ("--weights-only", "--strict", "--set", "guards.order=[invariants,serving]", "--out", "out", *more)
    done = invarlock("compare", "--baseline", baseline, "--subject", subject, *arguments)
    assert done.code in (0, 1), done.err
    return done.code, next(guard for guard in read_report(Path("out"))["guards"] if guard["name"] == "serving")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", HARMFUL)
def test_what_a_server_would_notice_is_named(invarlock, baselines, architecture, name) -> None:
    edit, action, message = HARMFUL[name]
    status, serving = judged(invarlock, baselines[architecture], edit)
    assert (serving["action"], status) == (action, 1), serving
    assert message in serving["message"], serving


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", HARMLESS)
def test_representation_and_bookkeeping_raise_no_finding(invarlock, baselines, architecture, name) -> None:
    status, serving = judged(invarlock, baselines[architecture], HARMLESS[name])
    assert (serving["action"], status) == ("continue", 0), serving


def test_a_head_that_is_honestly_its_own_is_no_finding(invarlock, baselines) -> None:
    status, serving = judged(invarlock, baselines["llama"], untied_flag_and_head)
    assert (serving["action"], status) == ("continue", 0), serving


def test_a_flag_that_the_stored_head_contradicts_is_named(invarlock, baselines) -> None:
    """Of a baseline that says the same no finding is made: it is not the edit's doing."""
    tied = fields(tie_word_embeddings=True)
    status, serving = judged(invarlock, baselines["gpt2"], tied)
    assert (serving["action"], status) == ("rollback", 1)
    assert "tie_word_embeddings is true, and lm_head.weight is stored and differs" in serving["message"]
    contradicting = Path("contradicting")
    shutil.copytree(baselines["gpt2"], contradicting)
    tied(contradicting)
    shutil.rmtree("subject")
    assert judged(invarlock, contradicting, lambda folder: None, "--force")[1]["action"] == "continue"


def test_positions_that_are_turned_otherwise_are_the_cause(invarlock, baselines) -> None:
    turned = edited("config.json", lambda config: config["rope_parameters"].update(rope_theta=5e5))
    _, serving = judged(invarlock, baselines["llama"], turned)
    assert [cause["cause"] for cause in serving["metrics"]["causes"]] == ["rope_parameters.rope_theta"]
    assert "turns positions into angles: 10000.0 became 500000.0" in serving["message"]
