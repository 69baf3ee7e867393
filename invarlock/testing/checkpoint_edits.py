"""Named edits of a checkpoint folder around its weights: what a server would notice, and what it would not.

For folders of transformers with ``tokenizer.json``, ``generation_config.json`` and a chat template, as
:func:`chatting` makes of any. ``benchmarks/judgement/around.py`` measures the verdict with them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WEIGHTS = "model.safetensors"
Values = dict[str, Any]
FolderEdit = Callable[[Path], object]


@dataclass(frozen=True)
class CheckpointEdit:
    """One edit, called with a folder that it changes in place."""

    name: str
    apply: FolderEdit
    harmful: bool
    """True if whoever serves the checkpoint gets something else; a warning is then wanted, or a rejection."""


def chatting(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, and give the copy a chat template."""
    shutil.copytree(checkpoint, folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def changed(name: str, change: Callable[[Values], object]) -> FolderEdit:
    """Change the object in a JSON file."""

    def edit(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


def config(**values: Any) -> FolderEdit:
    return changed("config.json", lambda found: found.update(values))


def generation(**values: Any) -> FolderEdit:
    return changed("generation_config.json", lambda found: found.update(values))


def tokenizer(**values: Any) -> FolderEdit:
    return changed("tokenizer_config.json", lambda found: found.update(values))


def tokens(change: Callable[[Values], object]) -> FolderEdit:
    return changed("tokenizer.json", change)


def template(text: str) -> FolderEdit:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def without(name: str) -> FolderEdit:
    return lambda folder: (folder / name).unlink()


def together(*edits: FolderEdit) -> FolderEdit:
    return lambda folder: [edit(folder) for edit in edits]


def stored(change: Callable[[dict[str, Tensor]], object]) -> FolderEdit:
    """Change the tensors of a checkpoint in one file."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return edit


def _add_a_layer(tensors: dict[str, Tensor]) -> None:
    """The last layer once more, as where a configuration tells fewer layers than are stored."""
    numbered = [(name, match) for name in tensors if (match := re.search(r"\.(\d+)\.", name))]
    last = max(int(match[1]) for _, match in numbered)
    for name, match in numbered:
        if int(match[1]) == last:
            tensors[f"{name[: match.start()]}.{last + 1}.{name[match.end() :]}"] = tensors[name].clone()


def _rotate_ids(values: Values) -> None:
    vocabulary = values["model"]["vocab"]
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    values["model"]["vocab"] = {name: place for place, name in enumerate([*names[:500], *names[501:], names[500]])}


def _swap_two_ids(values: Values) -> None:
    words = values["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]


def _begin_with(values: Values, token: str = "<|endoftext|>") -> None:
    """Let every text begin with a token, by the post-processor."""
    number = next(each["id"] for each in values["added_tokens"] if each["content"] == token)
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _float32(tensors: dict[str, Tensor]) -> None:
    tensors.update({name: tensor.float() for name, tensor in tensors.items()})


def _untied_copy(tensors: dict[str, Tensor]) -> None:
    tensors.setdefault("lm_head.weight", next(rows for name, rows in tensors.items() if "embed" in name).clone())


def _shards(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="200KB")


def _padded(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    model.resize_token_embeddings(pad_to_multiple_of=96, mean_resizing=False)
    model.save_pretrained(folder)


def _saved_again(folder: Path) -> None:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(folder)


def _template_elsewhere(folder: Path) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": text}, {"name": "tool_use", "template": text}]
    tokenizer(chat_template=named)(folder)


def _cut_and_filled(values: Values) -> None:
    """As a tokenizer is saved after it has made batches; whoever encodes sets both anew."""
    values["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    filling = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    values["padding"] = filling | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}


def _training_leftovers(folder: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(b"none")
    (folder / "trainer_state.json").write_text("{}")


def _second_set(name: str) -> FolderEdit:
    return lambda folder: shutil.copyfile(folder / WEIGHTS, folder / name)


def packed(**more: Any) -> FolderEdit:
    """Declare 4 bits of nothing; ``more`` goes into ``quantization_config``."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["re:.*no_such_layer.*"], "weights": weights}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return config(quantization_config=section | {"quantization_status": "compressed", "ignore": []} | more)


CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
NOTHING_PACKED = {"config_groups": {}, "format": "dense"}
HARMFUL: dict[str, FolderEdit] = {
    "another stop token": together(tokenizer(eos_token="."), generation(eos_token_id=14)),
    "one more stop token": generation(eos_token_id=[0, 14]),
    "another stop token of the tokenizer": tokenizer(eos_token="."),
    "temperature": generation(temperature=0.1, do_sample=True),
    "top_k of 1": generation(top_k=1, do_sample=True),
    "repetition penalty": generation(repetition_penalty=1.3),
    "suppressed tokens": generation(suppress_tokens=[5, 6]),
    "beams": generation(num_beams=4),
    "no template": without("chat_template.jinja"),
    "another role": template(TEMPLATE.replace("'assistant: '", "'model: '")),
    "no generation prompt": template(TEMPLATE.partition("{% if")[0]),
    "another end of turn": template(TEMPLATE.replace("<|endoftext|>", "\\n")),
    "a template that refuses": template("{{ raise_exception('no') }}"),
    "no system prompt": template(TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")),
    "ids rotated": tokens(_rotate_ids),
    "two ids swapped": tokens(_swap_two_ids),
    "a space before every text": tokens(lambda found: found["pre_tokenizer"].update(add_prefix_space=True)),
    "lower case": tokens(lambda found: found.update(normalizer={"type": "Lowercase"})),
    "half of the merges": tokens(lambda found: found["model"]["merges"].__delitem__(slice(300, None))),
    "no merges": tokens(lambda found: found["model"]["merges"].clear()),
    "a token before every text": tokens(_begin_with),
    "no decoder": tokens(lambda found: found.update(decoder=None)),
    "another unknown token": tokenizer(unk_token="."),
    "a stop string": generation(stop_strings=["\n"]),
    "a least length": generation(min_new_tokens=40),
    "several answers": generation(num_return_sequences=3, do_sample=True),
    "another stop token of the configuration alone": config(eos_token_id=14),
    "padding that no token has": generation(pad_token_id=99999),
    "a stop token that is a word": generation(eos_token_id=["x"]),
    "always a generation prompt": template(TEMPLATE.replace("if add_generation_prompt", "if true")),
    "a switch for thinking": template(TEMPLATE + "{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}"),
    "two templates": tokenizer(chat_template=TEMPLATE.replace("<|endoftext|>", "\\n")),
    "characters composed": tokens(lambda found: found.update(normalizer={"type": "NFC"})),
    "a special token that takes the space before it": tokens(
        lambda found: found["added_tokens"][0].update(lstrip=True)
    ),
    "a shorter longest text of the tokenizer": tokenizer(model_max_length=32),
    "a shard beside": _second_set("model-00001-of-00002.safetensors"),
    "a variant beside": _second_set("model.fp16.safetensors"),
    "a bias that no module has": stored(lambda tensors: tensors.update({"lm_head.bias": torch.ones(1024)})),
    "a layer beyond the last": stored(_add_a_layer),
    "a norm that no module has": stored(lambda tensors: tensors.update({"q_norm.weight": torch.ones(8)})),
    "positions": config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "longer positions": config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "activation": config(hidden_act="relu", activation_function="relu"),
    "epsilon": config(rms_norm_eps=1e-2, layer_norm_epsilon=1e-2),
    "half of the context": config(max_position_embeddings=128),
    "nothing is quantized": packed(),
    "nothing is quantized, by another method": config(
        quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32}
    ),
    "scales of the cache": packed(**NOTHING_PACKED, kv_cache_scheme=CACHE),
    "consolidated weights": _second_set("consolidated.safetensors"),
    "weights in a pickle, too": _second_set("pytorch_model.bin"),
    "a class without a head": config(architectures=["LlamaModel"]),
    "no such class": config(architectures=["LlamaForNothing"]),
}
HARMLESS: dict[str, FolderEdit] = {
    "nothing": lambda folder: None,
    "float32": together(stored(_float32), config(dtype="float32")),
    "shards": _shards,
    "a padded vocabulary": _padded,
    "an honest head": together(stored(_untied_copy), config(tie_word_embeddings=False)),
    "names and versions": config(_name_or_path="elsewhere", transformers_version="4.40.0", use_cache=False),
    "training settings": config(attention_dropout=0.3, attn_pdrop=0.3, initializer_range=0.5),
    "a field that nothing reads": config(made_with="another tool"),
    "rope_theta as older files have it": changed(
        "config.json", lambda found: found.update(rope_theta=found.pop("rope_parameters", {}).get("rope_theta"))
    ),
    "another name of the activation": changed(
        "config.json", lambda found: found.update({key: "swish" for key in found if found[key] == "silu"})
    ),
    "defaults that are spelled out": generation(temperature=1.0, top_p=1.0, do_sample=False),
    "no generation configuration": without("generation_config.json"),
    "a template with a comment": template("{# as before #}" + TEMPLATE),
    "a tokenizer that was saved again": _saved_again,
    "padding on the left": tokenizer(padding_side="left"),
    "another longest text of the tokenizer": tokenizer(model_max_length=4096),
    "a stop token as a list": generation(eos_token_id=[0]),
    "settings that change no text": generation(cache_implementation="static", output_scores=True, length_penalty=0.5),
    "the template in another file, by names": _template_elsewhere,
    "an empty normalizer": tokens(lambda found: found.update(normalizer={"type": "Sequence", "normalizers": []})),
    "truncation and padding left in the tokenizer": tokens(_cut_and_filled),
    "a padding token": together(
        config(pad_token_id=0), generation(pad_token_id=0), tokenizer(pad_token="<|endoftext|>")
    ),
    "the size of heads spelled out": changed(
        "config.json", lambda found: found.update(head_dim=found["hidden_size"] // found["num_attention_heads"])
    ),
    "leftovers of training": _training_leftovers,
    "a README": lambda folder: (folder / "README.md").write_text("# A model\n"),
}


def checkpoint_edits() -> list[CheckpointEdit]:
    """All of them, the harmless ones first."""
    return [
        *(CheckpointEdit(name, apply, harmful=False) for name, apply in HARMLESS.items()),
        *(CheckpointEdit(name, apply, harmful=True) for name, apply in HARMFUL.items()),
    ]
