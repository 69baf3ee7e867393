"""The guard ``spectral``: its estimates against exact singular values, and what it makes of edits."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import transformers
from conftest import DEMO
from torch import nn

from invarlock.core.errors import UsageError
from invarlock.models.fingerprint import Fingerprint
from invarlock.quantization.model import quantize_model
from invarlock.quantization.rounding import fake_quantize_
from invarlock.quantization.scheme import Plan, Scheme
from invarlock.quantization.selection import find_weights
from invarlock.testing import architectures
from plugins_builtin.adapters.hf import HF_Causal_Adapter
from plugins_builtin.guards.spectral import SpectralGuard, singular, sketches

BUILDERS = architectures.ARCHITECTURES.values()


@pytest.fixture(scope="module")
def demo():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32).eval()


def judge(model: nn.Module, damage=None, context=None, **options):
    guard = SpectralGuard(**options)
    assert guard.prepare(model, None, None, {})["ready"] is True
    edited = copy.deepcopy(model)
    if damage:
        with torch.no_grad():
            damage(edited)
    before = Fingerprint.of(edited)
    result = guard.validate(edited, None, context or {})
    assert Fingerprint.of(edited) == before
    json.dumps(result, allow_nan=False)
    return result


def on(module: str, change):
    return lambda model: change(model.get_submodule(module).weight)


# -- the estimates -----------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, power: float, seed: int = 0) -> torch.Tensor:
    """Singular values 1, 2^-power, 3^-power, ... and random directions."""
    size = min(rows, columns)
    left, right = (
        torch.linalg.qr(noise(rows, size, seed=seed))[0],
        torch.linalg.qr(noise(columns, size, seed=seed + 1))[0],
    )
    return left * torch.arange(1, size + 1).float().pow(-power) @ right.T


def spiked(rows: int, columns: int, size: float) -> torch.Tensor:
    """Noise with one weight that is out of all proportion."""
    matrix = noise(rows, columns)
    matrix[3, 5] = size * math.sqrt(rows)
    return matrix


MATRICES = {
    # Noise has no gap in its spectrum, which is the hardest case for any iteration.
    "noise, square": noise(200, 200),
    "noise, wide": noise(100, 300),
    "noise, tall": noise(700, 100),
    "slow decay": decaying(150, 200, 0.1),
    "fast decay": decaying(200, 150, 1.0),
    "an outlier": spiked(200, 150, 3.0),
    "an outlier that barely stands out": spiked(200, 150, 1.5),
    "rank one": torch.outer(noise(150), noise(120)),
    "rank three": noise(150, 3) @ noise(3, 120),
    "equal rows": torch.ones(60, 1) @ noise(1, 90),
    "the identity": torch.eye(100),
    "few columns": noise(200, 5),
    "one row": noise(1, 70),
    "one number": noise(1, 1),
    "zeros": torch.zeros(50, 60),
    "huge": 1e30 * noise(80, 90),
    "tiny": 1e-30 * noise(80, 90),
    "bfloat16": noise(120, 130).bfloat16(),
    "float16": noise(120, 130).half(),
    "transposed in memory": noise(120, 130).T,
}


def spectrum_of(matrix: torch.Tensor) -> sketches.Spectrum:
    (spectrum,) = singular.spectra([matrix])
    return spectrum


def change_of(before: torch.Tensor, after: torch.Tensor) -> sketches.Change:
    (change,) = singular.changes([after], [spectrum_of(before)])
    return change


@pytest.mark.parametrize("name", MATRICES)
def test_sigma_and_frobenius_against_the_exact_ones(name: str) -> None:
    matrix = MATRICES[name]
    exact = float(torch.linalg.svdvals(matrix.double())[0])
    spectrum = spectrum_of(matrix)
    assert exact * (1 - singular.ACCURACY) <= spectrum.size.sigma <= exact * (1 + 1e-4)
    assert spectrum.size.frobenius == pytest.approx(float(matrix.double().norm()), rel=1e-4)
    if exact:
        stable_rank = float(matrix.double().norm()) ** 2 / exact**2
        assert spectrum.size.stable_rank == pytest.approx(stable_rank, rel=0.03)


@pytest.mark.parametrize("shape", [(64, 192), (128, 128), (300, 60)])
def test_sigma_of_many_noise_matrices(shape: tuple[int, int]) -> None:
    matrices = [noise(*shape, seed=seed) for seed in range(40)]
    together = singular.spectra(matrices)
    for matrix, spectrum in zip(matrices, together, strict=True):
        exact = float(torch.linalg.svdvals(matrix)[0])
        assert exact * (1 - singular.ACCURACY) <= spectrum.size.sigma <= exact * (1 + 1e-4)
    alone = [spectrum_of(matrix).size.sigma for matrix in matrices[:3]]
    assert [spectrum.size.sigma for spectrum in together[:3]] == pytest.approx(alone, rel=1e-5)


def test_sigma_of_every_matrix_of_a_real_model(demo) -> None:
    for name, parameter in demo.named_parameters():
        if parameter.ndim == 2:
            exact = float(torch.linalg.svdvals(parameter.detach())[0])
            estimate = spectrum_of(parameter.detach()).size.sigma
            assert exact * (1 - singular.ACCURACY) <= estimate <= exact * (1 + 1e-4), name


EDITS = {
    "unchanged": lambda matrix: matrix,
    "a little noise": lambda matrix: matrix + 0.01 * matrix.std() * noise(*matrix.shape, seed=7),
    "much noise": lambda matrix: matrix + matrix.std() * noise(*matrix.shape, seed=7),
    "another matrix": lambda matrix: matrix.std() * noise(*matrix.shape, seed=9),
    "scaled": lambda matrix: 3 * matrix,
    "negated": lambda matrix: -matrix,
    "zeroed": lambda matrix: 0 * matrix,
    "huge": lambda matrix: 1e25 * matrix,
    "tiny": lambda matrix: 1e-25 * matrix,
    "a new direction": lambda matrix: matrix + 2 * float(torch.linalg.matrix_norm(matrix, 2)) * _away_from_top(matrix),
    "its top taken away": lambda matrix: matrix - _top(matrix),
    "bfloat16": lambda matrix: matrix.bfloat16(),
}


def _top(matrix: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values[0] * torch.outer(left[:, 0], right[0])


def _away_from_top(matrix: torch.Tensor) -> torch.Tensor:
    """One direction, orthogonal to the leading singular vectors on both sides."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return torch.outer(left[:, -1], right[-1])


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("before", [noise(200, 150), decaying(150, 200, 0.5), noise(40, 20)])
def test_sigma_after_an_edit(before: torch.Tensor, edit: str) -> None:
    after = EDITS[edit](before)
    exact = float(torch.linalg.svdvals(after.double())[0])
    change = change_of(before, after)
    accuracy = singular.ACCURACY + sketches.STILL
    assert exact * (1 - accuracy) <= change.after.sigma <= exact * (1 + accuracy)
    assert change.after.frobenius == pytest.approx(float(after.double().norm()), rel=1e-4)
    relative = float((after.double() - before.double()).norm() / before.double().norm())
    assert change.relative == pytest.approx(
        relative, rel=0.7 if edit in ("a new direction", "its top taken away") else 0.2
    )


