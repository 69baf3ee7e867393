"""Parts of a model that the windows did not exercise: reported, and warned of only where the edit touches them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.reporting.report import json_schema
from invarlock.testing import Done, tiny_model

BASELINE = DEMO / "checkpoint"
TEXT = ("--dataset", DEMO / "text.jsonl")
SMALL = ("--set", "dataset.seq_len=32", "--set", "dataset.final_n=4", "--set", "dataset.preview_n=1")
INVARIANTS = ("--set", "guards.order=[invariants]")
Compare = Callable[..., Done]


@pytest.fixture
def compare(invarlock: Callable[..., Done]) -> Compare:
    """Compare two checkpoints over a few short windows, strictly."""

    def run(baseline: Path, subject: Path, *options: Any) -> Done:
        fixed = (*SMALL, *INVARIANTS, "--strict", "--out", "out", "--force")
        return invarlock("compare", "--baseline", baseline, "--subject", subject, *fixed, *options)

    return run


def checkpoint(name: str, source: Path = BASELINE, **changes: Any) -> Path:
    """A copy with other fields in its configuration; None takes one out."""
    folder = Path(shutil.copytree(source, name))
    edit_json(folder / "config.json", changes)
    return folder


def edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    values = json.loads(path.read_text()) | changes
    path.chmod(0o644)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def saved(name: str, model: Any) -> Path:
    model.save_pretrained(name)
    return Path(name)


def coverage() -> dict[str, Any]:
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    return report["coverage"]


def gaps() -> dict[str, dict[str, str]]:
    return {gap["part"]: gap for gap in coverage()["gaps"]}


def objections() -> list[str]:
    findings = read_report(Path("out"))["verdict"]["findings"]
    return [finding["message"] for finding in findings if finding["action"] != "continue"]


# -- gaps inform -------------------------------------------------------------------------------------------------------


def test_an_unedited_model_has_gaps_and_no_warning(compare: Compare) -> None:
    done = compare(BASELINE, BASELINE, *TEXT)
    assert done.code == 0, done.out
    assert {gap["action"] for gap in coverage()["gaps"]} == {"continue"}
    context = gaps()["context"]
    assert context["message"] == "not exercised: context beyond 32 of 256 tokens"
    assert context["remedy"].startswith("--set dataset.seq_len=256 ")
    assert "baseline near chance" not in gaps()


def test_the_option_that_a_gap_names_closes_it(compare: Compare) -> None:
    compare(BASELINE, BASELINE, *TEXT)
    option = gaps()["context"]["remedy"].split()[1]
    assert compare(BASELINE, BASELINE, *TEXT, "--set", option).code == 0
    assert "context" not in gaps()


def test_tokens_of_each_kind_are_counted(compare: Compare) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASELINE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = AutoModelForCausalLM.from_pretrained(BASELINE)
    model.resize_token_embeddings(len(tokenizer) + 6)
    folder = saved("chat", model)
    tokenizer.save_pretrained(folder)
    compare(folder, folder, *TEXT)
    kinds = {entry["kind"]: (entry["seen"], entry["known"]) for entry in coverage()["tokens"]}
    assert kinds["special"][1] == 3
    seen, known = kinds["ordinary"]
    assert known == len(tokenizer) - 3, "padding of the vocabulary is no token"
    assert 0 < seen <= 5 * 32
    assert "<|im_start|>, <|im_end|>" in gaps()["special tokens"]["message"]
    assert f"{known - seen:,} of {known:,} ordinary tokens" in gaps()["ordinary tokens"]["message"]


def test_special_tokens_that_the_text_contains_are_seen(compare: Compare) -> None:
    Path("text.jsonl").write_text(json.dumps({"text": "<|endoftext|>" + "In the beginning God created. " * 200}))
    compare(BASELINE, BASELINE, "--dataset", "text.jsonl")
    assert {"kind": "special", "seen": 1, "known": 1} in coverage()["tokens"]
    assert "special tokens" not in gaps()


def test_towers_never_run(compare: Compare) -> None:
    folder = checkpoint("multimodal", vision_config={"hidden_size": 8}, audio_config={"hidden_size": 8})
    assert compare(folder, folder, *TEXT).code == 0
    assert {"vision tower", "audio tower"} <= gaps().keys()


def test_experts_that_no_token_was_routed_to(compare: Compare) -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    folder = saved("moe", model)
    assert compare(folder, folder).code == 0
    assert "1 of 8 experts" in gaps()["experts"]["message"]
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = 0
    folder = saved("all-routed", model)
    compare(folder, folder)
    assert "experts" not in gaps()


OLDER_STYLE = """
import torch
from torch import nn
from invarlock.testing import tiny_model
from plugins_builtin.adapters.hf import HF_Causal_Adapter

