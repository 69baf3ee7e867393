"""The guard ``rmt``: the edge of noise, and what it makes of edits."""

from __future__ import annotations

import copy

import activation_guards
import pytest
import torch
from activation_guards import BUILDERS, on, tokens
from torch import nn

from invarlock.core.errors import UsageError
from invarlock.models.structure import Role
from invarlock.quantization import find_weights
from invarlock.quantization.model import quantize_model
from invarlock.quantization.scheme import Plan
from plugins_builtin.guards.activations import Sample
from plugins_builtin.guards.rmt import RMTGuard, spikes


def judge(model: nn.Module, batches, damage=None, *, edited_batches=None, **options):
    return activation_guards.judge(RMTGuard(**options), model, batches, damage, edited_batches=edited_batches)


# -- the edge of noise ---------------------------------------------------------------------------------------------------


def noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(128, 32), (64, 64), (64, 400), (64, 1000)])
def test_noise_stays_below_the_edge(rows: int, columns: int) -> None:
    """Of pure noise, whatever its means and scales, at most 1 % has an eigenvalue beyond, and most come close."""
    seeds = 400
    scales = 1 + 5 * torch.rand(columns, generator=torch.Generator().manual_seed(1))
    beyond, top = 0, []
    for seed in range(seeds):
        matrix = noise(rows, columns, seed) * scales + 3
        spectra = spikes.compare(matrix, matrix, margin=2.02, deadband=0.1)
        beyond += spectra.counts[0] > 0
        standardized = (matrix - matrix.mean(0)) / matrix.std(0)
        if seed < 20:
            top.append(float(torch.linalg.matrix_norm(standardized, 2)) ** 2 / (rows - 1) / spectra.edge)
    # 1 % expected: 400 draws exceed 2.5 % once in a thousand times.
    assert beyond / seeds <= 0.025
    assert 0.85 < sum(top) / len(top) < 1


def test_the_edge_is_marchenko_and_pasturs() -> None:
    assert spikes.edge(1_000_000, 250_000, 0) == pytest.approx((1 + 0.25**0.5) ** 2, rel=1e-3)
    assert spikes.edge(128, 64, 2.02) > spikes.edge(128, 64, 0) == pytest.approx((1 + (64 / 127) ** 0.5) ** 2, rel=0.02)


@pytest.mark.parametrize("columns", [50, 300])
def test_planted_directions_are_counted(columns: int) -> None:
    """Signal well above the threshold sqrt(d / n) of Baik, Ben Arous and Péché is seen, one eigenvalue a direction."""
    directions = torch.linalg.qr(noise(columns, 3, 1))[0]
    matrix = noise(128, columns, 2) + 6 * (columns / 128) ** 0.25 * noise(128, 3, 3) @ directions.T
    spectra = spikes.compare(matrix, matrix, margin=2.02, deadband=0.1)
    assert spectra.counts == (3, 3)
    assert (spectra.turned, spectra.energy_ratio, spectra.lost, spectra.gained) == (0, 1, 0, 0)
    assert 0.1 < spectra.energies[0] < 1


def test_what_is_lost_gained_and_turned() -> None:
    one, other = torch.linalg.qr(noise(300, 2, 1))[0].T
    base, signal = noise(128, 300, 2), 12 * noise(128, 1, 3)

    def compare(before, after):
        return spikes.compare(before, after, margin=2.02, deadband=0.1)

    lost = compare(base + signal * one, base)
    assert (lost.counts, lost.lost, lost.gained) == ((1, 0), 1, 0)
    assert lost.energy_ratio < 0.5
    gained = compare(base, base + signal * one)
    assert (gained.counts, gained.lost, gained.gained) == ((0, 1), 0, 1)
    assert gained.energy_ratio > 2
    turned = compare(base + signal * one, base + signal * other)
    assert (turned.lost, turned.gained) == (0, 0)
    assert turned.turned > 0.8
    half = compare(base + signal * one, base + signal * (one + other) / 2**0.5)
    assert 0.2 < half.turned < 0.7
    louder = compare(base + signal * one, 2 * (base + signal * one))
    assert louder.energy_ratio > 3
    assert louder.turned < 0.05


