"""The guard ``reconstruction``: passes what leaves the model's function, prices damage in nats, and names its place."""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref

import pytest
import torch
from conftest import DEMO
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.core.errors import UsageError
from invarlock.evaluation.taps import attached
from invarlock.models.fingerprint import Fingerprint
from invarlock.models.structure import find_blocks
from invarlock.quantization.model import quantize_model
from invarlock.quantization.scheme import Plan
from invarlock.testing import architectures
from plugins_builtin.guards.reconstruction import ReconstructionGuard
from plugins_builtin.guards.reconstruction.calls import Cut, find_parts
from plugins_builtin.guards.reconstruction.errors import _tempered

BUILDERS = architectures.ARCHITECTURES.values()
MEASURED = {"edited": {"ratio": 1.0}}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are so small that threads only wait for each other, on a busy machine for seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained():
    """The demo model; a test gets a copy."""
    return AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    lines = (DEMO / "text.jsonl").read_text().splitlines()[:6]
    tokens = [token for line in lines for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    return torch.tensor(tokens[: 18 * 256]).view(18, 256)


def passing(model: nn.Module, windows: torch.Tensor) -> None:
    given = {"input_ids": windows, "attention_mask": torch.ones_like(windows)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = windows
    with torch.no_grad():
        model(**given)


def prepared(model: nn.Module, windows: torch.Tensor | None = None, **options) -> ReconstructionGuard:
    """A guard as the pipeline prepares it: with windows, it sees them pass; without, its taps are never called."""
    guard = ReconstructionGuard(**options)
    taps = guard.observe(model, None, {})
    if windows is not None:
        with attached(model, taps):
            passing(model, windows)
    assert guard.prepare(model, None, None if windows is None else [{"input_ids": windows}], {})["ready"] is True
    return guard


def judge(model: nn.Module, damage, windows=None, context=None):
    guard = prepared(model, windows)
    with torch.no_grad():
        damage(model)
    return guard.validate(model, None, context or {})


# -- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windows", [None, (3, 48), (1, 100)], ids=str)
def test_the_unedited_model_passes_with_a_score_of_zero(build, dtype, windows) -> None:
    model = build().to(dtype)
    before = Fingerprint.of(model)
    guard = prepared(model, None if windows is None else torch.randint(96, windows))
    result = guard.validate(model, None, {})
    assert (result["passed"], result["action"], result["warnings"]) == (True, "continue", [])
    assert result["metrics"]["score"] == 0.0
    assert result["metrics"]["suspects"] == []
    assert result["metrics"]["not_measured"] == {}
    assert not Fingerprint.of(model).changed_since(before)
    assert not any(parameter.grad is not None or not parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_the_baseline_may_be_gone_when_another_model_is_judged(build) -> None:
    model, subject = build(), build()
    gone = [weakref.ref(entry) for entry in (*model.modules(), *model.parameters())]
    guard = prepared(model, torch.randint(96, (2, 40)))
    del model
    gc.collect()
    assert not any(entry() is not None for entry in gone)
    assert guard.validate(subject, None, {})["metrics"]["score"] == 0.0


def permute_units(model):
    for layer in model.model.layers:
        order = torch.randperm(layer.mlp.up_proj.weight.shape[0])
        for projection in (layer.mlp.up_proj, layer.mlp.gate_proj):
            projection.weight.copy_(projection.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def permute_heads(model):
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    for layer in model.model.layers:
        order = torch.randperm(heads)
        for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight):
            weight.copy_(weight.view(heads, -1, weight.shape[1])[order].reshape(weight.shape))
        weight = layer.self_attn.o_proj.weight
        weight.copy_(weight.view(weight.shape[0], heads, -1)[:, order].reshape(weight.shape))
        assert size


def readers(layer):
    """Each norm of a layer with the projections that read what it puts out."""
    attention, mlp = layer.self_attn, layer.mlp
    yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)
    yield layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)


def rescale(model):
    for layer in model.model.layers:
        for norm, projections in readers(layer):
            norm.weight.mul_(3)
            for projection in projections:
                projection.weight.div_(3)
        layer.mlp.up_proj.weight.neg_()
        layer.mlp.down_proj.weight.neg_()


def fold_norms(model):
    for layer in model.model.layers:
        for norm, projections in readers(layer):
            for projection in projections:
                projection.weight.mul_(norm.weight)
            norm.weight.fill_(1)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * model.model.norm.weight)
    model.model.norm.weight.fill_(1)


