"""Shares of the changed weights in the rise of the loss: in the report of every edit, or the reason that they are not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tiny_models
import torch
from conftest import DEMO, read_report, slow
from torch import nn

from invarlock.checkpoints import tensor_tree
from invarlock.config.loading import load
from invarlock.datasets.layout import Windows
from invarlock.evaluation import resuming
from invarlock.evaluation.passes import uncached_logits
from invarlock.evaluation.resuming import Resuming, first_blocks_of, sequence_of_blocks
from invarlock.models.state import ModelState
from invarlock.pipeline import run
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.selection import find_weights
from invarlock.reporting.report import json_schema
from invarlock.search.fisher import fisher_of
from invarlock.testing import architectures

BASELINE = DEMO / "checkpoint"
HURT = "model.layers.1.mlp.down_proj"
NO_GRADIENTS = """
import torch
from invarlock.adapters import HF_Causal_Adapter

class Adapter(HF_Causal_Adapter):
    name = "frozen"

    def load_model(self, model_id, device="cpu", **options):
        model = super().load_model(model_id, device, **options)
        model.lm_head.forward = torch.no_grad()(model.lm_head.forward)
        return model
"""


def shares_of(folder: str) -> dict[str, Any]:
    report = read_report(Path(folder))
    jsonschema.validate(report, json_schema())
    return report["attribution"]


def assert_shares(found: dict[str, Any]) -> None:
    shares = [module["share"] for module in found["modules"] if module["share"] is not None]
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)
    assert sum(module["predicted"] or 0 for module in found["modules"]) == pytest.approx(found["predicted"])
    assert found["not_predicted"] == ""


def hurt(model: nn.Module, folder: str) -> str:
    """A checkpoint of an edit that somebody else made, with one weight that hurts and one that does not."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.get_submodule(HURT).weight.mul_(0.5)
        edited.model.layers[3].self_attn.q_proj.weight.mul_(1.01)
        edited.model.norm.weight.mul_(1.01)
    edited.save_pretrained(folder)
    return folder


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 2])
def test_an_edit_has_shares_whether_or_not_it_is_accepted(invarlock, config, bits: int) -> None:
    done = invarlock("run", "-c", config(), "--set", f"edit.plan.bitwidth={bits}", "--out", "out")
    report, found = read_report(Path("out")), shares_of("out")
    assert report["verdict"]["accepted"] == (bits == 8)
    assert_shares(found)
    assert len(found["modules"]) == len(report["edit"]["modules"])
    assert found["rise"] == pytest.approx(math.log(report["metrics"]["primary"]["ratio"]))
    assert report["timings"]["sensitivities"] > 0
    first = f"{found['modules'][0]['share'] * 100:.3g} %"
    assert f"shares   {found['modules'][0]['module']} {first}" in done.out
    assert "put back" not in done.out
    for form in ("report.html", "report.md"):
        invarlock("report", "out", "-o", form)
        assert first in Path(form).read_text()
    assert invarlock("verify", "out").code == 0


def test_a_model_in_bfloat16_has_shares(invarlock, config) -> None:
    path = config(model={"id": str(BASELINE), "device": "cpu", "dtype": "bfloat16"}, edit={"plan": {"bitwidth": 4}})
    invarlock("run", "-c", path, "--out", "out")
    assert_shares(shares_of("out"))


def test_gradients_leave_nothing_on_the_model(config) -> None:
    result = run(load(str(config(edit={"plan": {"bitwidth": 2}}))), PluginManager.load(Selection()))
    assert result.report["attribution"]["predicted"] > 0
    assert result.report["model"]["restored"] is True
    assert all(parameter.requires_grad and parameter.grad is None for parameter in result.model.parameters())


def test_gradients_that_were_there_stay() -> None:
    model = architectures.llama()
    frozen, given = model.model.layers[0].mlp.up_proj.weight, model.lm_head.weight
    frozen.requires_grad_(False)
    given.grad = torch.ones_like(given)
    before, weights = ModelState.of(model), {name: each.clone() for name, each in model.state_dict().items()}
    ids = torch.arange(12).reshape(1, 12)
    fisher = fisher_of(model, Windows(ids, torch.ones_like(ids), ids), find_weights(model), task="causal", seed=0)
    assert fisher["model.layers.0.mlp.up_proj.weight"].rows.any()
    assert before.undo() == []
    assert torch.equal(given.grad, torch.ones_like(given))
    assert all(torch.equal(each, weights[name]) for name, each in model.state_dict().items())


# -- comparisons -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", ["auto", *slow("6")], ids=["the baseline is kept", "the baseline is gone"])
def test_an_edit_of_somebody_else_has_shares(invarlock, config, demo, final: str) -> None:
    arguments = ("compare", "--baseline", BASELINE, "-c", config(), "--set", f"dataset.final_n={final}")
    invarlock(*arguments, "--set", "dataset.max_n=8", "--subject", hurt(demo, "subject"), "--out", "out")
    found = shares_of("out")
    assert_shares(found)
    names = [module["module"] for module in found["modules"]]
    assert names == [HURT, "model.layers.3.self_attn.q_proj", "model.norm.weight"]
    assert found["modules"][0]["share"] > 0.9
    # The prediction is of matrices.
    assert found["modules"][2]["predicted"] is None


def test_equal_weights_have_no_shares_and_cost_no_gradients(invarlock, config) -> None:
    invarlock("compare", "--baseline", BASELINE, "--subject", BASELINE, "-c", config(), "--out", "out")
    assert shares_of("out") is None
    assert "sensitivities" not in read_report(Path("out"))["timings"]