def test_constant_features_are_no_signal() -> None:
    matrix = noise(128, 40, 1)
    matrix[:, :5] = 3
    spectra = spikes.compare(matrix, matrix, margin=2.02, deadband=0.1)
    assert spectra.counts == (0, 0)
    nothing = torch.zeros(64, 20)
    assert spikes.compare(nothing, nothing, margin=2.02, deadband=0.1).counts == (0, 0)


# -- samples -----------------------------------------------------------------------------------------------------------


def test_a_sample_is_uniform_bounded_and_the_same_every_time() -> None:
    seen = torch.zeros(100)
    for seed in range(400):
        samples = [Sample(10, seed), Sample(10, seed)]
        for sample in samples:
            # What comes after the second call is not sampled.
            for start, stop in ((0, 40), (40, 60), (60, 100)):
                sample.add(torch.arange(start, stop).float().view(2, -1, 1))
        one, other = (sample.result() for sample in samples)
        assert one.comparable(other)
        assert (one.calls, one.tokens) == (3, 100)
        assert torch.equal(one.rows, other.rows)
        assert len(one.rows) == len(one.rows.unique()) == 10
        seen[one.rows.long().flatten()] += 1
    # 400 * 10 / 60 expected, with a standard deviation of 7.5.
    assert seen[:60].min() > 35
    assert seen[:60].max() < 100
    assert seen[60:].sum() == 0


def test_a_smaller_sample_is_part_of_a_larger_one() -> None:
    small, large = Sample(8, 3), Sample(64, 3)
    for start in range(0, 1000, 100):
        for sample in (small, large):
            sample.add(torch.arange(start, start + 100).float().view(-1, 1))
    assert set(small.result().rows.flatten().tolist()) < set(large.result().rows.flatten().tolist())
    assert not small.result().comparable(large.result())
    assert Sample(8, 0).result() is None


# -- harmless ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unedited_model_passes_without_a_warning(build, dtype) -> None:
    result = judge(build().to(dtype), tokens())
    assert (result["passed"], result["action"], result["warnings"]) == (True, "continue", [])
    assert result["metrics"]["suspects"] == []
    assert result["metrics"]["not_measured"] == []
    # Attention and feed-forward of each of two blocks, of T5's encoder and decoder, and the head.
    assert result["metrics"]["places"] >= 5


@pytest.mark.parametrize(
    "plan", [Plan(8, scope="all"), Plan(8, group_size=32, scope="all"), Plan(6, scope="all"), Plan(4, scope="all")]
)
def test_rounding_that_does_little_is_no_cause_for_warning(demo, text, plan: Plan) -> None:
    result = judge(demo, text, lambda model: quantize_model(model, plan))
    assert (result["action"], result["warnings"]) == ("continue", [])


def test_a_change_that_does_not_reach_the_output_is_no_cause_for_warning(demo, text) -> None:
    def fold(model):
        for layer in model.model.layers:
            norm = layer.post_attention_layernorm
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight.mul_(norm.weight)
            norm.weight.fill_(1)

    result = judge(demo, text, fold)
    assert (result["action"], result["metrics"]["beyond_epsilon"]) == ("continue", 4)


# -- damage ------------------------------------------------------------------------------------------------------------