class Expert(nn.Module):
    def __init__(self, fused, place):
        super().__init__()
        self.act, (double, inner) = fused.act_fn, (part[place].shape for part in (fused.gate_up_proj, fused.down_proj))
        self.up, self.down = nn.Linear(*double[::-1], bias=False), nn.Linear(*inner[::-1], bias=False)
        self.up.weight.data, self.down.weight.data = fused.gate_up_proj[place].data, fused.down_proj[place].data

    def forward(self, tokens):
        gate, up = self.up(tokens).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)

class Layer(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.gate = fused.gate
        self.experts = nn.ModuleList(Expert(fused.experts, place) for place in range(fused.experts.num_experts))

    def forward(self, hidden):
        tokens = hidden.view(-1, hidden.shape[-1])
        _, weights, chosen = self.gate(tokens)
        out = torch.zeros_like(tokens)
        for place, expert in enumerate(self.experts):
            rows, rank = torch.where(chosen == place)
            if len(rows) or CALLS_ALL:
                out.index_add_(0, rows, expert(tokens[rows]) * weights[rows, rank, None])
        return out.view_as(hidden)

class Adapter(HF_Causal_Adapter):
    name = "older"
    def load_model(self, model_id, device="auto", **options):
        model = super().load_model(model_id, device, **options)
        for block in model.model.layers:
            block.mlp = Layer(block.mlp)
        return model
"""


@pytest.mark.parametrize("calls_all", [False, True], ids=["chosen are called", "all are called"])
def test_experts_that_are_separate_modules(compare: Compare, module, calls_all: bool) -> None:
    module("older", OLDER_STYLE.replace("CALLS_ALL", str(calls_all)))
    model = tiny_model("mixtral", num_experts_per_tok=1)
    with torch.no_grad():
        gate = model.model.layers[1].mlp.gate.weight
        # One of two opposites is always above zero.
        gate[1] = -gate[0]
        gate[3] = 0
    folder = saved("moe", model)
    compare(folder, folder)
    fused = gaps()["experts"]["message"]
    compare(folder, folder, "-p", "older", "--set", "model.adapter=older")
    assert gaps()["experts"]["message"] == fused


def test_without_outputs_nothing_is_listed(compare: Compare) -> None:
    assert compare(BASELINE, BASELINE, "--weights-only").code == 0
    assert coverage() == {"tokens": [], "gaps": [], "conversations": 0, "images": 0}


def test_a_warning_is_a_test_and_a_result_of_its_own(invarlock: Callable[..., Done], compare: Compare) -> None:
    compare(BASELINE, checkpoint("subject", max_position_embeddings=512), *TEXT)
    for form in ("junit", "sarif"):
        assert "changes outputs beyond what was measured" in invarlock("report", "out", "--format", form).out


@pytest.mark.parametrize("form", ["terminal", "markdown", "html"])
def test_every_rendering_has_them(invarlock: Callable[..., Done], compare: Compare, form: str) -> None:
    compare(BASELINE, BASELINE, *TEXT)
    shown = invarlock("report", "out", "--format", form).out
    assert "not exercised: context beyond 32 of 256 tokens; --set dataset.seq" in shown.replace("\\", "")
    assert "0 % of 1 special tokens" in shown


# -- and warn where the edit touches them ------------------------------------------------------------------------------

FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
PACKED = {"quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed", "ignore": []}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "int"}
NO_LAYER = {"targets": ["re:.*no_such_layer"], "weights": FLOAT8, "input_activations": FLOAT8}
DECLARED = {
    "cache": ("config.json", {"quantization_config": PACKED | {"config_groups": {}, "kv_cache_scheme": FLOAT8}}),
    "activations": ("config.json", {"quantization_config": PACKED | {"config_groups": {"group_0": NO_LAYER}}}),
    "activations of AutoRound": ("config.json", {"quantization_config": AUTO_ROUND | {"act_bits": 8}}),
    "cache of ModelOpt": ("hf_quant_config.json", {"quantization": {"kv_cache_quant_algo": "FP8"}}),
}


@pytest.mark.parametrize(("architecture", "source"), [("demo", TEXT), ("gpt2", ("--weights-only",))])
@pytest.mark.parametrize("declared", DECLARED)
def test_declared_quantization_that_no_pass_simulates(compare: Compare, architecture, source, declared: str) -> None:
    baseline = BASELINE if architecture == "demo" else saved("original", tiny_model(architecture))
    file, fields = DECLARED[declared]
    subject = checkpoint("subject", baseline)
    if not (subject / file).exists():
        (subject / file).write_text("{}")
    edit_json(subject / file, fields)
    assert compare(baseline, subject, *source).code == 1
    (message,) = objections()
    assert "was not judged" in message
    assert declared.split()[0] in message
    # Where both declare it, the edit does not touch it.
    assert compare(subject, subject, *source).code == 0


def test_quantization_that_both_declare_is_a_gap(compare: Compare) -> None:
    file, fields = DECLARED["cache of ModelOpt"]
    folder = checkpoint("declaring")
    (folder / file).write_text(json.dumps(fields))
    assert compare(folder, folder, *TEXT).code == 0
    assert gaps()["quantization of the key-value cache"]["action"] == "continue"


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind} | fields}


LONG_RANGE: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "rope scaling lost": ("demo", rope("dynamic", factor=4.0), rope("default"), "rope_type (dynamic -> default)"),
    "another context": ("demo", {}, {"max_position_embeddings": 512}, "max_position_embeddings (256 -> 512)"),
    "window lost": ("mixtral", {"sliding_window": 64}, {"sliding_window": None}, "sliding_window (64 -> none)"),
    "window shrunk": ("gpt_oss", {"sliding_window": 64}, {"sliding_window": 48}, "sliding_window (64 -> 48)"),
}


@pytest.mark.parametrize("name", LONG_RANGE)
def test_a_change_beyond_the_windows_is_named_first(compare: Compare, name: str) -> None:
    architecture, before, after, change = LONG_RANGE[name]
    source = BASELINE if architecture == "demo" else saved("original", tiny_model(architecture))
    baseline, subject = checkpoint("baseline", source, **before), checkpoint("subject", source, **after)
    for measured in ((), ("--weights-only",)):
        done = compare(baseline, subject, *measured)
        assert done.code == 1
        verdict, reason, *_ = done.out.splitlines()
        assert verdict == "ACCEPTED (warn): decided by coverage"
        assert reason.startswith("  - coverage: warn: changes outputs beyond what was measured: ")
        assert change in reason
    assert read_report(Path("out"))["metrics"]["primary"] is None


def test_every_field_that_guard_serving_counts_among_positions_opens_the_gap(compare: Compare) -> None:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields = transformers.SmolLM3Config(vocab_size=1024, pad_token_id=0, **size)
    baseline = saved("original", transformers.SmolLM3ForCausalLM(fields))
    subject = checkpoint("subject", baseline, no_rope_layers=[1, 0])
    compare(baseline, subject, "--weights-only", "--set", "guards.order=[serving]")
    reason, *_ = objections()
    assert "changes outputs beyond what was measured: no_rope_layers ([1, 1] -> [1, 0])" in reason
    assert "no_rope_layers, which turns positions into angles" in "".join(objections())


def test_windows_as_long_as_the_context_show_it_at_the_outputs(compare: Compare) -> None:
    source = saved("original", tiny_model("mixtral"))
    baseline, subject = checkpoint("baseline", source, sliding_window=64), checkpoint("subject", source)
    compare(baseline, subject, "--set", "dataset.seq_len=128")
    assert "context" not in gaps()
    assert read_report(Path("out"))["metrics"]["predictions"]["kl_mean"] > 0


def test_the_same_in_other_words_is_no_change(compare: Compare) -> None:
    subject = checkpoint("subject", rope_parameters=None, rope_theta=10000.0, rope_scaling=None)
    assert compare(BASELINE, subject, *TEXT).code == 0
    assert objections() == []


def test_what_a_gguf_file_does_not_state_is_no_change(invarlock: Callable[..., Done], compare: Compare) -> None:
    grid = {"edit.plan.bitwidth": 8, "edit.plan.group_size": 32, "output.save_model": "true", "output.format": "gguf"}
    settings = [word for key, value in grid.items() for word in ("--set", f"{key}={value}")]
    assert invarlock("run", "--demo", *SMALL, *INVARIANTS, *settings, "--out", "saved").code == 0
    baseline = checkpoint("baseline", **rope("dynamic", factor=4.0))
    compare(baseline, Path("saved/model/model.gguf"), *TEXT, "--set", "guards.order=[reconstruction]")
    assert objections() == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nothing_can_be_judged_by_a_baseline_near_chance(compare: Compare, architecture: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASELINE)
    model = tiny_model(architecture, vocab_size=len(tokenizer))
    baseline = saved("baseline", model)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1.01
    subject = saved("subject", model)
    for folder in (baseline, subject):
        tokenizer.save_pretrained(folder)
    assert compare(baseline, subject, *TEXT).code == 1
    (message,) = objections()
    assert message.startswith("nothing can be judged by this baseline: its perplexity, ")
    assert "its vocabulary, 1,024" in message
    # Equal outputs need no judgement, and what the baseline writes tells how unsure it is.
    assert compare(baseline, baseline, *TEXT).code == 0
    assert gaps()["baseline near chance"]["action"] == "continue"
    compare(baseline, subject)
    assert "baseline near chance" not in gaps()


# -- evidence ----------------------------------------------------------------------------------------------------------


def changed_report(change: Callable[[dict[str, Any]], object]) -> None:
    report = read_report(Path("out"))
    change(report)
    Path("out", "report.json").write_text(json.dumps(report))


def test_a_report_with_coverage_is_verified(invarlock: Callable[..., Done], compare: Compare) -> None:
    subject = checkpoint("subject", max_position_embeddings=512)
    compare(BASELINE, subject, *TEXT)
    done = invarlock("verify", "out", "--baseline", BASELINE, "--subject", subject)
    assert done.code == 0, done.out
    changed_report(lambda report: report["coverage"]["gaps"].clear())
    done = invarlock("verify", "out")
    assert done.code == 1
    assert "verdict.findings" in done.out


def test_a_report_of_an_older_version_is_read(invarlock: Callable[..., Done], compare: Compare) -> None:
    from invarlock.pipeline.report_builder import config_digest

    compare(BASELINE, BASELINE, *TEXT)

    def age(report: dict[str, Any]) -> None:
        del report["coverage"], report["config"]["eval"]["intent"]
        report["config_sha256"] = config_digest(report["config"])

    changed_report(age)
    assert invarlock("verify", "out").code == 0
    for form in ("terminal", "markdown", "html"):
        done = invarlock("report", "out", "--format", form)
        assert (done.code, "xercised" in done.out) == (0, False)


# -- an edit that may improve ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, trained further on the text that it is judged by."""
    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(BASELINE)
    text = " ".join(json.loads(line)["text"] for line in (DEMO / "text.jsonl").read_text().splitlines())
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    windows = ids[: len(ids) // 64 * 64].view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for batch in windows[:640].split(32):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("intent", "action", "code"), [("preserve", "rollback", 1), ("improve", "warn", 0)])
def test_an_edit_that_is_meant_to_improve_may_change_predictions(invarlock, tuned, intent, action, code) -> None:
    windows = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=32")
    options = (*TEXT, *INVARIANTS, *windows, "--set", f"eval.intent={intent}", "--out", "out")
    done = invarlock("compare", "--baseline", BASELINE, "--subject", tuned, *options, "--set", "model.dtype=float32")
    assert done.code == code, done.out
    metrics = read_report(Path("out"))["metrics"]
    assert metrics["predictions"]["action"] == action, done.out
    assert metrics["primary"]["action"] == "continue"
    lower = 100 * (1 - metrics["primary"]["ratio"])
    assert f"{lower:.3g} % lower perplexity on this text" in done.out
    assert "lower perplexity on this text" in invarlock("report", "out", "--format", "markdown").out
    assert invarlock("verify", "out").code == 0


def test_a_loss_that_rises_is_rejected_whatever_is_meant(invarlock: Callable[..., Done]) -> None:
    options = ("--set", "edit.plan.bitwidth=2", "--set", "eval.intent=improve", "--out", "out")
    done = invarlock("run", "--demo", *SMALL, *INVARIANTS, *options)
    assert done.code == 1
    assert "lower perplexity" not in done.out
    assert invarlock("verify", "out").code == 0
