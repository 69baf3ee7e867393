"""The guard ``variance``: errors of outputs, where they come in, and what it proposes."""

from __future__ import annotations

import copy

import activation_guards
import pytest
import torch
from activation_guards import BUILDERS, observe, on, tokens
from torch import nn

from invarlock.core.errors import UsageError
from invarlock.models.structure import Role
from invarlock.quantization import find_weights
from invarlock.quantization.model import quantize_model
from invarlock.quantization.scheme import Plan
from plugins_builtin.guards.activations import Seen
from plugins_builtin.guards.variance import VarianceGuard


def judge(model: nn.Module, batches, damage=None, *, edited_batches=None, **options):
    return activation_guards.judge(VarianceGuard(**options), model, batches, damage, edited_batches=edited_batches)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- harmless ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unedited_model_passes_without_a_warning(build, dtype) -> None:
    result = judge(build().to(dtype), tokens())
    assert (result["passed"], result["action"], result["warnings"]) == (True, "continue", [])
    assert (result["metrics"]["suspects"], result["metrics"]["proposal"]) == ([], [])
    assert result["metrics"]["not_measured"] == []
    assert result["metrics"]["last"]["error"] == 0
    assert result["metrics"]["outputs"] > 10


@pytest.mark.parametrize(
    "plan", [Plan(8, scope="all"), Plan(8, group_size=32, scope="all"), Plan(6, scope="all"), Plan(4, scope="all")]
)
def test_rounding_that_does_little_is_no_cause_for_warning(demo, text, plan: Plan) -> None:
    result = judge(demo, text, lambda model: quantize_model(model, plan))
    assert (result["action"], result["warnings"], result["metrics"]["proposal"]) == ("continue", [], [])
    assert len(result["metrics"]["modules"]) == 10