def test_a_reference_has_what_shares_need(invarlock, config, demo) -> None:
    path = config()
    assert invarlock("reference", BASELINE, "-c", path, "--out", "ref").code == 0
    arguments = ("compare", "--baseline", BASELINE, "--subject", hurt(demo, "subject"), "-c", path)
    invarlock(*arguments, "--out", "without")
    invarlock(*arguments, "--reference", "ref", "--out", "with")
    for kept, measured in zip(shares_of("with")["modules"], shares_of("without")["modules"], strict=True):
        assert kept["share"] == (measured["share"] and pytest.approx(measured["share"], rel=0.02))
    assert "sensitivities" not in read_report(Path("with"))["timings"]

    tree, _ = tensor_tree.read(Path("ref"), "reference.json")
    weights = tree["sensitivities"]["weights"]
    assert sum(each[part].nbytes for each in weights.values() for part in ("rows", "columns")) < 12_000
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.down_proj.weight"]
    tensor_tree.write(Path("damaged"), "reference.json", tree)
    done = invarlock("run", "-c", path, "--reference", "damaged", "--out", "refused")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "its sensitivities are of other weights" in done.err

    del tree["sensitivities"]
    tensor_tree.write(Path("earlier"), "reference.json", tree)
    assert invarlock("run", "-c", path, "--reference", "earlier", "--out", "out").code == 0
    assert shares_of("out")["not_predicted"].startswith("the reference holds no sensitivities")


# -- not measured ------------------------------------------------------------------------------------------------------


def without_gradients(module: Callable[..., Path], config: Callable[..., Path]) -> list[Any]:
    module("frozen", NO_GRADIENTS)
    return ["-p", "frozen", "-c", config(model={"id": str(BASELINE), "adapter": "frozen", "device": "cpu"})]


def vectors(module: Callable[..., Path], config: Callable[..., Path]) -> list[Any]:
    folder = tiny_models.save(tiny_models.MODELS["BertModel"](), Path("vectors"))
    return ["-c", config(model={"id": str(folder), "device": "cpu"}, dataset={"seq_len": 16, "final_n": 4})]


def streamed(module: Callable[..., Path], config: Callable[..., Path]) -> list[Any]:
    return ["--stream", "-c", config()]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (without_gradients, "the baseline has no gradients: RuntimeError: element 0 of tensors does not require grad"),
        (vectors, "embedding models predict no tokens"),
        (streamed, "the weights stay on disk"),
    ],
)
def test_shares_that_cannot_be_had_are_not_measured(invarlock, module, config, arguments: Any, reason: str) -> None:
    done = invarlock("run", *arguments(module, config), "--out", "out")
    assert (done.code, done.err) == (0, ""), done.err
    found = shares_of("out")
    assert found["not_predicted"].startswith(reason)
    assert (found["predicted"], found["modules"]) == (None, [])
    invarlock("report", "out", "-o", "report.md")
    assert f"their shares are not measured: {reason}" in Path("report.md").read_text()


# -- runs that begin at a block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [architectures.llama, architectures.gpt2, *slow(architectures.mixtral)])
def test_a_run_from_a_block_on_is_the_whole_run(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    blocks = [*sequence_of_blocks(model).values()]
    ids = torch.arange(24).reshape(2, 12)
    windows = Windows(ids, torch.ones_like(ids), ids)
    begun, ran = Resuming(model, blocks, {1}), []
    with torch.no_grad():
        with begun.recording():
            whole = uncached_logits(model, windows)
        assert begun.is_sequence
        blocks[0].get_submodule("mlp" if hasattr(blocks[0], "mlp") else "self_attn").register_forward_hook(
            lambda *_: ran.append(0)
        )
        with begun.beginning_at(1):
            assert torch.equal(uncached_logits(model, windows), whole)
        assert not ran
        next(blocks[1].parameters()).mul_(2)
        with begun.beginning_at(1):
            resumed = uncached_logits(model, windows)
        assert torch.equal(resumed, uncached_logits(model, windows))
        assert not torch.equal(resumed, whole)


def test_blocks_that_run_twice_are_no_sequence_and_what_is_tied_is_read_by_the_first() -> None:
    model = architectures.llama_tied()
    blocks = sequence_of_blocks(model)
    first = first_blocks_of(model, blocks)
    assert first[id(model.lm_head.weight)] == 0
    assert first[id(model.model.layers[1].mlp.up_proj.weight)] == 1
    model.model.layers.append(model.model.layers[1])
    model.config.num_hidden_layers = 3
    begun, ids = Resuming(model, [*blocks.values()], {1}), torch.arange(12).reshape(1, 12)
    with torch.no_grad(), begun.recording():
        uncached_logits(model, Windows(ids, torch.ones_like(ids), ids))
    assert not begun.is_sequence
    assert sequence_of_blocks(architectures.t5()) == {}


def test_what_is_put_back_from_its_block_on_measures_the_same(invarlock, config, monkeypatch) -> None:
    path = config(edit={"plan": [{"match": "*.layers.[23].mlp.down_proj", "bitwidth": 3}]})
    arguments = ("run", "-c", path, "--attribute", "2")
    began: list[int] = []
    beginning_at = Resuming.beginning_at
    monkeypatch.setattr(Resuming, "beginning_at", lambda self, start: began.append(start) or beginning_at(self, start))
    invarlock(*arguments, "--out", "from-blocks")
    assert set(began) == {0, 2, 3}
    monkeypatch.setattr(resuming, "find_blocks", lambda model: {})
    began.clear()
    invarlock(*arguments, "--out", "whole")
    assert set(began) == {0}
    assert shares_of("from-blocks") == shares_of("whole")
