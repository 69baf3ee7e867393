"""Runs and comparisons of every kind of ending, on the demo model and over a few short windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.cli.main import main

BASELINE = DEMO / "checkpoint"
SMALL = ("--set", "dataset.seq_len=32", "--set", "dataset.final_n=4", "--set", "dataset.preview_n=1")
HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> [link](javascript:alert(3)) **b** | x | `c` @all"
    " \x1b[31m\x1b]0;t\x07 \u202e [bold red]rich[/] {{7*7}} ]]> & <!-- \x00\x9b\r\nACCEPTED (continue)\n---\nbase_model: x"
)

GUARD = """
from invarlock import hookimpl

TEXT = {text!r}

@hookimpl
def invarlock_prepare(model):
    {prepare}

@hookimpl
def invarlock_validate(model):
    {validate}
"""
FINE = "return {'passed': True, 'action': 'continue', 'message': 'fine'}"
OBJECTS = (
    "return {'passed': ACTION == 'warn', 'action': ACTION, 'message': TEXT, 'warnings': [TEXT],"
    " 'metrics': {TEXT: TEXT, 'suspects': [{'module': TEXT, 'evidence': TEXT}],"
    " 'spectra': [{'module': TEXT, 'before': [3, 2], 'after': [2, 1]}]}}"
)

GUARDED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "accepted": ("return None", FINE, ()),
    "warned strictly": ("return None", OBJECTS.replace("ACTION", "'warn'"), ("--strict",)),
    "rejected": ("return None", OBJECTS.replace("ACTION", "'rollback'"), ()),
    "rejected at every width": ("return None", OBJECTS.replace("ACTION", "'rollback'"), ("--set", "edit.plan.bitwidth=7", "--set", "edit.retry.max_attempts=4")),
    "failing fast": ("return None", OBJECTS.replace("ACTION", "'abort'"), ("--set", "guards.fail_fast=true")),
    "not ready": ("return {'ready': False, 'message': TEXT}", FINE, ()),
    "prepare raises": ("raise RuntimeError(TEXT)", FINE, ()),
    "a guard failed": ("return None", "raise RuntimeError(TEXT)", ()),
    "a contradiction": ("return None", "return {'passed': True, 'action': 'abort'}", ()),
    "not measured": ("return None", "return {'passed': False, 'action': 'continue', 'metrics': {'measured': False}}", ()),
    "a huge message": ("return None", "return {'passed': True, 'message': 'A' * 10 ** 7, 'metrics': {'a': [0] * 10 ** 6}}", ()),
    "streamed": ("return None", FINE, ("--stream",)),
}  # fmt: skip


def spoilt(weight: torch.Tensor) -> None:
    weight[0] = torch.nan


def enlarged(weight: torch.Tensor) -> None:
    """Make the loss rise by thousands of nats per token, so that the ratio overflows a float."""
    weight *= 1e5


COMPARED: dict[str, tuple[Callable[[torch.Tensor], None] | None, tuple[str, ...]]] = {
    "the subject's losses not finite": (spoilt, ()),
    "an infinite ratio": (enlarged, ()),
    "weights alone": (enlarged, ("--weights-only",)),
    "unreadable windows": (None, ()),
}


def subject(folder: Path, damage: Callable[[torch.Tensor], None] | None) -> None:
    """:param damage: of the norm before the head; None takes rows from the vocabulary."""
    model: Any = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="float32")
    with torch.no_grad():
        if damage is None:
            model.resize_token_embeddings(300)
        else:
            damage(model.model.norm.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASELINE).save_pretrained(folder)


def end(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, text: str = HOSTILE) -> Path:
    """The folder of a run that ends so."""
    out = root / name.replace(" ", "-").replace("'", "")
    if name in GUARDED:
        prepare, validate, options = GUARDED[name]
        plugin = f"ending_{list(GUARDED).index(name)}"
        (root / f"{plugin}.py").write_text(GUARD.format(text=text, prepare=prepare, validate=validate))
        monkeypatch.syspath_prepend(root)
        saved = ("--set", "output.save_model=true", "--set", "output.format=dequantized")
        command = ["run", "--demo", "-p", plugin, *saved, *options]
        order = f"[{plugin}, invariants]"
    else:
        damage, options = COMPARED[name]
        subject(root / f"{out.name}-subject", damage)
        text_of = () if "--weights-only" in options else ("--dataset", DEMO / "text.jsonl")
        command = ["compare", "--baseline", BASELINE, "--subject", root / f"{out.name}-subject", *text_of, *options]
        order = "[invariants]"
    words = [*command, *SMALL, "--set", f"guards.order={order}", "--out", out, "--force", "-q"]
    assert main([str(word) for word in words]) in (0, 1, 3)
    assert (out / "report.json").is_file(), name
    return out
