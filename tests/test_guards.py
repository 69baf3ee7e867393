"""What every built-in guard that judges owes beside what ``check_guard`` asks of all: damage is caught and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report
from torch import nn
from transformers import AutoModelForCausalLM

from invarlock.models.snapshot import Snapshot
from invarlock.quantization import Plan, quantize_model
from invarlock.testing import architectures
from plugins_builtin.guards.invariants import InvariantsGuard
from plugins_builtin.guards.reconstruction import ReconstructionGuard
from plugins_builtin.guards.rmt import RMTGuard
from plugins_builtin.guards.spectral import SpectralGuard
from plugins_builtin.guards.variance import VarianceGuard

GUARDS = [InvariantsGuard, ReconstructionGuard, SpectralGuard]
DAMAGED = "model.layers.1.mlp.down_proj"
DAMAGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "zeroed": lambda weight: weight.zero_(),
    "negated": lambda weight: weight.neg_(),
    "scaled": lambda weight: weight.mul_(4),
    "shuffled": lambda weight: weight.copy_(weight.flip(0).clone()),
    "noise": lambda weight: weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1),
}


def demo() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32").eval()


def judge(guard: Any, model: nn.Module, edit: Callable[[nn.Module], Any] = lambda model: None) -> dict[str, Any]:
    """Without windows: what a guard can say of weights alone."""
    weights = Snapshot(model).parameters()
    guard.observe(model, None, {})
    assert guard.prepare(model, None, None, {})["ready"] is True
    with torch.no_grad():
        edit(model)
    guard.observe(model, None, {})
    context = {"edited": None, "edit": {"modules": []}, "observations": {}, "baseline_weights": weights}
    return guard.validate(model, None, context)


@pytest.mark.parametrize("guard", GUARDS)
def test_the_unedited_model_passes_by_its_weights_alone(guard) -> None:
    result = judge(guard(), architectures.llama())
    assert (result["passed"], result["action"], list(result.get("warnings", []))) == (True, "continue", [])


@pytest.mark.parametrize("guard", [RMTGuard, VarianceGuard])
def test_without_windows_activations_are_not_measured_and_do_not_count_as_passed(guard) -> None:
    result = judge(guard(), architectures.llama())
    assert (result["passed"], result["action"]) == (False, "continue")
    assert result["message"].startswith("not measured")


@pytest.mark.parametrize("name", ["rmt", "variance"])
def test_activations_tell_damage_where_there_are_windows(invarlock, config, module, name: str) -> None:
    plan = {"bitwidth": 2, "scope": "all"}
    done = invarlock("run", "-c", config(guards={"order": [name]}, edit={"plan": plan}), "--out", "out")
    assert done.code in (0, 1), done.err
    guard = read_report(Path("out"))["guards"][0]
    assert guard["action"] == "warn"
    assert guard["metrics"]["suspects"]


@pytest.mark.parametrize("guard", GUARDS)
def test_eight_bits_are_left_alone(guard) -> None:
    result = judge(guard(), demo(), lambda model: quantize_model(model, Plan(8, scope="all")))
    assert (result["passed"], result["action"]) == (True, "continue")


@pytest.mark.parametrize("guard", [ReconstructionGuard, SpectralGuard])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_one_module_is_caught_and_named_first(guard, damage: str) -> None:
    result = judge(guard(), demo(), lambda model: DAMAGES[damage](model.get_submodule(DAMAGED).weight))
    assert result["action"] == ("warn" if guard is SpectralGuard else "rollback")
    assert result["metrics"]["suspects"][0]["module"] == DAMAGED


def test_where_outputs_were_measured_a_block_alone_warns_at_most() -> None:
    guard, model = ReconstructionGuard(), demo()
    guard.prepare(model, None, None, {})
    with torch.no_grad():
        model.get_submodule(DAMAGED).weight.zero_()
    context = {"edited": {"kind": "perplexity", "value": 20.0, "ratio": 1.5, "ci": (1.4, 1.6)}, "observations": {}}
    assert guard.validate(model, None, context)["action"] == "warn"


def permute_units(model: nn.Module) -> None:
    for layer in model.model.layers:
        order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=torch.Generator().manual_seed(0))
        layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
        layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def fold_norms(model: nn.Module) -> None:
    for layer in model.model.layers:
        for projection in (layer.mlp.up_proj, layer.mlp.gate_proj):
            projection.weight.mul_(layer.post_attention_layernorm.weight)
        layer.post_attention_layernorm.weight.fill_(1)


@pytest.mark.parametrize("edit", [permute_units, fold_norms])
def test_what_preserves_a_blocks_function_scores_nothing(edit) -> None:
    result = judge(ReconstructionGuard(), demo(), edit)
    assert result["action"] == "continue"
    assert result["metrics"]["score"] < 1e-6


@pytest.mark.parametrize("bitwidth", [4, 3])
def test_the_score_estimates_the_rise_of_the_log_loss(bitwidth: int) -> None:
    """Measured on 64 windows of held-out text: 1.026 at 4 bits, 1.13 at 3."""
    result = judge(ReconstructionGuard(), demo(), lambda model: quantize_model(model, Plan(bitwidth, scope="all")))
    rise = {4: 0.0257, 3: 0.12}[bitwidth]
    assert rise / 2 < result["metrics"]["score"] < rise * 2


@pytest.mark.parametrize("guard", [ReconstructionGuard, SpectralGuard])
def test_what_is_not_finite_aborts(guard) -> None:
    result = judge(guard(), demo(), lambda model: model.get_submodule(DAMAGED).weight[0].fill_(float("nan")))
    assert (result["passed"], result["action"]) == (False, "abort")


def test_the_spectral_norm_is_right_to_one_percent() -> None:
    model = demo()
    result = judge(
        SpectralGuard(family_caps={"ffn": 0.0}), model, lambda model: model.get_submodule(DAMAGED).weight.mul_(1.1)
    )
    top = result["metrics"]["suspects"][0]
    assert top["module"] == DAMAGED
    exact = torch.linalg.svdvals(model.get_submodule(DAMAGED).weight.double())[0].item()
    shown = next(
        entry for entry in _dicts(result["metrics"]) if entry.get("module") == DAMAGED and "sigma" in str(entry)
    )
    values = [value for value in _numbers(shown) if value == pytest.approx(exact, rel=0.01)]
    assert values, shown


def _dicts(value: Any):
    if isinstance(value, dict):
        yield value
        for entry in value.values():
            yield from _dicts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _dicts(entry)


def _numbers(value: Any):
    for entry in value.values():
        if isinstance(entry, dict):
            yield from _numbers(entry)
        elif isinstance(entry, list | tuple):
            yield from (number for number in entry if isinstance(number, float))
        elif isinstance(entry, float):
            yield entry


@pytest.mark.parametrize(
    ("option", "said"),
    [("contraction", "family_caps"), ("sigma_quantil", "sigma_quantile"), ("multipletesting", "max_caps")],
)
def test_an_option_that_is_gone_says_what_took_its_place(invarlock, config, option: str, said: str) -> None:
    done = invarlock("run", "-c", config(guards={"order": ["spectral"], "spectral": {option: 1}}), "--out", "out")
    assert done.code == 2
    assert said in done.err