def permute_units(model: nn.Module) -> None:
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.copy_(projection.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def permute_residual(model: nn.Module) -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.copy_(parameter[order])
        elif parameter.shape[-1] == 128:
            parameter.copy_(parameter[..., order])


@pytest.mark.parametrize("edit", [permute_units, permute_residual])
def test_inner_outputs_may_change_as_they_like(demo, text, edit) -> None:
    result = judge(demo, text, edit)
    assert (result["action"], result["warnings"]) == ("continue", [])
    assert result["metrics"]["modules"][0]["error"] > 1
    assert result["metrics"]["last"]["error"] < 1e-4


# -- damage ------------------------------------------------------------------------------------------------------------

DAMAGES = {
    "zeroed": lambda weight: weight.zero_(),
    "negated": lambda weight: weight.neg_(),
    "scaled": lambda weight: weight.mul_(4),
    "shuffled": lambda weight: weight.copy_(weight.flip(0)),
    "noise": lambda weight: weight.copy_(noise(*weight.shape) * weight.std()),
    "outliers": lambda weight: weight[::16, ::16].fill_(40 * weight.std()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["layers.0.self_attn.v_proj", "layers.2.mlp.up_proj", "layers.3.mlp.down_proj"])
def test_damage_to_one_matrix_warns_and_names_it(demo, text, part: str, damage: str) -> None:
    result = judge(demo, text, on(f"model.{part}", DAMAGES[damage]))
    assert (result["passed"], result["action"]) == (True, "warn")
    assert result["metrics"]["suspects"][0]["module"] == f"model.{part}"
    assert f"model.{part}" in result["message"]


def test_a_damaged_norm_and_a_damaged_embedding_are_named(demo, text) -> None:
    norm = "model.layers.1.post_attention_layernorm"
    result = judge(demo, text, on(norm, lambda weight: weight.mul_(0.5)))
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("warn", norm)
    result = judge(demo, text, on("model.embed_tokens", lambda weight: weight[:200].copy_(weight[:200].flip(0))))
    # The head is tied to it, so both are one weight.
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("warn", "model.embed_tokens")


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_to_very_few_bits_warns(demo, text, bits: int) -> None:
    assert judge(demo, text, lambda model: quantize_model(model, Plan(bits, scope="all")))["action"] == "warn"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", BUILDERS)
def test_outputs_that_are_not_finite_abort_and_the_first_is_named(build, value: float) -> None:
    model = build()
    target = next(target for target in find_weights(model) if target.role is Role.ATTENTION)
    result = judge(model, tokens(), lambda model: model.get_parameter(target.parameter_name)[0].fill_(value))
    assert (result["passed"], result["action"]) == (False, "abort")
    assert result["metrics"]["suspects"][0]["module"] == target.name


def test_what_overflows_later_is_laid_to_what_was_huge_before(demo, text) -> None:
    result = judge(demo, text, on("model.layers.0.mlp.up_proj", lambda weight: weight.mul_(3e37)))
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("abort", "model.layers.0.mlp.up_proj")


def test_one_token_that_is_not_finite_is_seen_whether_it_is_sampled_or_not(demo, text) -> None:
    rare = int(text[1][1, 127])
    damage = on("model.embed_tokens", lambda weight: weight[rare].fill_(float("nan")))
    for size in (8, 512):
        assert judge(demo, text, damage, max_calib=size)["action"] == "abort"
    assert judge(demo, text, damage, max_calib=512)["metrics"]["suspects"][0]["module"] == "model.embed_tokens"


def test_what_was_not_finite_before_is_not_the_edits(demo, text) -> None:
    broken = copy.deepcopy(demo)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0] = float("nan")
    result = judge(broken, text)
    assert result["action"] == "continue"
    assert "model.layers.2.mlp.up_proj" in result["metrics"]["not_measured"]


# -- corrections -------------------------------------------------------------------------------------------------------


def scale_channels(weight: torch.Tensor) -> None:
    weight.mul_(torch.linspace(0.5, 3, len(weight))[:, None])


def test_a_lost_scale_is_found_and_its_correction_gains_what_was_predicted(demo, text) -> None:
    module = "model.layers.1.self_attn.o_proj"
    (proposal,) = judge(demo, text, on(module, scale_channels))["metrics"]["proposal"]
    assert (proposal["module"], proposal["channels"]) == (module, 128)
    assert proposal["predicted_gain"] > 0.999
    assert proposal["factors"] == pytest.approx([1 / 3, 1 / 1.75, 2], rel=0.02)

    def corrected(model):
        scale_channels(model.get_submodule(module).weight)
        model.get_submodule(module).weight.div_(torch.linspace(0.5, 3, 128)[:, None])

    assert judge(demo, text, corrected)["metrics"]["last"]["error"] < 1e-5


def test_a_sign_that_was_lost(demo, text) -> None:
    (proposal,) = judge(demo, text, on("model.layers.1.self_attn.o_proj", DAMAGES["negated"]))["metrics"]["proposal"]
    assert proposal["factors"] == pytest.approx([-1, -1, -1], rel=1e-3)


@pytest.mark.parametrize("damage", ["zeroed", "noise", "shuffled"])
def test_what_no_factor_undoes_has_no_proposal(demo, text, damage: str) -> None:
    result = judge(demo, text, on("model.layers.1.self_attn.o_proj", DAMAGES[damage]))
    assert result["metrics"]["proposal"] == []


def test_min_gain(demo, text) -> None:
    def half(model):
        weight = model.model.layers[1].self_attn.o_proj.weight
        weight.mul_(2).add_(weight.std() * noise(*weight.shape))

    gains = [len(judge(demo, text, half, min_gain=gain)["metrics"]["proposal"]) for gain in (0.01, 0.99)]
    assert gains[0] >= 1
    assert gains[1] == 0


# -- not measured, and options -----------------------------------------------------------------------------------------


def test_without_windows_it_did_not_measure(demo) -> None:
    for result in (judge(demo, []), VarianceGuard().validate(demo, None, {})):
        assert (result["passed"], result["action"], result["metrics"]["measured"]) == (False, "continue", False)
        assert result["message"].startswith("not measured: ")


def test_other_windows_are_not_compared(demo, text) -> None:
    assert judge(demo, text, edited_batches=text[:1])["metrics"]["measured"] is False


def test_the_same_numbers_every_time(demo, text) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["noise"])
    assert judge(demo, text, damage) == judge(demo, text, damage)
    assert judge(demo, text, damage) != judge(demo, text, damage, seed=1)


def test_memory_does_not_grow_with_the_windows(demo, text) -> None:
    def held(batches):
        seen = observe(VarianceGuard(), demo, batches)
        return sum(
            sample.rows.numel() for entry in map(Seen.of, seen.values()) for sample in entry.samples.values() if sample
        )

    assert held(text) == held(text * 5)


def test_scope_and_deadband(demo, text) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["zeroed"])
    assert judge(demo, text, damage, deadband=0.9)["action"] == "continue"
    ffn, attn = (judge(demo, text, damage, scope=scope)["metrics"]["suspects"] for scope in ("ffn", "attn"))
    assert ffn[0]["module"] == "model.layers.2.mlp.down_proj"
    assert all("self_attn" in suspect["module"] for suspect in attn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clamp": [0.85, 1.12]}, "clamp: .*never applied"),
        ({"mode": "ci"}, "mode: "),
        ({"min_rel_gain": 0.1}, "min_rel_gain: use min_gain"),
        ({"predictive_gate": True}, "predictive_gate: "),
        ({"tap": "mlp"}, "tap: every module"),
        ({"min_gan": 0.1}, "did you mean 'min_gain'"),
        ({"scope": "both"}, "scope: 'both' is not one of ffn, attn, all; 'all'"),
        ({"min_gain": 2}, "min_gain: 2 is not a number from 0 to 1"),
        ({"max_calib": 1}, "max_calib: 1 is not a whole number of at least 8"),
    ],
)
def test_options_that_are_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VarianceGuard(**options)