def rotate(model):
    fold_norms(model)
    size = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].float()
    for layer in model.model.layers:
        for _, projections in readers(layer):
            for projection in projections:
                projection.weight.copy_(projection.weight @ rotation)
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.copy_(rotation.T @ projection.weight)
    for module in (model.model.embed_tokens, model.lm_head):
        module.weight.copy_(module.weight @ rotation)


def untie(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


@pytest.mark.parametrize("edit", [permute_units, permute_heads, rescale, fold_norms, rotate, untie])
@pytest.mark.parametrize("has_windows", [True, False])
def test_what_leaves_the_function_scores_nothing(edit, has_windows, trained, text) -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(trained)
    result = judge(model, edit, text[:2] if has_windows else None)
    assert result["action"] == "continue"
    assert result["metrics"]["score"] < 1e-6
    assert result["metrics"]["rotated"] is (edit is rotate)


def quantize(bits, **scheme):
    return lambda model: quantize_model(model, Plan(bits, **scheme, scope="all"), measure=False)


def add_noise(share):
    def edit(model):
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.add_(share * parameter.square().mean().sqrt() * torch.randn_like(parameter))

    return edit


def round_to_half(model):
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


@pytest.mark.parametrize(
    "edit", [quantize(8), quantize(8, group_size=32), quantize(8, per_channel=False), add_noise(0.01), round_to_half]
)
def test_small_errors_pass_on_weights_alone(edit, trained) -> None:
    result = judge(copy.deepcopy(trained), edit)
    assert (result["action"], result["warnings"]) == ("continue", [])
    assert result["metrics"]["score"] < math.log(1.01)


def test_a_subject_of_another_data_type_is_compared(trained, text) -> None:
    guard = prepared(copy.deepcopy(trained), text[:1])
    result = guard.validate(copy.deepcopy(trained).to(torch.bfloat16), None, {})
    assert result["action"] == "continue"
    assert 0 < result["metrics"]["score"] < 1e-3


# -- what does not -----------------------------------------------------------------------------------------------------


def log_loss(model, windows):
    with torch.no_grad():
        logits = model(input_ids=windows).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    "edit", [quantize(4), quantize(3), quantize(2), quantize(4, per_channel=False), add_noise(0.2)]
)
def test_the_score_estimates_the_rise_of_the_loss_to_a_factor_of_two(edit, trained, text) -> None:
    model = copy.deepcopy(trained)
    guards = [prepared(model, text[number : number + 1], seed=number) for number in range(2)]
    before = log_loss(model, text[2:])
    with torch.no_grad():
        edit(model)
    rise = log_loss(model, text[2:]) - before
    for guard in guards:
        assert rise / 2 < guard.validate(model, None, {})["metrics"]["score"] < rise * 2


def transpose(weight):
    weight.copy_(weight.T.clone())


def shuffle(weight):
    weight.copy_(weight[torch.randperm(len(weight))])


def prune(weight):
    weight.masked_fill_(weight.abs() < weight.abs().flatten().quantile(0.9), 0)


def scale_the_wrong_axis(weight):
    scales = weight.abs().amax(1, keepdim=True)
    levels = (weight / scales * 127).round()
    weight.copy_(levels * weight.abs().amax(0)[: weight.shape[1]] / 127 * 4)


