"""An adapter folder of peft as the subject of a comparison: merged into the baseline, judged and named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report, slow
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from invarlock.testing import architectures

SMALL = [word for key in ("preview_n=1", "final_n=4", "seq_len=32") for word in ("--set", f"dataset.{key}")]
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")
NAMED = "LoRA, rank 4, merged for the comparison"


def adapter(model: Any, modules: Any = MODULES, *, size: float = 0.02, rank: int = 4, **settings: Any) -> None:
    """A plain LoRA in the folder ``adapter``."""
    torch.manual_seed(0)
    tensors = {}
    for module in modules:
        rows, columns = model.get_parameter(f"{module}.weight").shape
        if settings.get("fan_in_fan_out"):
            rows, columns = columns, rows
        tensors[f"base_model.model.{module}.lora_A.weight"] = size * torch.randn(rank, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank)
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/checkpoint", "r": rank,
        "lora_alpha": 8, "target_modules": list(modules),
    }  # fmt: skip
    Path("adapter").mkdir()
    save_file(tensors, "adapter/adapter_model.safetensors", {"format": "pt"})
    Path("adapter/adapter_config.json").write_text(json.dumps(described | settings))


def merged(model: Any, scale: float, *, transposed: bool = False) -> None:
    """The same by hand, in the folder ``merged``."""
    tensors = load_file("adapter/adapter_model.safetensors")
    with torch.no_grad():
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            delta = scale * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_parameter(f"{module}.weight").add_(delta.T if transposed else delta)
    model.save_pretrained("merged")


@pytest.fixture
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32")


def compared(invarlock: Any, subject: str, *options: str, baseline: Any = DEMO / "checkpoint", out: str = "out") -> Any:
    done = invarlock(
        "compare", "--baseline", baseline, "--subject", subject, "--out", out, "--set", "model.dtype=float32", *options
    )
    assert done.code in (0, 1), done.err
    return read_report(Path(out))


def figures(report: Any) -> dict[str, float]:
    return {module["name"]: module["relative_error"] for module in report["edit"]["modules"]}


def test_an_adapter_is_judged_as_its_sum_with_the_base(invarlock, base) -> None:
    adapter(base)
    report = compared(invarlock, "adapter", "--dataset", str(DEMO / "text.jsonl"), *SMALL)
    merged(base, 8 / 4)
    by_hand = compared(invarlock, "merged", "--dataset", str(DEMO / "text.jsonl"), *SMALL, out="by hand")
    assert report["edit"]["plan"]["merged"] == NAMED
    assert f"adapter ({NAMED}) differs in 2 of " in invarlock("report", "out").out
    assert report["metrics"]["primary"]["edited"] == pytest.approx(by_hand["metrics"]["primary"]["edited"], rel=1e-6)
    assert figures(report) == pytest.approx(figures(by_hand), rel=1e-5)
    changes = {module["change"].partition(":")[0] for module in report["edit"]["modules"]}
    assert changes == {"unchanged", "LoRA-like, rank 4"}
    # The tokenizer is the base's, and so is all that a server reads.
    assert {guard["action"] for guard in report["guards"] if guard["name"] == "serving"} == {"continue"}
    assert not any("tokenizer" in reason for reason in report["verdict"]["reasons"])


def test_an_adapter_is_merged_while_weights_stay_on_disk(invarlock, base) -> None:
    adapter(base)
    report = compared(invarlock, "adapter", "--weights-only")
    merged(base, 8 / 4)
    assert report["model"]["streamed"]
    assert report["model"]["fingerprint_after"] != report["model"]["fingerprint_before"]
    assert figures(report) == pytest.approx(
        figures(compared(invarlock, "merged", "--weights-only", out="by hand")), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        *slow(({"lora_alpha": 16}, 4)),
        ({"alpha_pattern": {"q_proj": 2, "down_proj": 2}}, 0.5),
    ],
)
def test_the_scale_is_that_of_its_settings(invarlock, base, settings: dict[str, Any], scale: float) -> None:
    adapter(base, **settings)
    report = compared(invarlock, "adapter", "--weights-only")
    merged(base, scale)
    assert figures(report) == pytest.approx(
        figures(compared(invarlock, "merged", "--weights-only", out="by hand")), rel=1e-5
    )


def test_weights_that_are_stored_transposed(invarlock) -> None:
    model = architectures.gpt2()
    model.save_pretrained("base")
    adapter(model, ["transformer.h.0.attn.c_attn"], fan_in_fan_out=True)
    report = compared(invarlock, "adapter", "--weights-only", baseline="base")
    merged(model, 2, transposed=True)
    by_hand = compared(invarlock, "merged", "--weights-only", baseline="base", out="by hand")
    assert figures(report) == pytest.approx(figures(by_hand), rel=1e-5)


def test_what_is_stored_whole_replaces_the_bases(invarlock, base) -> None:
    adapter(base)
    path = "adapter/adapter_model.safetensors"
    norm = {"base_model.model.model.norm.weight": torch.full((base.config.hidden_size,), 0.5)}
    save_file(load_file(path) | norm, path, {"format": "pt"})
    changed = {module["name"]: module["change"] for module in compared(invarlock, "adapter")["edit"]["modules"]}
    assert changed["model.norm.weight"] != "unchanged"


def test_an_embedding_has_factors_of_its_own_beside_its_weight(invarlock, base) -> None:
    adapter(base)
    path, stem = "adapter/adapter_model.safetensors", "base_model.model.model.embed_tokens"
    weight = base.get_input_embeddings().weight.detach()
    down, up = 0.02 * torch.randn(4, len(weight)), torch.randn(weight.shape[1], 4)
    embedding = {"base_layer.weight": weight + 1, "lora_embedding_A": down, "lora_embedding_B": up}
    save_file(load_file(path) | {f"{stem}.{part}": tensor for part, tensor in embedding.items()}, path)
    report = compared(invarlock, "adapter", "--weights-only")
    merged(base, 2)
    model = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(weight + 1 + 2 * (up @ down).T)
    model.save_pretrained("merged")
    by_hand = compared(invarlock, "merged", "--weights-only", out="by hand")
    assert figures(report) == pytest.approx(figures(by_hand), rel=1e-5)


@pytest.mark.parametrize(("named", "warns"), [("org/other", True), ("org/checkpoint", False), (None, False)])
def test_a_base_that_differs_from_the_one_named_warns(invarlock, base, named: str | None, warns: bool) -> None:
    adapter(base, size=1e-4, base_model_name_or_path=named)
    reasons = compared(invarlock, "adapter", "--weights-only")["verdict"]["reasons"]
    said = f"edit: warn: the adapter names {named} as its base, and was merged into {DEMO / 'checkpoint'}"
    assert (said in reasons) is warns


def test_a_large_adapter_is_rejected(invarlock, base) -> None:
    adapter(base, size=5)
    report = compared(invarlock, "adapter", "--dataset", str(DEMO / "text.jsonl"), *SMALL)
    assert not report["verdict"]["accepted"]


def test_a_comparison_with_an_adapter_verifies(invarlock, base) -> None:
    adapter(base, size=1e-3)
    compared(invarlock, "adapter", "--dataset", str(DEMO / "text.jsonl"), *SMALL)
    again = invarlock(
        "verify", "out", "--baseline", DEMO / "checkpoint", "--subject", "adapter", "--dataset", DEMO / "text.jsonl"
    )
    assert again.code == 0, again.out


def without(part: str) -> Any:
    def change() -> None:
        path = "adapter/adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)

    return change


def stored(name: str, tensor: torch.Tensor) -> Any:
    def change() -> None:
        path = "adapter/adapter_model.safetensors"
        save_file(load_file(path) | {f"base_model.model.{name}": tensor}, path)

    return change


@pytest.mark.parametrize(
    ("settings", "change", "said"),
    [
        ({"peft_type": "IA3"}, None, "is an adapter of type IA3; only LORA can be merged"),
        ({"use_dora": True}, None, "use_dora is set, and only plain LoRA can be merged"),
        ({}, without("lora_B"), "lora_A.weight is stored, and model.layers.0.self_attn.q_proj.lora_B.weight is not"),
        ({}, lambda: Path("adapter/adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        ({}, lambda: Path("adapter/adapter_model.safetensors").write_bytes(b"none"), "cannot be read"),
        ({}, lambda: Path("adapter/adapter_config.json").write_text("{"), "is not valid JSON"),
        ({}, stored("model.layers.9.mlp.up_proj.weight", torch.zeros(2, 2)), "which the baseline lacks"),
        ({}, stored("model.norm.weight", torch.zeros(3)), "model.norm.weight would need the shape (3,)"),
        ({}, stored("model.norm.lora_magnitude_vector", torch.zeros(3)), "is not part of plain LoRA"),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_one_line(invarlock, base, settings: Any, change: Any, said: str) -> None:
    adapter(base, **settings)
    if change:
        change()
    done = invarlock(
        "compare", "--baseline", DEMO / "checkpoint", "--subject", "adapter", "--out", "out", "--weights-only"
    )
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith("invarlock: error: subject: ")
    assert said in done.err.splitlines()[-1]
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_merges_it_to_the_same(invarlock, base) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    adapter(base)
    report = compared(invarlock, "adapter", "--weights-only")
    peft.PeftModel.from_pretrained(base, "adapter").merge_and_unload().save_pretrained("merged")
    assert figures(report) == pytest.approx(
        figures(compared(invarlock, "merged", "--weights-only", out="by peft")), rel=1e-5
    )
