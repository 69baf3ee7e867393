"""Which weights a plan selects: real models of each architecture, tied and untied, and what is said when it is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from invarlock.core.errors import UsageError
from invarlock.quantization import Plan, WeightLayout, find_weights, quantize_model, select_targets
from invarlock.testing import architectures


def selected(model: nn.Module, **plan: Any) -> list[str]:
    return [target.name for target in select_targets(model, Plan(**plan))]


def per_layer(prefix: str, *names: str, layers: int = 2) -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(layers) for name in names]


ATTENTION = {
    architectures.llama: per_layer("model.layers", *(f"self_attn.{name}_proj" for name in "qkvo")),
    architectures.gpt2: per_layer("transformer.h", "attn.c_attn", "attn.c_proj"),
    architectures.bert: per_layer(
        "bert.encoder.layer",
        *(f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")),
    ),
    architectures.t5: per_layer("encoder.block", *(f"layer.0.SelfAttention.{name}" for name in "qkvo"))
    + per_layer(
        "decoder.block",
        *(
            f"layer.{index}.{kind}.{name}"
            for index, kind in enumerate(("SelfAttention", "EncDecAttention"))
            for name in "qkvo"
        ),
    ),
    architectures.mixtral: per_layer("model.layers", *(f"self_attn.{name}_proj" for name in "qkvo")),
    architectures.gpt_oss: per_layer("model.layers", *(f"self_attn.{name}_proj" for name in "qkvo")),
    architectures.opt: per_layer(
        "model.decoder.layers", *(f"self_attn.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
    ),
}
FFN = {
    architectures.llama: per_layer("model.layers", *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))),
    architectures.gpt2: per_layer("transformer.h", "mlp.c_fc", "mlp.c_proj"),
    architectures.bert: per_layer("bert.encoder.layer", "intermediate.dense", "output.dense"),
    architectures.t5: per_layer("encoder.block", "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")
    + per_layer("decoder.block", "layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
    architectures.mixtral: per_layer("model.layers", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    architectures.gpt_oss: per_layer("model.layers", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    architectures.opt: per_layer("model.decoder.layers", "fc1", "fc2"),
}
EMBEDDING = {
    architectures.llama: "model.embed_tokens",
    architectures.gpt2: "transformer.wte",
    architectures.bert: "bert.embeddings.word_embeddings",
    architectures.t5: "shared",
    architectures.mixtral: "model.embed_tokens",
    architectures.gpt_oss: "model.embed_tokens",
    architectures.opt: "model.decoder.embed_tokens",
}
each_architecture = pytest.mark.parametrize("build", ATTENTION, ids=lambda build: build.__name__)
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@each_architecture
@tied_or_not
def test_scopes(build: Callable[..., nn.Module], tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    assert selected(model, scope="attn") == ATTENTION[build]
    assert selected(model) == FFN[build]
    assert sorted(selected(model, scope="all")) == sorted(ATTENTION[build] + FFN[build])


@each_architecture
@tied_or_not
def test_embedding_and_head_are_touched_only_by_name_and_then_once(build: Callable[..., nn.Module], tied: bool) -> None:
    model = build(tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = tied or build is architectures.t5  # which transformers ties whatever its config says
    before = embedding.weight.detach().clone(), head.weight.detach().clone()
    quantize_model(model, Plan(scope="all"))
    assert torch.equal(embedding.weight, before[0])
    assert torch.equal(head.weight, before[1])

    head_name = next(name for name, module in model.named_modules() if module is head)
    both = selected(model, include=(EMBEDDING[build], head_name))
    assert both == ([EMBEDDING[build]] if tied else [EMBEDDING[build], head_name])
    # By either name, of the module or of the parameter; a tie holds whatever it is called.
    for pattern in (head_name, f"{head_name}.weight"):
        assert selected(model, include=(pattern,)) == ([EMBEDDING[build]] if tied else [head_name])

    quantize_model(model, Plan(bitwidth=4, include=(head_name,)))
    assert not torch.equal(head.weight, before[1])
    assert (embedding.weight is head.weight) is tied
    assert torch.equal(embedding.weight, before[0]) is not tied


def test_a_tie_by_memory_counts_like_a_tie_by_object() -> None:
    model = architectures.llama()
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    assert selected(model, include=("lm_head", "*embed*")) == ["model.embed_tokens"]


def test_a_weight_of_a_block_that_is_tied_to_the_embedding_is_an_embedding() -> None:
    model = architectures.llama(intermediate_size=architectures.VOCABULARY)
    model.model.layers[1].mlp.up_proj.weight = model.model.embed_tokens.weight
    assert "model.layers.1.mlp.up_proj" not in selected(model)
    assert "model.embed_tokens" not in selected(model)


def test_a_layer_that_is_used_twice_is_one() -> None:
    model = architectures.llama()
    model.model.layers[1] = model.model.layers[0]
    assert selected(model) == [name for name in FFN[architectures.llama] if ".0." in name]
    assert selected(model, include=("*.1.mlp.up_proj",)) == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("build", "router"),
    [(architectures.mixtral, "model.layers.0.mlp.gate"), (architectures.gpt_oss, "model.layers.0.mlp.router")],
)
def test_a_router_is_touched_only_by_name(build: Callable[..., nn.Module], router: str) -> None:
    assert router not in selected(build(), scope="all")
    assert selected(build(), include=(router,)) == [router]


def test_what_a_weight_is_for() -> None:
    roles = {target.name: target.role for target in find_weights(architectures.bert())}
    assert roles["bert.embeddings.position_embeddings"] == "embedding"
    assert roles["bert.embeddings.word_embeddings"] == "embedding"
    assert roles["cls.predictions.transform.dense"] == "other"
    assert {target.role.value for target in find_weights(architectures.mixtral())} == {
        "embedding",
        "attention",
        "ffn",
        "router",
        "head",
    }
    assert next(target for target in find_weights(architectures.llama()) if target.name == "lm_head").role == "head"


@pytest.mark.parametrize(
    ("build", "name", "layout"),
    [
        (architectures.gpt2, "transformer.h.0.attn.c_attn", WeightLayout.IN_OUT),
        (architectures.bert, "bert.encoder.layer.0.output.dense", WeightLayout.OUT_IN),
        (architectures.mixtral, "model.layers.0.mlp.experts.down_proj", WeightLayout.OUT_IN),
        (architectures.gpt_oss, "model.layers.0.mlp.experts.down_proj", WeightLayout.IN_OUT),
    ],
)
def test_which_axis_is_which(build: Callable[..., nn.Module], name: str, layout: WeightLayout) -> None:
    (target,) = select_targets(build(), Plan(scope="all", include=(name,)))
    assert target.layout is layout


class Experts(nn.Module):
    """Fused experts that do not say how they are stored, as Llama 4 has them."""

    def __init__(self, hidden_size: int, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        for index, shape in enumerate(shapes):
            self.register_parameter(f"weight_{index}", nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [([(4, 8, 12), (4, 6, 8)], WeightLayout.IN_OUT), ([(4, 12, 8), (4, 8, 6)], WeightLayout.OUT_IN)],
)
def test_fused_experts_that_do_not_say_how_they_are_stored(shapes: list[tuple[int, ...]], layout: WeightLayout) -> None:
    assert [target.layout for target in find_weights(Experts(8, *shapes))] == [layout, layout]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp_like = nn.Linear(8, 8)


class Sparse(nn.Module):
    """Experts of old: a list of them, a shared one, a gate for all and one for the shared."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.shared_mlp = SharedMLP()
        self.shared_gate = nn.Linear(8, 1)


class SharedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 4)


class AttentionBlock(nn.Module):
    """A block whose own name says attention, which makes nothing of its feed-forward attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = Attention()
        self.attention_free = nn.Linear(8, 8)
        self.sparse = Sparse()
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_mlp_router = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([AttentionBlock()])
        self.native = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)])


def test_paths_do_not_decide_modules_do() -> None:
    roles = {target.name: target.role.value for target in find_weights(Model())}
    assert roles == {
        "attention_mlp_router": "other",
        "blocks.0.mixing.mlp_like": "attention",
        "blocks.0.attention_free": "ffn",
        "blocks.0.sparse.gate": "router",
        **{f"blocks.0.sparse.experts.{index}": "ffn" for index in range(4)},
        "blocks.0.sparse.shared_mlp.up": "ffn",
        "blocks.0.sparse.shared_gate": "router",
        "blocks.0.conv": "ffn",
        "native.0.self_attn.in_proj_weight": "attention",
        "native.0.self_attn.out_proj": "attention",
        "native.0.linear1": "ffn",
        "native.0.linear2": "ffn",
    }


def test_patterns() -> None:
    model = architectures.llama()
    assert selected(model, include=("*.0.mlp.*",)) == [
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert selected(model, include=("re:.*(up|down)_proj",), exclude=("*.1.*",)) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert selected(model, include=("*.down_proj.weight",), max_modules=1) == ["model.layers.0.mlp.down_proj"]
    # Attention and feed-forward must be in the scope as well; what has no scope is taken because it is named.
    assert selected(model, include=("re:.*(q|up)_proj", "lm_head")) == [
        *per_layer("model.layers", "mlp.up_proj"),
        "lm_head",
    ]
    assert selected(model, exclude=("re:.*gate.*",), max_modules=3)[-1] == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            {"include": ("*.gate_prj",)},
            r"`include` holds '\*\.gate_prj', which matches no weight .* mean 'gate_proj'\?",
        ),
        ({"exclude": ("lm_haed",)}, r"`exclude` holds 'lm_haed', .* mean 'lm_head'\?"),
        ({"include": ("re:gate_proj",)}, r"`include` holds 're:gate_proj', which matches no weight"),
        (
            {"include": ("*.up_proj", "*.q_proj")},
            r"^`include` holds '\*\.q_proj', which matches only weights outside of `scope` 'ffn' "
            r"\(as model\.layers\.0\.self_attn\.q_proj, attention\); set `scope` to 'all', or remove",
        ),
        (
            {"include": ("lm_head", "*.down_proj"), "scope": "attn"},
            r"'\*\.down_proj', which matches only weights outside of `scope` 'attn' .*, ffn\)",
        ),
        (
            {"include": ("*.up_proj",), "exclude": ("*up*",)},
            r"`scope` 'ffn', `include` \['\*\.up_proj'\], `exclude` \['\*up\*'\] selects no "
            r"weight; the model has 8 attention \(as model\.layers\.0\.self_attn\.q_proj\), 6 ffn \(as model\.layers\.0\.mlp",
        ),
        ({"exclude": ("*",)}, "selects no weight"),
    ],
)
def test_a_plan_or_a_pattern_that_selects_nothing(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        selected(architectures.llama(), **plan)
    assert "\n" not in str(error.value)


def test_a_model_without_weights() -> None:
    with pytest.raises(UsageError, match="the model has none at all"):
        selected(nn.ReLU())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scope": "bogus"}, r"`scope` is 'bogus'; known are ffn, attn, all$"),
        ({"scope": "attention"}, r"mean 'attn'\?"),
        ({"max_modules": 0}, r"`max_modules` is 0"),
        ({"include": "lm_head"}, r"set a list of patterns: \['lm_head'\]"),
        ({"exclude": (3,)}, r"`exclude` holds 3"),
        ({"include": ("re:(",)}, r"'re:\(', which is no regular expression"),
    ],
)
def test_a_plan_that_cannot_be(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Plan(**values)