def test_the_sketch_tells_an_exact_change_of_single_weights() -> None:
    before = noise(100, 120)
    after = before.clone()
    after[7, 11] += 5
    change = change_of(before, after)
    assert change.relative == pytest.approx(5 / float(before.norm()), rel=1e-4)
    assert [place for place, row in enumerate(change.rows) if row > 0.1] == [7]


def test_the_sketch_is_right_on_average() -> None:
    before = noise(60, 80)
    errors = []
    for seed in range(60):
        change = torch.outer(noise(60, seed=seed), noise(80, seed=100 + seed))
        estimate = change_of(before, before + change).relative
        errors.append(estimate / float(change.norm() / before.norm()))
    # For changes of rank one, the worst case, the standard deviation is 25 %.
    assert 0.9 < sum(errors) / len(errors) < 1.1
    assert 0.15 < float(torch.tensor(errors).std()) < 0.35


@pytest.mark.parametrize("name", MATRICES)
def test_leading_values_are_at_most_a_tenth_too_low_and_draw_on_no_randomness_but_their_own(name: str) -> None:
    matrix = MATRICES[name]
    state = torch.get_rng_state()
    found = torch.tensor(singular.leading_values(matrix, 20), dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    exact = torch.linalg.svdvals(matrix.double())[:20]
    assert found.shape == exact.shape
    tiny = 1e-4 * float(exact[0])
    assert bool((found >= 0.9 * exact - tiny).all())
    assert bool((found <= exact * (1 + 1e-4) + tiny).all())
    assert singular.leading_values(matrix, 20) == found.tolist()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_spectrum(value: float) -> None:
    sound, broken = noise(50, 60), noise(50, 60)
    broken[49, 59] = value
    before = singular.spectra([sound, broken, sound])
    assert [entry is None for entry in before] == [False, True, False]
    assert [entry is None for entry in singular.changes([broken, sound], [before[0]] * 2)] == [True, False]


# -- harmless ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unedited_model_passes_without_a_warning(build, dtype) -> None:
    result = judge(build().to(dtype))
    assert (result["passed"], result["action"], result["warnings"]) == (True, "continue", [])
    assert result["metrics"]["suspects"] == []
    assert result["metrics"]["not_measured"] == []


@pytest.mark.parametrize(
    "plan",
    [
        Plan(8, scope="all"),
        Plan(8, group_size=32, scope="all"),
        Plan(8, symmetric=False, scope="all"),
        Plan(6, scope="all"),
    ],
)
def test_rounding_to_8_and_6_bits_is_no_cause_for_warning(demo, plan: Plan) -> None:
    result = judge(demo, lambda model: quantize_model(model, plan))
    assert (result["action"], result["warnings"]) == ("continue", [])
    assert len(result["metrics"]["suspects"]) == 10


def test_a_round_trip_through_half_precision(demo) -> None:
    def through(model):
        for parameter in model.parameters():
            parameter.copy_(parameter.half())

    assert judge(demo, through)["action"] == "continue"


@pytest.mark.parametrize("build", BUILDERS)
def test_weights_that_a_comparison_found_equal_are_counted_and_not_looked_at_again(build) -> None:
    model = build()
    modules = [{"name": target.name, "change": "unchanged"} for target in find_weights(model)]

    def scale(edited: nn.Module) -> None:
        """Damage that would show, were the weights looked at."""
        for target in find_weights(edited):
            target.parameter.mul_(3)

    told = judge(model, scale, context={"edit": {"modules": modules}})["metrics"]
    assert told["families"] == judge(model)["metrics"]["families"]
    assert told["suspects"] == []
    assert judge(model, scale)["action"] == "warn"


# -- damage ------------------------------------------------------------------------------------------------------------

DAMAGES = {
    "zeroed": lambda weight: weight.zero_(),
    "negated": lambda weight: weight.neg_(),
    "scaled up": lambda weight: weight.mul_(1.3),
    "scaled down": lambda weight: weight.mul_(0.7),
    "shuffled": lambda weight: weight.copy_(weight.flip(0)),
    "transposed": lambda weight: weight.copy_(weight.T.clone().reshape(weight.shape)),
    "truncated": lambda weight: weight[len(weight) // 2 :].zero_(),
    "an outlier": lambda weight: weight[5, 7].fill_(200 * weight.std()),
    "a flipped bit": lambda weight: weight[5, 7].fill_(1e36),
    "noise": lambda weight: weight.copy_(noise(*weight.shape) * weight.std()),
    "rows": lambda weight: weight.index_fill_(0, weight.norm(dim=1).topk(4).indices, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("module", ["model.layers.2.mlp.down_proj", "model.layers.0.self_attn.v_proj"])
def test_damage_to_one_matrix_warns_and_names_it(demo, module: str, damage: str) -> None:
    result = judge(demo, on(module, DAMAGES[damage]))
    assert (result["passed"], result["action"]) == (True, "warn")
    assert [suspect["module"] for suspect in result["metrics"]["suspects"]] == [module]
    assert module in result["message"]


@pytest.mark.parametrize("plan", [Plan(2, scope="all"), Plan(3, scope="all"), Plan(4, per_channel=False, scope="all")])
def test_rounding_to_very_few_levels_warns(demo, plan: Plan) -> None:
    assert judge(demo, lambda model: quantize_model(model, plan))["action"] == "warn"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", BUILDERS)
def test_what_is_not_finite_aborts(build, value: float) -> None:
    model = build()
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    name = names[len(names) // 2]
    result = judge(model, lambda model: model.get_parameter(name).view(-1)[-1:].fill_(value))
    assert (result["passed"], result["action"]) == (False, "abort")
    assert result["metrics"]["suspects"][0]["module"] == name.removesuffix(".weight")


def test_what_was_not_finite_before_is_not_the_edits(demo) -> None:
    broken = copy.deepcopy(demo)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    result = judge(broken)
    assert (result["action"], result["metrics"]["not_measured"]) == ("continue", ["model.layers.0.mlp.up_proj"])


def test_replaced_rows_of_an_embedding_that_its_norm_does_not_show(demo) -> None:
    def damage(model):
        weight = model.get_input_embeddings().weight
        weight[100:104] = noise(4, weight.shape[1]) * weight.std()

    result = judge(demo, damage)
    assert (result["action"], "4 rows replaced" in result["message"]) == ("warn", True)
    assert result["metrics"]["suspects"][0]["module"] == "model.embed_tokens"
    assert judge(demo, damage, row_cap=10)["action"] == "continue"


SHAPES = [(2048, 1024), (1024, 2048), (300, 200), (64, 512), (40, 16)]


@pytest.mark.parametrize(("line", "axis"), [("row", 0), ("column", 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_zeroed_row_or_column_is_enough_whichever_it_is(shape, line: str, axis: int) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(noise(*shape))
    model = nn.Sequential(layer)
    guard = SpectralGuard()
    guard.prepare(model, None, None, {})
    for place in torch.randperm(shape[axis], generator=torch.Generator().manual_seed(1))[:15].tolist():
        numbers = layer.weight.detach().select(axis, place)
        kept = numbers.clone()
        numbers.zero_()
        result = guard.validate(model, None, {})
        assert result["action"] == "warn", place
        assert result["warnings"][-1] == f"1 {line} replaced in 1 of 1 matrices, most of them in 0"
        numbers.copy_(kept)
    assert guard.validate(model, None, {})["action"] == "continue"


@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(8, per_channel=False), Scheme(4), Scheme(4, group_size=8)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_replaces_no_row_and_no_column(shape, scheme: Scheme) -> None:
    weight = noise(*shape)
    [before] = singular.spectra([weight])
    fake_quantize_(weight, scheme)
    [change] = singular.changes([weight], [before])
    assert max(change.rows.max(), change.columns.max()) < 0.5


def test_numbers_that_rounding_may_lose_are_no_columns() -> None:
    """A matrix of one row: each of its columns is one number, of which rounding makes zeros."""
    model = nn.Sequential(nn.Linear(512, 1, bias=False))
    result = judge(model, lambda model: fake_quantize_(model[0].weight, Scheme(4)))
    assert "replaced" not in result["message"]


@pytest.mark.parametrize(
    ("build", "weight"),
    [
        (architectures.mixtral, "model.layers.1.mlp.experts.down_proj"),
        (architectures.gpt_oss, "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_experts_are_measured_one_by_one(build, weight: str) -> None:
    result = judge(build(), lambda model: model.get_parameter(weight)[2].mul_(1.5))
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("warn", weight)
    assert f"{weight}[2]" in result["message"]
    assert result["metrics"]["families"]["ffn"]["beyond_cap"] == 1
    assert result["metrics"]["families"]["ffn"]["matrices"] == 16


def test_a_family_that_drifts_as_a_whole(demo) -> None:
    def damage(model):
        for layer in model.model.layers:
            for projection in layer.mlp.children():
                if isinstance(projection, nn.Linear):
                    projection.weight.mul_(1.15)

    result = judge(demo, damage)
    assert result["warnings"] == ["the spectral norms of ffn have drifted by 15.0%"]
    assert judge(demo, damage, deadband=0.2)["action"] == "continue"
    one = judge(demo, on("model.layers.1.mlp.up_proj", lambda weight: weight.mul_(1.15)))
    assert one["action"] == "continue"


@pytest.mark.parametrize("bits", [8, 2])
def test_a_streamed_weight_is_read_once_a_side(demo, bits: int) -> None:
    read: list[str] = []

    def edited(name: str, weight: torch.Tensor) -> torch.Tensor:
        read.append(name)
        if guard_is_ready and weight.ndim == 2:
            fake_quantize_(weight, Scheme(bits))
        return weight

    model = HF_Causal_Adapter().load_model(str(DEMO / "checkpoint"), "cpu", dtype="float32", stream=True)
    model.streaming.edit, guard, guard_is_ready = edited, SpectralGuard(), False
    matrices = sorted(name for name, parameter in demo.named_parameters() if parameter.ndim == 2)
    guard_is_ready = guard.prepare(model, None, None, {})["ready"]
    assert sorted(read) == matrices
    read.clear()
    guard.validate(model, None, {})
    assert sorted(read) == matrices


# -- another model object, and options -----------------------------------------------------------------------------------


def test_the_same_numbers_every_time(demo) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["noise"])
    assert judge(demo, damage) == judge(demo, damage)


def test_it_needs_prepare(demo) -> None:
    assert SpectralGuard().validate(demo, None, {})["action"] == "abort"


def test_a_model_without_matrices_is_not_measured() -> None:
    result = judge(nn.LayerNorm(4))
    assert (result["passed"], result["action"], result["metrics"]["measured"]) == (False, "continue", False)
    assert result["message"].startswith("not measured: ")


def test_a_weight_of_another_shape_is_not_measured(demo) -> None:
    result = judge(demo, lambda model: setattr(model.model.layers[0].mlp, "up_proj", nn.Linear(128, 50)))
    assert result["metrics"]["not_measured"] == ["model.layers.0.mlp.up_proj"]


def test_scope(demo) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["zeroed"])
    assert [judge(demo, damage, scope=scope)["action"] for scope in ("ffn", "attn", "all")] == [
        "warn",
        "continue",
        "warn",
    ]


def test_caps(demo) -> None:
    damage = on("model.layers.2.mlp.down_proj", DAMAGES["scaled up"])
    assert judge(demo, damage, family_caps={"ffn": 0.4})["action"] == "continue"
    assert judge(demo, damage, family_caps={"attn": 0.4})["action"] == "warn"
    assert judge(demo, damage, max_caps=1)["action"] == "continue"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple_testing": {"method": "bh"}}, "multiple_testing: changes are measured, not tested; max_caps"),
        ({"max_spectral_norm": None}, "max_spectral_norm: .*family_caps"),
        ({"correction_enabled": True}, "correction_enabled: the guard never changes a model"),
        ({"min_beta": 0.5}, "min_beta: .*family_caps"),
        ({"contraction": 0.9}, "contraction: .*deadband"),
        ({"deadbnd": 0.1}, "deadbnd: the guard has no such option; did you mean 'deadband'"),
        ({"scope": "both"}, "scope: 'both' is not one of ffn, attn, all; 'all'"),
        ({"scope": "ffm"}, "did you mean 'ffn'"),
        ({"family_caps": {"ffn": {"kappa": 3.8}}}, "family_caps.ffn: .*is not a number from 0 to 2"),
        ({"family_caps": {"ffn": 3.8}}, "family_caps.ffn: 3.8 is not a number from 0 to 2"),
        ({"family_caps": {"fnn": 0.1}}, "no family 'fnn'; did you mean 'ffn'"),
        ({"family_caps": 0.1}, "family_caps: 0.1 is not a mapping"),
        ({"sigma_quantile": 95}, "sigma_quantile: 95 is not a number from 0 to 1"),
        ({"max_caps": -1}, "max_caps: -1 is not a whole number"),
        ({"max_caps": True}, "max_caps: True is not a whole number"),
        ({"deadband": "0.1"}, "deadband: '0.1' is not a number"),
    ],
)
def test_options_that_are_refused(options, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SpectralGuard(**options)
