"""Guard ``serving``: what surrounds the weights, compared by effect; harmless edits raise no finding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, read_report
from transformers import AutoTokenizer

from invarlock.testing import architectures
from invarlock.testing.checkpoint_edits import HARMFUL, HARMLESS, FolderEdit, chatting, config

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
OF_LLAMAS = {"an honest head", "rope_theta as older files have it", "another name of the activation"}


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
    [*(("llama", name) for name in HARMLESS), *(("gpt2", name) for name in HARMLESS if name not in OF_LLAMAS)],
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
