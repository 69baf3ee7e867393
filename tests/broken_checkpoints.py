"""Ways in which a checkpoint arrives broken, by name: each a function of its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 123456789\n".format("0" * 64)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def of_tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def of_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def piped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def looped(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def truncated(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


DEEP = "[" * 100_000 + "]" * 100_000

BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no task": (of_config(architectures=["LlamaForQuestionAnswering"]), "no task measures models of class LlamaFor"),
    "architectures a number": (of_config(architectures=5), "architectures: expected a list of names"),
    "architectures numbers": (of_config(architectures=[5]), "architectures: expected a list of names"),
    "architectures unknown": (of_config(architectures=["NoSuchModel"]), "no known class of transformers"),
    "architectures empty": (of_config(architectures=[]), "no known class of transformers"),
    "model type unknown": (of_config(model_type="nothing_known"), "nothing_known"),
    "model type a list": (of_config(model_type=[1]), "cannot be loaded"),
    "a million layers": (of_config(num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "2^31 layers": (of_config(num_hidden_layers=2**31), "num_hidden_layers is 2147483648"),
    "2^31 labels": (of_config(num_labels=2**31), "num_labels is"),
    "no layers": (of_config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "negative layers": (of_config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "layers a text": (of_config(num_hidden_layers="four"), "num_hidden_layers"),
    "giant hidden size": (of_config(hidden_size=2**20, num_attention_heads=2**8), "config.json does not fit the weights"),
    "giant vocabulary": (of_config(vocab_size=2**40), "config.json does not fit the weights"),
    "hidden size 0": (of_config(hidden_size=0), "model.id"),
    "vocabulary 0": (of_config(vocab_size=0), "model.id"),
    "no heads": (of_config(num_attention_heads=0), "model.id"),
    "other hidden size": (of_config(hidden_size=96, head_dim=24), "model.id"),
    "unknown activation": (of_config(hidden_act="no_such"), "no_such"),
    "dtype unknown": (of_config(dtype="float99"), "float99"),
    "dtype a number": (of_config(dtype=7), "cannot be loaded"),
    "quantization a text": (of_config(quantization_config="int4"), "quantization_config"),
    "quantization unknown": (of_config(quantization_config={"quant_method": "no_such"}), "no_such"),
    "config a list": (written("config.json", "[]"), "is not a JSON object"),
    "config cut": (written("config.json", '{"model_type": "ll'), "not valid JSON"),
    "config deep": (written("config.json", DEEP), "not valid JSON"),
    "config within deep": (written("config.json", '{"a": ' + DEEP + "}"), "not valid JSON"),
    "config empty": (written("config.json", ""), "not valid JSON"),
    "config NUL": (written("config.json", "\0" * 10), "not valid JSON"),
    "config a pointer": (written("config.json", POINTER), "is a git-lfs pointer, not the file itself; run git lfs pull"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "weights a pointer": (written(WEIGHTS, POINTER), "is a git-lfs pointer, not the file itself; run git lfs pull"),
    "weights a pickle": (pickled, "a pickle, pytorch_model.bin"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "weights cut": (truncated, "model.safetensors"),
    "weights empty": (written(WEIGHTS, ""), "model.safetensors"),
    "weights no header": (written(WEIGHTS, "x" * 100), "model.safetensors"),
    "weights in a loop": (looped, "Too many levels of symbolic links"),
    "weights a pipe": (piped(WEIGHTS), "is a named pipe"),
    "config a pipe": (piped("config.json"), "is a named pipe"),
    "tokenizer a pipe": (piped("tokenizer.json"), "is a named pipe"),
    "a tensor missing": (of_weights(lambda state: state.pop("model.layers.0.mlp.up_proj.weight")), "up_proj.weight"),
    "a tensor renamed": (
        of_weights(lambda state: state.update(other=state.pop("model.layers.0.mlp.up_proj.weight"))), "up_proj.weight"
    ),
    "a tensor of another shape": (
        of_weights(lambda state: state.update({"model.norm.weight": torch.ones(7)})), "model.norm.weight"
    ),
    "a folder of peft": (
        lambda folder: written("adapter_config.json", '{"base_model_name_or_path": "org/base"}')(folder),
        "an adapter for org/base; merge it",
    ),
    "tokenizer cut": (written("tokenizer.json", '{"version": "1.0"'), "tokenizer"),
    "tokenizer a list": (written("tokenizer.json", "[]"), "tokenizer"),
    "tokenizer deep": (written("tokenizer.json", DEEP), "tokenizer"),
    "tokenizer a pointer": (written("tokenizer.json", POINTER), "a git-lfs pointer"),
    "tokenizer of no model": (of_tokenizer(model={"type": "BPE"}), "tokenizer"),
    "tokenizer of wrong types": (of_tokenizer(model=5), "tokenizer"),
    "tokenizer of no vocabulary": (of_tokenizer(model={"type": "BPE", "vocab": {}, "merges": []}), "tokenizer"),
    "tokenizer's normalizer": (
        of_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "tokenizer"
    ),
    "tokenizer's settings a list": (written("tokenizer_config.json", "[]"), "tokenizer"),
    "tokenizer's settings cut": (written("tokenizer_config.json", "{"), "tokenizer"),
    "tokenizer's length a text": (
        lambda folder: edit_json(folder / "tokenizer_config.json", model_max_length="long"), "tokenizer"
    ),
    "generation settings a list": (written("generation_config.json", "[1]"), "is not a JSON object"),
    "generation settings cut": (written("generation_config.json", "{"), "not valid JSON"),
}  # fmt: skip
"""What was done, and a part of the line that says so."""