def spike(weight):
    weight.view(-1)[:: weight.numel() // 20] = 60 * weight.abs().max()


def corrupt_rows(weight):
    weight[100:160].add_(3 * weight.std() * torch.randn_like(weight[100:160]))


def swap_halves(weight):
    weight.copy_(weight.roll(len(weight) // 2, 0))


DAMAGES = [
    ("model.layers.0.mlp.up_proj", torch.Tensor.zero_),
    ("model.layers.1.self_attn.v_proj", torch.Tensor.zero_),
    ("model.layers.2.mlp.down_proj", torch.Tensor.neg_),
    ("model.layers.3.self_attn.o_proj", lambda weight: weight.mul_(3)),
    ("model.layers.0.self_attn.q_proj", transpose),
    ("model.layers.1.mlp.gate_proj", shuffle),
    ("model.layers.3.mlp.up_proj", lambda weight: weight.add_(2 * weight.std() * torch.randn_like(weight))),
    ("model.layers.3.mlp.down_proj", prune),
    ("model.layers.1.self_attn.o_proj", scale_the_wrong_axis),
    ("model.layers.2.mlp.gate_proj", spike),
    ("model.layers.0.self_attn.k_proj", swap_halves),
    ("model.layers.2.input_layernorm", torch.Tensor.zero_),
    ("model.layers.0.post_attention_layernorm", lambda weight: weight.mul_(3)),
    ("model.norm", lambda weight: weight.mul_(2)),
    ("model.embed_tokens", corrupt_rows),
    ("model.embed_tokens", torch.Tensor.neg_),
    ("model.embed_tokens", shuffle),
]


@pytest.mark.parametrize(("module", "damage"), DAMAGES)
def test_damage_is_caught_on_weights_alone_and_its_module_named_first(module, damage, trained) -> None:
    torch.manual_seed(0)
    model = copy.deepcopy(trained)
    guard = prepared(model)
    with torch.no_grad():
        damage(model.get_submodule(module).weight)
    result = guard.validate(model, None, {})
    assert (result["passed"], result["action"]) == (False, "rollback")
    assert result["metrics"]["suspects"][0]["module"] == module
    assert module in result["message"]
    # Where outputs were measured they decide.
    result = guard.validate(model, None, MEASURED)
    assert (result["passed"], result["action"], result["warnings"]) == (True, "warn", [result["message"]])


def test_a_head_of_its_own_is_told_from_the_embedding(trained) -> None:
    model = copy.deepcopy(trained)
    untie(model)
    result = judge(model, lambda model: corrupt_rows(model.lm_head.weight))
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("rollback", "lm_head")


def test_an_embedding_row_that_no_probe_reads_counts_by_how_frequent_its_id_is(trained, text) -> None:
    unread = [token for token in range(300) if token not in text[0, :64]]
    model = copy.deepcopy(trained)
    untie(model)
    result = judge(model, lambda model: model.model.embed_tokens.weight[unread].neg_(), text[:1])
    assert result["metrics"]["score"] == 0, "indexing copies"
    result = judge(
        model, lambda model: model.model.embed_tokens.weight.index_fill_(0, torch.tensor(unread), 0), text[:1]
    )
    assert (result["action"], result["metrics"]["suspects"][0]["module"]) == ("rollback", "model.embed_tokens")


@pytest.mark.parametrize("build", BUILDERS)
def test_every_module_with_a_weight_is_found(build) -> None:
    model = build()
    guard = prepared(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        # The bias of keys has no effect at all, and the T5 that is tested hardly heeds where tokens are.
        if name.endswith("bias") or "relative_attention_bias" in name:
            continue
        names = [other for other, shared in model.named_parameters(remove_duplicate=False) if shared is weight]
        with torch.no_grad():
            weight.add_(torch.randn_like(weight) * weight.square().mean().sqrt().clamp(min=0.1))
        suspects = guard.validate(model, None, {})["metrics"]["suspects"]
        assert suspects[0]["module"] in [*names, *(other.rpartition(".")[0] for other in names)]
        model.load_state_dict(state)


@pytest.mark.parametrize("build", [architectures.mixtral, architectures.gpt_oss])
@pytest.mark.parametrize("weight", ["gate_up_proj", "down_proj"])
def test_an_expert_is_named(build, weight) -> None:
    result = judge(build(), lambda model: getattr(model.model.layers[1].mlp.experts, weight)[2].mul_(-3))
    suspect = result["metrics"]["suspects"][0]
    assert suspect["module"] == f"model.layers.1.mlp.experts.{weight}"
    assert "expert 2" in suspect["evidence"]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_aborts_and_is_named(build, value) -> None:
    model = build()
    block = [*find_blocks(model)][-1]
    name, weight = next(entry for entry in model.get_submodule(block).named_parameters() if entry[1].ndim == 2)
    result = judge(model, lambda _: weight.fill_(value), context=MEASURED)
    assert (result["passed"], result["action"]) == (False, "abort")
    assert block in result["message"]
    assert result["metrics"]["suspects"][0]["module"] == f"{block}.{name}".removesuffix(".weight")


def test_parts_that_are_gone_or_mis_shaped_abort() -> None:
    def swap(model):
        model.model.norm = nn.Identity()
        model.model.layers[1].mlp.up_proj = nn.Linear(32, 40)

    result = judge(architectures.llama(), swap)
    assert result["action"] == "abort"
    assert "model.layers.1 cannot be run" in result["message"]
    assert judge(architectures.llama(), lambda model: delattr(model.model, "norm"))["action"] == "abort"


# -- how it measures ---------------------------------------------------------------------------------------------------


def test_no_pass_over_the_model_beside_the_one_with_windows() -> None:
    model = architectures.llama()
    calls = []
    model.register_forward_hook(lambda *arguments: calls.append(arguments))
    windows = torch.randint(96, (2, 100))
    guard = prepared(model, windows)
    guard.validate(model, None, MEASURED)
    assert len(calls) == 1, "the pass itself"
    guard = prepared(model)
    assert len(calls) == 2
    guard.validate(model, None, {})
    assert len(calls) == 2


def test_blocks_read_no_more_tokens_than_asked_for() -> None:
    model = architectures.gpt2()
    sizes = []
    guard = ReconstructionGuard(tokens=10)
    with attached(model, guard.observe(model, None, {})):
        passing(model, torch.randint(96, (4, 30)))
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[:2])))
    guard.prepare(model, None, None, {})
    guard.validate(model, None, {})
    assert sizes == [(1, 10)] * 4
    assert guard.observe(model, None, {}) == {}


def test_a_retry_is_judged_against_the_same_baseline(trained) -> None:
    model = copy.deepcopy(trained)
    guard = prepared(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        quantize(2)(model)
    assert guard.validate(model, None, {})["action"] == "rollback"
    model.load_state_dict(state)
    assert guard.validate(model, None, {})["metrics"]["score"] == 0


@pytest.mark.parametrize(
    ("leading", "shape", "cut"),
    [
        ((4, 32, 16), (4, 32, 16), (1, 8, 16)),
        ((4, 32, 16), (1, 32, 32), (1, 8, 32)),
        ((4, 32, 16), (4, 1, 32, 32), (1, 1, 8, 8)),
        ((4, 32, 16), (1, 32, 32, 32), (1, 32, 8, 8)),
        ((4, 32, 16), (32,), (8,)),
        ((1, 32, 16), (32, 2), (8, 2)),
        ((1, 4, 16), (4, 4), (4, 4)),
        ((4, 32, 16), (4, 1, 1, 32), (1, 1, 1, 8)),
        ((4, 32, 16), (8, 1, 32), (2, 1, 8)),
        ((1, 32, 16), (2, 1, 32), (2, 1, 8)),
    ],
)
def test_how_the_tensors_of_a_call_are_cut(leading, shape, cut) -> None:
    assert Cut.of(torch.zeros(leading), 8)(torch.zeros(shape)).shape == cut


@pytest.mark.parametrize("build", BUILDERS)
def test_every_weight_is_in_a_part(build) -> None:
    model = build()
    covered = {id(parameter) for part in find_parts(model).values() for parameter in part.parameters()}
    assert covered == {id(parameter) for parameter in model.parameters()}


class Adding(nn.Module):
    """A block that adds to its hidden states in place, and activates in place."""

    def __init__(self):
        super().__init__()
        self.up, self.activate, self.down = nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 16)

    def forward(self, hidden):
        hidden += self.down(self.activate(self.up(hidden)))
        return (hidden,)


class Plain(nn.Module):
    """A model that is none of transformers'."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(Adding() for _ in range(3))
        self.head = nn.Linear(16, 40)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            (hidden,) = block(hidden)
        return {"logits": self.head(hidden)}


def test_modules_may_work_in_place() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    guard = prepared(model)
    result = guard.validate(model, None, {})
    assert (result["metrics"]["score"], result["metrics"]["not_measured"]) == (0.0, {})
    with torch.no_grad():
        model.blocks[1].down.weight.neg_()
    suspects = guard.validate(model, None, {})["metrics"]["suspects"]
    assert [suspect["module"] for suspect in suspects] == ["blocks.1.down"]


def test_no_token_counts_as_more_than_ten() -> None:
    gradient = torch.ones(1, 5, 4)
    gradient[0, 0] = 100
    tempered = _tempered(gradient, torch.ones(1, 5, 4))
    assert torch.allclose(tempered[0, :, 0], torch.tensor([10**0.5, 1, 1, 1, 1]))


def test_what_has_no_blocks_is_not_measured() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    guard = ReconstructionGuard()
    assert "not_measured" in guard.prepare(model, None, None, {})
    for context, action in ((MEASURED, "warn"), ({}, "abort")):
        result = guard.validate(model, None, context)
        assert (result["passed"], result["action"]) == (False, action)
        assert result["message"].startswith("not measured")


@pytest.mark.parametrize(
    "options", [{"tokens": 0}, {"tokens": 1000}, {"random_tokens": 0}, {"max_score": 0}, {"warn_score": -1.0}]
)
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ReconstructionGuard(**options)


def test_thresholds_are_options(trained) -> None:
    model = copy.deepcopy(trained)
    guard = prepared(model, warn_score=1e-6, max_score=10.0)
    with torch.no_grad():
        quantize(8)(model)
    assert guard.validate(model, None, {})["action"] == "warn"
