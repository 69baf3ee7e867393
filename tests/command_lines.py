"""Command lines as documents and help print them, run with the files that they name laid out."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import yaml
from conftest import DEMO, Done

SMALL = {"dataset.seq_len": 32, "dataset.stride": 32, "dataset.preview_n": 1, "dataset.final_n": 4}
"""What is set besides, so that an example takes a moment."""

JUDGED = (0, 1)
"""Exit codes of an example: whatever the verdict, it was found."""


def _checkpoint(path: Path) -> None:
    shutil.copytree(DEMO / "checkpoint", path)


def _text(path: Path) -> None:
    shutil.copyfile(DEMO / "text.jsonl", path)


def _images(path: Path) -> None:
    from media import draw

    draw(path, 8)


def _sounds(path: Path) -> None:
    from media import play

    path.mkdir()
    for number in range(8):
        play(path / f"{number}.wav")


def _pairs(path: Path) -> None:
    from media import CAPTIONS, lines

    lines(path, *({"text": one, "text_pair": other} for one in CAPTIONS for other in CAPTIONS))


def _tiny(path: Path) -> None:
    """A tiny model of the kind that its name begins with."""
    import media
    import tiny_models

    names = {
        "vit": "ViTForImageClassification",
        "whisper": "WhisperForConditionalGeneration",
        "reranker": "LlamaForSequenceClassification",
    }
    kind = path.name.partition("-")[0]
    tiny_models.save(tiny_models.MODELS[names[kind]](), path)
    if kind == "whisper":
        (path / "preprocessor_config.json").write_text(json.dumps(media.SOUNDS))


def _config(path: Path) -> None:
    values = {
        "model": {"id": str(DEMO / "checkpoint"), "dtype": "float32"},
        "dataset": {"provider": "demo"},
        "guards": {"order": ["invariants"]},
    }
    path.write_text(yaml.safe_dump(values))


def _run(path: Path) -> None:
    """The folder of an accepted run with its model, named by the one or the other."""
    from invarlock.cli.main import main

    path = path.parent if path.name == "model" else path
    keys = SMALL | {"guards.order": "[invariants]", "output.save_model": "true"}
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", "--demo", "--quiet", "--out", str(path), *settings]) == 0


def _adapter(path: Path) -> None:
    """A LoRA of one weight of the demo model."""
    import torch
    from safetensors.torch import save_file

    path.mkdir()
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    shapes = {"A": (2, 128), "B": (384, 2)}
    save_file(
        {f"{stem}.lora_{part}.weight": torch.full(shape, 1e-3) for part, shape in shapes.items()},
        path / "adapter_model.safetensors",
    )
    described = {"peft_type": "LORA", "base_model_name_or_path": "original", "r": 2, "lora_alpha": 2}
    (path / "adapter_config.json").write_text(json.dumps(described))


def _keys(path: Path) -> None:
    """A pair of keys, as docs/evidence.md makes them."""
    openssl = partial(subprocess.run, check=True, capture_output=True)
    openssl(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "key.pem"])
    openssl(["openssl", "ec", "-in", "key.pem", "-pubout", "-out", "key.pub"])


MAKERS: dict[str, Callable[[Path], None]] = {
    r"(path/to/)?(original|quantized|checkpoint)|CHECKPOINT": _checkpoint,
    r"path/to/adapter": _adapter,
    r"path/to/(vit|whisper|reranker)(-int8)?": _tiny,
    r"photos": _images,
    r"recordings": _sounds,
    r"pairs\.jsonl": _pairs,
    r"held-out\.jsonl": _text,
    r"config\.yaml": _config,
    r"runs/[\w-]+(/model)?": _run,
    r"key\.(pem|pub)": _keys,
    r"my_guards": lambda path: path.with_suffix(".py").write_text(
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_validate(): return {'passed': True}\n"
    ),
}
"""What lies where a command line names it; output folders are left to the command."""


def lay_out(line: str) -> None:
    """Make what a command line reads, in the working folder, and the folder that it redirects to."""
    words = shlex.split(line)
    for before, word in zip(["", *words], words, strict=False):
        word = word.removeprefix("dataset.path=")
        path = Path(word).expanduser()
        if before == ">":
            path.parent.mkdir(parents=True, exist_ok=True)
        elif before not in ("--out", "-o") and not path.exists():
            for pattern, make in MAKERS.items():
                if re.fullmatch(pattern, word):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    make(path)


def perform(line: str, invarlock: Callable[..., Done]) -> Done:
    """Run a line of a shell: a plain call of ``invarlock`` in this process, where torch is imported already."""
    call = re.fullmatch(r"((?:\w+=\S+ )*)invarlock ([^|&;<>]*)(?:> (\S+))?", line)
    if call is None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)
    variables = dict(word.split("=", 1) for word in call[1].split())
    arguments = shlex.split(call[2])
    if arguments[:1] and arguments[0] in ("run", "search", "compare", "reference") and "--help" not in arguments:
        arguments += [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    with mock.patch.dict(os.environ, variables):
        done = invarlock(*arguments)
    if call[3]:
        Path(call[3]).expanduser().write_text(done.out)
    return done
