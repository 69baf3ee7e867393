"""The guard ``invariants``: passes what is sound, catches and names what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from invarlock.testing import architectures
from plugins_builtin.guards.invariants import InvariantsGuard

BUILDERS = architectures.ARCHITECTURES.values()


def judge(model: nn.Module, damage=None, context=None):
    guard = InvariantsGuard()
    assert guard.prepare(model, None, None, {})["ready"] is True
    if damage:
        with torch.no_grad():
            damage(model)
    return guard.validate(model, None, context or {})


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_unedited_model_passes_without_a_warning(build, dtype) -> None:
    result = judge(build().to(dtype), context={"vocabulary": 96})
    assert (result["passed"], result["action"], result["warnings"]) == (True, "continue", [])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_aborts_wherever_it_is(build, value) -> None:
    for number in range(len([*build().parameters()])):
        model = build()
        name, parameter = [*model.named_parameters()][number]
        result = judge(model, lambda _, parameter=parameter: parameter.view(-1)[-1:].fill_(value))
        assert result["action"] == "abort"
        assert name in result["message"]


@pytest.mark.parametrize("build", BUILDERS)
def test_every_norm_is_watched(build) -> None:
    norms = [name for name, module in build().named_modules() if "norm" in type(module).__name__.lower()]
    assert norms
    for name in norms:
        zeroed = judge(build(), lambda model, name=name: model.get_submodule(name).weight.zero_())
        assert zeroed["action"] == "rollback"
        assert f"norm weight zeroed {name}.weight" in zeroed["message"]
        parent, _, last = name.rpartition(".")
        gone = judge(
            build(), lambda model, parent=parent, last=last: setattr(model.get_submodule(parent), last, nn.Identity())
        )
        assert gone["action"] == "abort"
        assert name in gone["message"]


def test_shapes_names_and_types() -> None:
    def cut(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight[:50])

    def shorten(model):
        embedding = model.model.embed_tokens
        embedding.weight = nn.Parameter(embedding.weight[:50])

    assert judge(architectures.llama(), cut)["action"] == "abort"
    assert "50 embedding rows for a vocabulary of 96" in " ".join(
        judge(architectures.llama(), shorten, {"vocabulary": 96})["metrics"]["abort"]
    )
    added = judge(architectures.llama(), lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))))
    assert (added["action"], "new more" in added["message"]) == ("abort", True)
    buffer = judge(architectures.llama(), lambda model: model.model.rotary_emb.inv_freq.fill_(float("nan")))
    assert (buffer["action"], "inv_freq" in buffer["message"]) == ("abort", True)
    retyped = judge(architectures.llama(), lambda model: model.lm_head.to(torch.bfloat16))
    assert (retyped["passed"], retyped["action"]) == (True, "continue")


def test_every_finding_names_its_module_in_the_order_of_the_findings() -> None:
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(300))

    def damage(model):
        model[7].weight = nn.Parameter(torch.randn(2, 3))
        for layer in (*model[100:], *model[:7]):
            layer.bias[0] = float("nan")
        model[8].weight[1] = 0

    result = judge(model, damage)
    broken = sorted(f"{number}.bias" for number in (*range(100, 300), *range(7)))
    expected = ["7", *(name.removesuffix(".bias") for name in broken), "8"]
    assert [suspect["module"] for suspect in result["metrics"]["suspects"]] == expected
    assert result["metrics"]["suspects"][0]["evidence"] == "shape of 7.weight: (3, 3) became (2, 3)"


def test_ties() -> None:
    def copy(model):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())

    def differ(model):
        copy(model)
        model.lm_head.weight[0, 0] += 1

    def tie(model):
        model.lm_head.weight = model.model.embed_tokens.weight

    def own(model):
        differ(model)
        model.config.tie_word_embeddings = False

    measured = {"edited": {"kind": "perplexity", "value": 1.0}}
    assert judge(architectures.gpt2(), copy)["action"] == "continue", "the same model"
    assert judge(architectures.gpt2(), differ)["action"] == "rollback"
    assert judge(architectures.gpt2(), differ, measured)["action"] == "rollback", "loaders will tie it"
    assert judge(architectures.gpt2(), own)["action"] == "rollback"
    assert judge(architectures.gpt2(), own, measured)["action"] == "continue", "outputs decide"
    assert judge(architectures.llama(), tie)["action"] == "rollback"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_rows_and_columns_that_became_constant_warn(axis: int, value: float) -> None:
    def damage(model):
        model.model.layers[1].mlp.up_proj.weight.select(axis, 2).fill_(value)

    result = judge(architectures.llama(), damage)
    assert (result["passed"], result["action"]) == (True, "warn")
    assert "model.layers.1.mlp.up_proj.weight" in result["message"]


def test_an_expert_is_looked_into() -> None:
    result = judge(architectures.mixtral(), lambda model: model.model.layers[0].mlp.experts.down_proj[2, 5].zero_())
    assert (result["action"], "experts.down_proj" in result["message"]) == ("warn", True)


def test_a_vector_that_became_zero_is_named() -> None:
    result = judge(nn.ModuleList([nn.Linear(3, 3)]), lambda model: model[0].bias.zero_())
    assert (result["action"], result["message"]) == ("warn", "all zero: 0.bias")


def test_what_the_baseline_already_had_is_not_the_edits() -> None:
    model = architectures.llama()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
        model.model.layers[0].mlp.up_proj.weight[1] = 0
    result = judge(model)
    assert (result["passed"], result["action"]) == (True, "continue")