DAMAGES = {
    "zeroed": lambda weight: weight.zero_(),
    "negated": lambda weight: weight.neg_(),
    "scaled": lambda weight: weight.mul_(4),
    "shuffled": lambda weight: weight.copy_(weight.flip(0)),
    "noise": lambda weight: weight.copy_(noise(*weight.shape, 0) * weight.std()),
    "outliers": lambda weight: weight[::16, ::16].fill_(40 * weight.std()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["layers.0.self_attn.v_proj", "layers.2.mlp.down_proj", "layers.3.self_attn.o_proj"])
def test_damage_to_one_matrix_warns_and_names_where_it_is(demo, text, part: str, damage: str) -> None:
    result = judge(demo, text, on(f"model.{part}", DAMAGES[damage]))
    assert (result["passed"], result["action"]) == (True, "warn")
    assert result["metrics"]["suspects"][0]["module"] == f"model.{part}".rpartition(".")[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_rounding_to_very_few_bits_warns(demo, text, bits: int) -> None:
    assert judge(demo, text, lambda model: quantize_model(model, Plan(bits, scope="all")))["action"] == "warn"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", BUILDERS)
def test_activations_that_are_not_finite_abort(build, value: float) -> None:
    model = build()
    target = next(target for target in find_weights(model) if target.role is Role.ATTENTION)
    result = judge(model, tokens(), lambda model: model.get_parameter(target.parameter_name)[0].fill_(value))
    assert (result["passed"], result["action"]) == (False, "abort")
    assert result["metrics"]["suspects"]


def test_one_token_that_is_not_finite_is_seen_whether_it_is_sampled_or_not(demo, text) -> None:
    rare = int(text[1][1, 127])
    damage = on("model.embed_tokens", lambda weight: weight[rare].fill_(float("nan")))
    for size in (8, 512):
        assert judge(demo, text, damage, tokens=size)["action"] == "abort"
    assert judge(demo, text, damage, tokens=512)["metrics"]["suspects"][0]["module"] == "model.embed_tokens"


def test_what_was_not_finite_before_is_not_the_edits(demo, text) -> None:
    broken = copy.deepcopy(demo)
    with torch.no_grad():
        broken.model.layers[2].mlp.up_proj.weight[0] = float("nan")
    result = judge(broken, text)
    assert result["action"] == "continue"
    assert "model.layers.3.self_attn.q_proj" in result["metrics"]["not_measured"]


# -- not measured, and options -----------------------------------------------------------------------------------------


def test_without_windows_it_did_not_measure(demo) -> None:
    for result in (judge(demo, []), RMTGuard().validate(demo, None, {})):
        assert (result["passed"], result["action"], result["metrics"]["measured"]) == (False, "continue", False)
        assert result["message"].startswith("not measured: ")


def test_other_windows_are_not_compared(demo, text) -> None:
    assert judge(demo, text, edited_batches=text[:1])["metrics"]["measured"] is False


def test_the_same_numbers_every_time(demo, text) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["noise"])
    assert judge(demo, text, damage) == judge(demo, text, damage)
    assert judge(demo, text, damage) != judge(demo, text, damage, seed=1)


def test_epsilon(demo, text) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["zeroed"])
    assert judge(demo, text, damage, epsilon_default=0.9)["action"] == "continue"
    assert judge(demo, text, damage, epsilon_by_family={"embed": 0.9})["action"] == "continue"
    assert judge(demo, text, damage, epsilon_by_family={"ffn": 0.9})["action"] == "warn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q": "auto"}, "q: the ratio of features to tokens"),
        ({"correct": True}, "correct: the guard never changes a model"),
        ({"epsilon": 0.1}, "epsilon: use epsilon_default"),
        ({"activation_required": True}, "activation_required: "),
        ({"epsilon_defalt": 0.1}, "did you mean 'epsilon_default'"),
        ({"epsilon_default": -1}, "epsilon_default: -1 is not a number at least 0"),
        ({"epsilon_by_family": {"atn": 0.1}}, "no family 'atn'; did you mean 'attn'"),
        ({"tokens": 2}, "tokens: 2 is not a whole number of at least 8"),
        ({"deadband": 2}, "deadband: 2 is not a number from 0 to 1"),
    ],
)
def test_options_that_are_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RMTGuard(**options)
