"""Search where there are no gradients: relative errors, with a factor for each family of weights."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.quantization import Plan, Scheme, fake_quantize_, select_targets
from invarlock.search.candidates import predicted_rise
from invarlock.search.linearity import FAMILIES, families_of, fitted
from invarlock.testing import architectures

SMALL = {"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 6}

# -- families and factors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_few_families_hold_each_weight_once(architecture: str) -> None:
    targets = select_targets(architectures.tiny_model(architecture), Plan(bitwidth=8, scope="all"))
    families = families_of(targets)
    assert len(families) <= FAMILIES
    assert sorted(name for family in families for name in family.names) == sorted(target.name for target in targets)
    roles = [{target.role for target in family.targets} for family in families]
    assert all(len(of_one) == 1 for of_one in roles)


def test_a_family_without_a_usable_rise_matters_as_the_one_that_matters_most() -> None:
    targets = select_targets(architectures.llama(), Plan(bitwidth=8, scope="all"))
    rises = iter([0.0, math.nan, 0.5])
    found = fitted(targets, {}, lambda scheme, names: next(rises))
    scheme = Scheme(bitwidth=4, group_size=16)
    factors = {
        round(predicted_rise(target, scheme, found[target.parameter_name]) / relative_error(target, scheme) ** 2, 3)
        for target in targets
    }
    assert max(factors) == pytest.approx(min(factors), rel=0.02)


def relative_error(target: Any, scheme: Scheme) -> float:
    return float(fake_quantize_(target.parameter.detach().clone(), scheme).effect.relative_error)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quiet_attention(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with attention that adds next to nothing; its weights round as well as any."""
    model, folder = copy.deepcopy(demo), tmp_path_factory.mktemp("quiet") / "model"
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(folder)
    return folder


FORWARD_ONLY = (
    "import torch\nfrom invarlock.adapters import HF_Causal_Adapter\n"
    "class ForwardOnly(HF_Causal_Adapter):\n"
    "    name = 'forward_only'\n"
    "    def load_model(self, *args, **options):\n"
    "        model = super().load_model(*args, **options)\n"
    "        model.model.forward = torch.no_grad()(model.model.forward)\n"
    "        return model\n"
)
"""An adapter of models that cannot be run backwards."""


def searched(config: Any, target: dict[str, float], checkpoint: Path = DEMO / "checkpoint", **sections: Any) -> Path:
    edit = {"plan": {"bitwidth": "auto", "scope": "all"}, "search": {"max_attempts": 3}, "target": target}
    model = {"id": str(checkpoint), "adapter": "hf_causal", "device": "cpu", "dtype": "float32"}
    path: Path = config(model=model, dataset=SMALL, edit=edit, **sections)
    return path


def test_a_streamed_search_gives_fragile_weights_more_bits_and_is_saved(invarlock, config, quiet_attention) -> None:
    path = searched(config, {"max_pm_ratio": 1.05}, quiet_attention, output={"save_model": True})
    done = invarlock("run", "--stream", "-c", path, "--out", "out")
    assert done.code == 0, done.out + done.err
    assert "relative errors on the preview windows (no gradients: its weights are streamed; " in done.out
    report = read_report(Path("out"))
    search = report["search"]
    assert search["sensitivities"] == "relative errors"
    assert search["preview_passes"] <= 6
    bits = {module["name"]: module["bits"] for module in report["edit"]["modules"]}
    assert mean_bits(bits, "mlp") >= mean_bits(bits, "self_attn") + 2
    assert not Path("out/search.json").exists()

    accepted = next(point for point in search["points"] if point["action"] in ("continue", "warn"))
    model = {"id": str(quiet_attention), "adapter": "hf_causal", "device": "cpu", "dtype": "float32"}
    whole = {"save_model": True, "format": "dequantized"}
    pasted = config(model=model, dataset=SMALL, edit={"plan": accepted["plan"]}, output=whole)
    again = invarlock("run", "--stream", "-c", pasted, "--out", "again")
    assert again.code == 0, again.out + again.err
    packed, unpacked = (
        AutoModelForCausalLM.from_pretrained(Path(run) / "model", dtype="float32") for run in ("out", "again")
    )
    ids = torch.arange(32).view(1, 32)
    assert torch.equal(packed(input_ids=ids).logits, unpacked(input_ids=ids).logits)


def mean_bits(bits: dict[str, int], part: str) -> float:
    found = [width for name, width in bits.items() if part in name]
    return sum(found) / len(found)


def test_a_model_that_cannot_be_run_backwards_gets_the_plan_of_a_streamed_one(invarlock, config, module) -> None:
    module("forward_only", FORWARD_ONLY)
    reports = {}
    for out, options in (
        ("memory", ("-p", "forward_only", "--set", "model.adapter=forward_only")),
        ("disk", ("--stream",)),
    ):
        path = searched(config, {"bits_per_weight": 5.0})
        done = invarlock("run", "-c", path, "--out", out, *options)
        assert done.code == 0, done.out + done.err
        reports[out] = read_report(Path(out))
    memory, disk = (reports[out]["search"] for out in ("memory", "disk"))
    assert "does not require grad" in memory["no_gradients"]
    assert memory["points"][0]["plan"] == disk["points"][0]["plan"]
    assert memory["preview_passes"] == disk["preview_passes"] <= 4
    assert reports["memory"]["edit"]["modules"] == reports["disk"]["edit"]["modules"]


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"dataset": {"provider": "generated"}}, "edit.plan.bitwidth: auto needs text where a model is streamed: set "),
        (
            {"edit": {"plan": {"bitwidth": 4, "scale": "fisher"}}},
            "edit.plan.scale: fisher needs gradients: run without --stream, or set scale to inputs",
        ),
        (
            {
                "edit": {
                    "plan": [
                        {"match": "*.mlp.*", "bitwidth": 4, "scale": "fisher"},
                        {"match": "*", "bitwidth": 8, "scale": "inputs"},
                    ]
                }
            },
            "edit.plan: rules have scale inputs and scale fisher: give all of them the same",
        ),
    ],
    ids=["text", "scale", "scales"],
)
def test_a_streamed_search_that_cannot_be_is_one_line_with_the_key(invarlock, config, sections, named) -> None:
    edit = {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1}}
    done = invarlock("run", "--stream", "-c", config(**{"edit": edit, "dataset": SMALL} | sections), "--out", "out")
    assert done.code == 2
    assert done.err.strip().splitlines() == [line for line in done.err.strip().splitlines() if named in line]
    assert named in done.err
