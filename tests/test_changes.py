"""Names of what an edit did: to one tensor, to every tensor that a checkpoint stores, and on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from conftest import DEMO, read_report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.models.fingerprint import stored_tensors
from invarlock.pipeline.changes import Changes, find_changes
from invarlock.quantization import Scheme, WeightLayout, fake_quantize_
from invarlock.quantization.changes import change_of
from invarlock.quantization.grids import infer_grid
from invarlock.testing import architectures

ROWS, COLUMNS = 96, 64


def seeded(number: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random(*shape: int, number: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(number))


# -- one tensor --------------------------------------------------------------------------------------------------------


def pruned(weight: Tensor) -> Tensor:
    threshold = weight.float().abs().flatten().kthvalue(weight.numel() // 5).values
    return torch.where(weight.abs() <= threshold, 0, weight)


def two_of_four(weight: Tensor) -> Tensor:
    fours = weight.reshape(-1, 4)
    smallest = fours.abs().argsort(1)[:, :2]
    return fours.scatter(1, smallest, 0).reshape(weight.shape)


def low_rank(rank: int) -> Callable[[Tensor], Tensor]:
    def add(weight: Tensor) -> Tensor:
        update = random(len(weight), rank, number=2) @ random(rank, weight.shape[1], number=3)
        return weight + 0.1 * update * weight.float().norm() / update.norm()

    return add


def with_rows(edit: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """An edit of rows 3 and 5."""

    def change(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[[3, 5]] = edit(weight[[3, 5]])
        return weight

    return change


def rounded(weight: Tensor) -> Tensor:
    weight = weight.clone()
    fake_quantize_(weight, Scheme(4))
    return weight


NAMED = {
    "all zero": torch.zeros_like,
    "constant: 0.5": lambda weight: torch.full_like(weight, 0.5),
    "negated": lambda weight: -weight,
    "scaled by 0.7": lambda weight: weight * 0.7,
    "transposed": lambda weight: weight.mT.reshape(weight.shape),
    "rows permuted": lambda weight: weight[torch.randperm(ROWS, generator=seeded())],
    "columns permuted": lambda weight: weight[:, torch.randperm(COLUMNS, generator=seeded())],
    "columns scaled: by 0.5 to 2": lambda weight: weight * torch.linspace(0.5, 2, COLUMNS),
    "columns negated: 40 of 64": lambda weight: weight * torch.where(torch.arange(COLUMNS) < 40, -1, 1),
    "values changed: 2 of 6,144": with_rows(lambda rows: rows.index_fill(1, torch.tensor([1]), 40)),
    "rows scaled: by 0.5 to 2": lambda weight: weight * torch.linspace(0.5, 2, ROWS)[:, None],
    "20 % zeros": pruned,
    "50 % zeros, 2 of each 4": two_of_four,
    "values zeroed: 1 of 6,144": lambda weight: weight.index_put(
        (torch.tensor([7]), torch.tensor([9])), torch.zeros(1)
    ),
    "rows zeroed: 2 of 96": with_rows(torch.zeros_like),
    "rows negated: 2 of 96": with_rows(torch.neg),
    "rows scaled by 3: 2 of 96": with_rows(lambda rows: 3 * rows),
    "rows replaced: 2 of 96": with_rows(lambda rows: random(*rows.shape, number=9)),
    "rows changed: 2 of 96": with_rows(lambda rows: rows + 0.2 * random(*rows.shape, number=9)),
    "LoRA-like, rank 3: 10 % of the norm": low_rank(3),
    "a grid of 16 levels a row (4 bits)": rounded,
    "not finite: 2 more values are NaN or Inf": with_rows(lambda rows: rows.index_fill(1, torch.tensor(0), torch.inf)),
    "changed": lambda weight: weight + 0.1 * random(*weight.shape, number=4),
    "unchanged": torch.clone,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", NAMED)
def test_a_change_is_named(text: str, dtype: torch.dtype) -> None:
    old = random(ROWS, COLUMNS).to(dtype)
    state = torch.get_rng_state()
    assert change_of(old, NAMED[text](old.float()).to(dtype)).text == text
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (torch.float32, torch.bfloat16, "bfloat16 of float32"),
        (torch.float32, torch.float16, "float16 of float32"),
        (torch.bfloat16, torch.float16, "float16 of bfloat16"),
        (torch.bfloat16, torch.float32, "unchanged"),
    ],
)
def test_a_cast_is_named_and_the_same_numbers_in_a_wider_type_are_unchanged(before, after, text: str) -> None:
    # Some are too small for float16.
    old = (random(ROWS, COLUMNS) * torch.logspace(0, -7, COLUMNS)).to(before)
    assert change_of(old, old.to(after)).text == text
    assert change_of(old, old.to(after).float()).text == text, "numbers that a wider type holds, too"


def test_rows_are_outputs_whatever_the_layout() -> None:
    old = random(ROWS, COLUMNS)
    new = with_rows(torch.zeros_like)(old)
    assert change_of(old.mT, new.mT, WeightLayout.IN_OUT).text == "rows zeroed: 2 of 96"
    assert change_of(old, new).rows == (3, 5)


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_added_to_a_vector_is_named(step: int, dtype) -> None:
    old = (0.3 * random(COLUMNS)).to(dtype)
    done = "added to" if step == 1 else "subtracted from"
    assert change_of(old, old + step).text == f"off by one: 1 {done} every value"
    assert change_of(old, old + 2 * step).text == "changed"


@pytest.mark.parametrize("old", [torch.ones(8), torch.tensor(1.0), random(8, 8), random(8, 8).to(torch.float8_e4m3fn)])
def test_what_became_zero_is_named_whatever_it_was(old: Tensor) -> None:
    assert change_of(old, torch.zeros_like(old)).text == "all zero"


def test_numbers_of_eight_bits_are_compared() -> None:
    old = random(ROWS, COLUMNS)
    assert change_of(old, old.to(torch.float8_e4m3fn)).text == "changed"
    assert change_of(old.to(torch.float8_e4m3fn), old.to(torch.float8_e4m3fn)).text == "unchanged"


def test_rows_that_came_and_went_are_counted() -> None:
    old = random(ROWS, COLUMNS)
    assert change_of(old, torch.cat([old, old[:8]])).text == "8 rows added, the others unchanged"
    assert change_of(old, 2 * old[:90]).text == "6 rows removed, the others changed"
    assert change_of(old, old[:, :8]).text == "resized: (96, 64) became (96, 8)"


class LargestRounded(TorchDispatchMode):
    """The largest tensor that was rounded: what a search for a grid looks at."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "round" in str(func):
            self.numbers = max(self.numbers, args[0].numel())
        return func(*args, **kwargs or {})


def test_what_lies_on_no_grid_is_told_by_a_few_rows() -> None:
    weight = pruned(random(2048, 32))
    with LargestRounded() as looked_at:
        assert infer_grid(weight) is None
    assert 0 < looked_at.numbers < weight.numel() / 10


@pytest.mark.parametrize(("first", "share"), [(0, 1), (1500, 0.1), (0, 0.3)])
def test_a_weight_of_which_a_part_lies_on_no_grid_is_none(first: int, share: float) -> None:
    """A fused weight whose last matrix was left out, or its experts that come first."""
    weight = random(2048, 64)
    quantized = rounded(weight)
    rows = slice(first, first + int(share * len(weight)))
    quantized[rows] = weight[rows]
    assert infer_grid(quantized) is None
    assert change_of(weight, quantized).bits is None


@pytest.mark.parametrize("shape", [(96, 512), (512, 96), (300, 300)])
@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rank_of_an_update_is_read_off(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> None:
    old = random(*shape).to(dtype)
    assert change_of(old, low_rank(rank)(old).to(dtype)).text == f"LoRA-like, rank {rank}: 10 % of the norm"


class LargestMade(TorchDispatchMode):
    """Most bytes of a tensor that an operation made."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        if isinstance(made, Tensor) and made.data_ptr() not in {
            each.data_ptr() for each in args if isinstance(each, Tensor)
        }:
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_tensors_are_compared_without_a_copy_of_either(dtype: torch.dtype) -> None:
    old = random(4096, 128).to(dtype)
    new = old.clone()
    with LargestMade() as made:
        assert change_of(old, new).text == "unchanged"
    assert made.nbytes < old.nbytes / 2


# -- every tensor of a checkpoint --------------------------------------------------------------------------------------


class Calibrated(nn.Linear):
    """With a buffer that a checkpoint stores, and one that it does not."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("input_scale", torch.ones(8))
        self.register_buffer("computed", torch.ones(8), persistent=False)


def changes_of(model: nn.Module, edit: Callable[[Any], Any], tokenizer: Any = None) -> Changes:
    before = {name: tensor.detach().clone() for name, tensor in stored_tensors(model)}
    with torch.no_grad():
        edit(model)
    return find_changes(model, before, tokenizer)


def changed(found: Changes) -> dict[str, tuple[str, str]]:
    return {tensor.name: (tensor.role, tensor.change) for tensor in found.tensors if tensor.is_changed}


def said(found: Changes) -> list[tuple[str, str]]:
    return [(str(finding.action), finding.message) for finding in found.findings]


def test_biases_and_stored_buffers_count_and_computed_ones_do_not() -> None:
    found = changes_of(
        Calibrated(), lambda model: (model.bias.zero_(), model.input_scale.mul_(3), model.computed.zero_())
    )
    assert changed(found) == {"bias": ("bias", "all zero"), "input_scale": ("other", "constant: 3")}
    assert said(found) == [("warn", "all zero, and not in the baseline: bias")]
    assert [tensor.relative_error for tensor in found.tensors] == [0.0, 1.0, pytest.approx(2.0)]


@pytest.mark.parametrize(
    ("build", "name"),
    [(architectures.gpt2, "transformer.h.0.attn.c_proj"), (architectures.llama, "model.layers.1.self_attn.o_proj")],
)
def test_a_transposed_weight_is_a_finding(build, name: str) -> None:
    def transpose(model: nn.Module) -> None:
        weight = model.get_submodule(name).weight
        weight.copy_(weight.mT.clone())

    found = changes_of(build(), transpose)
    assert [change for _, change in changed(found).values()] == ["transposed"]
    assert said(found) == [("rollback", f"transposed: {name}")]


def gemma2() -> nn.Module:
    """Its norms multiply by 1 + w."""
    config = transformers.Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def llama() -> nn.Module:
    """Its norms multiply by w."""
    model = architectures.llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, mean=1, std=0.1)
    return model


def smooth(offset: int, bits: int | None = None) -> Callable[[Any], None]:
    """Scales out of the norms before feed-forwards into these, as if the norms multiplied by w and an offset."""

    def edit(model: Any) -> None:
        for layer in model.model.layers:
            norm = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm).weight
            scales = torch.exp(0.4 * random(len(norm), number=5))
            norm.copy_((norm + offset) / scales - offset)
            for reader in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight):
                reader.mul_(scales)
                if bits:
                    fake_quantize_(reader, Scheme(bits))

    return edit


NORMS = [(gemma2, 1), (llama, 0)]


@pytest.mark.parametrize(("build", "offset"), NORMS)
@pytest.mark.parametrize("bits", [None, 4])
def test_smoothing_with_the_wrong_kind_of_norm_is_a_finding(build, offset: int, bits: int | None) -> None:
    found = changes_of(build(), smooth(1 - offset, bits))
    wrong, right = ("w", "1 + w") if offset else ("1 + w", "w")
    message = f"norm weights off by one: smoothed as if it multiplied by {wrong}, and it multiplies by {right}: "
    assert [(action, text.startswith(message)) for action, text in said(found)] == [("rollback", True)]


@pytest.mark.parametrize(("build", "offset"), NORMS)
@pytest.mark.parametrize("bits", [None, 4])
def test_smoothing_done_right_is_named_and_no_finding(build, offset: int, bits: int | None) -> None:
    found = changes_of(build(), smooth(offset, bits))
    assert said(found) == []
    norms = [change for role, change in changed(found).values() if role == "norm"]
    assert [text.partition(":")[0] for text in norms] == ["smoothed", "smoothed"]


@pytest.mark.parametrize("build", [gemma2, llama])
@pytest.mark.parametrize("step", [1, -1])
def test_norms_off_by_one_are_a_finding(build, step: int) -> None:
    found = changes_of(build(), lambda model: model.model.norm.weight.add_(step))
    done = "added to" if step == 1 else "subtracted from"
    assert said(found) == [("rollback", f"norm weights off by one: 1 {done} every value: model.norm.weight")]


@pytest.mark.parametrize("build", [gemma2, llama])
def test_norms_that_were_trained_are_no_finding(build) -> None:
    def train(model: Any) -> None:
        for parameter in model.parameters():
            parameter.add_(0.02 * random(*parameter.shape, number=6))

    found = changes_of(build(), train)
    assert said(found) == []
    assert {text for _, text in changed(found).values()} == {"changed"}


def test_an_untied_copy_is_unchanged_and_another_head_under_a_tied_name_is_not() -> None:
    def untie(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.clone())

    def tie(model: Any) -> None:
        model.lm_head.weight = model.model.embed_tokens.weight

    assert changed(changes_of(architectures.llama_tied(), untie)) == {}
    assert changed(changes_of(architectures.llama(), tie)) == {"lm_head.weight": ("embedding", "changed")}


def test_biases_that_were_zero_have_no_relative_error() -> None:
    model = architectures.gpt2()
    (bias,) = (
        tensor
        for tensor in changes_of(model, lambda model: model.transformer.ln_f.bias.add_(0.1)).tensors
        if tensor.is_changed
    )
    assert (bias.change, bias.relative_error) == ("constant: 0.1", None)


@pytest.mark.parametrize("size", [16, 64])
def test_a_model_of_another_width_is_compared_all_the_same(size: int) -> None:
    before = dict(stored_tensors(architectures.llama(eos_token_id=7)))
    found = find_changes(architectures.llama(eos_token_id=7, hidden_size=size), before, Words())
    assert f"resized: (96, 32) became (96, {size})" in {tensor.change for tensor in found.tensors}


def test_what_is_missing_or_new_is_listed() -> None:
    def swap(model: Any) -> None:
        del model.transformer.h[0].mlp.c_fc.bias
        model.transformer.h[0].mlp.c_fc.register_parameter("bias", None)
        model.extra = nn.Linear(2, 2, bias=False)

    names = changed(changes_of(architectures.gpt2(), swap))
    assert {name: text for name, (_, text) in names.items()} == {
        "extra": "not in the baseline",
        "transformer.h.0.mlp.c_fc.bias": "missing",
    }


# -- rows of tokens ----------------------------------------------------------------------------------------------------


class Words:
    """As much of a tokenizer as naming needs."""

    eos_token_id = 7
    all_special_ids = (7, 8)
    added_tokens_decoder: ClassVar = {9: "<tool>"}

    def convert_ids_to_tokens(self, row: int) -> str:
        return {7: "<|im_end|>", 8: "<|im_start|>", 9: "<tool>"}.get(row, f"word{row}")


def edit_head(rows: list[int], edit: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        weight = model.get_output_embeddings().weight
        weight[rows] = edit(weight[rows])

    return change


@pytest.mark.parametrize("build", [architectures.llama, architectures.gpt2, architectures.llama_tied])
@pytest.mark.parametrize(
    ("how", "edit"),
    [("zeroed", torch.zeros_like), ("negated", torch.neg), ("replaced", lambda rows: random(*rows.shape))],
)
def test_the_lost_row_of_a_stop_token_in_the_head_decides(build, how: str, edit) -> None:
    found = changes_of(build(eos_token_id=7), edit_head([7], edit), Words())
    ((action, message),) = said(found)
    assert action == "rollback"
    assert f"the row of the stop token `<|im_end|>` was {how}" in message
    (change,) = (text for _, text in changed(found).values())
    assert change == f"rows {how}: 1 of 96, the stop token `<|im_end|>`"


@pytest.mark.parametrize("build", [architectures.llama, architectures.gpt2])
def test_lost_rows_of_special_tokens_are_named_though_all_others_changed(build) -> None:
    def edit(model: Any) -> None:
        weight = model.get_input_embeddings().weight
        fake_quantize_(weight, Scheme(8))
        weight[[8, 9, 20]] = 0

    action, message = said(changes_of(build(eos_token_id=7), edit, Words()))[0]
    assert action == "warn"
    assert "the rows of `<|im_start|>`, `<tool>` were zeroed" in message


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: edit_head([7, 8], lambda rows: rows + 0.02 * random(*rows.shape))(model),
        lambda model: edit_head([20, 21], torch.zeros_like)(model),
        lambda model: fake_quantize_(model.get_output_embeddings().weight, Scheme(3)),
        lambda model: model.get_output_embeddings().weight.neg_(),
    ],
    ids=["tuned", "other tokens", "3 bits", "all negated"],
)
def test_rows_of_special_tokens_that_are_not_lost_alone_are_no_finding(edit) -> None:
    assert said(changes_of(architectures.llama(eos_token_id=7), edit, Words())) == []


def test_rows_without_a_tokenizer_go_by_their_numbers() -> None:
    ((_, message),) = said(changes_of(architectures.llama(eos_token_id=7), edit_head([7], torch.neg)))
    assert "the stop token 7 was negated" in message


# -- the command line --------------------------------------------------------------------------------------------------

SMALL = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=4", "--set", "dataset.preview_n=2")
TEXT = ("--dataset", DEMO / "text.jsonl")


def save(model: Any, folder: str) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(folder)
    return Path(folder)


def demo(edit: Callable[[Any], Any] = lambda model: None, dtype: str = "bfloat16") -> Any:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=dtype)
    with torch.no_grad():
        edit(model)
    return model


def compared(invarlock, baseline: Path, subject: Path, *options: Any) -> tuple[Any, dict[str, Any]]:
    done = invarlock("compare", "--baseline", baseline, "--subject", subject, *options, *SMALL, "--out", "out")
    return done, read_report(Path("out"))


def edit_line(done: Any) -> str:
    return next(line for line in done.out.splitlines() if line.startswith("edit "))


@pytest.mark.parametrize("source", [TEXT, ("--weights-only",)])
def test_biases_that_are_lost_stand_in_the_line(invarlock, source) -> None:
    config = transformers.Qwen2Config(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    for bias in biases:
        nn.init.normal_(bias, std=0.05)
    baseline = save(model, "baseline")
    for bias in biases:
        nn.init.zeros_(bias)
    done, report = compared(invarlock, baseline, save(model, "subject"), *source)
    assert "differs in 6 of 27 tensors, 128 parameters, all zero (" in edit_line(done)
    assert "edit: warn: all zero, and not in the baseline: model.layers.0.self_attn.q_proj.bias" in done.out
    assert {"family": "model.layers.*.self_attn.k_proj.bias", "changes": {"all zero": 2}} in report["edit"]["plan"][
        "families"
    ]
    assert invarlock("verify", "out").code == 0


def test_where_no_weight_changed_no_module_is_blamed(invarlock) -> None:
    subject = save(demo(), "subject")
    settings = json.loads((subject / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": 20.0}
    (subject / "config.json").write_text(json.dumps(settings))
    done, report = compared(invarlock, DEMO / "checkpoint", subject, *TEXT)
    assert (done.code, report["verdict"]["accepted"]) == (1, False)
    assert [suspect["module"] for suspect in report["verdict"]["suspects"]] == ["rope_parameters.rope_theta"]
    assert "has the same numbers in all 38 tensors" in edit_line(done)
    assert invarlock("verify", "out").code == 0


def test_the_same_numbers_in_another_type_are_no_difference(invarlock) -> None:
    done, report = compared(invarlock, DEMO / "checkpoint", save(demo(dtype="float32"), "subject"), *TEXT)
    assert "has the same numbers in all 38 tensors" in edit_line(done)
    assert not [finding for finding in report["verdict"]["findings"] if finding["source"] == "edit"]


@pytest.mark.parametrize("source", [TEXT, ("--weights-only",)])
def test_the_lost_row_of_the_stop_token_is_named_on_the_command_line(invarlock, source) -> None:
    def untie(model: Any) -> None:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())

    baseline = save(demo(untie), "baseline")
    model = demo(untie)
    nn.init.zeros_(model.lm_head.weight[0])
    done, report = compared(invarlock, baseline, save(model, "subject"), *source)
    assert done.code == 1
    assert "rows zeroed: 1 of 1,024, the stop token `<|endoftext|>` (lm_head)" in edit_line(done)
    actions = {finding["source"]: finding["action"] for finding in report["verdict"]["findings"]}
    assert actions["edit"] == "rollback"
    assert invarlock("verify", "out").code == 0


def test_an_adapter_that_was_merged_is_named_by_its_rank_and_share(invarlock) -> None:
    def merge(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(low_rank(4)(layer.mlp.up_proj.weight.float()))

    done, report = compared(invarlock, DEMO / "checkpoint", save(demo(merge), "subject"), "--weights-only")
    assert "differs in 4 of 38 tensors" in edit_line(done)
    assert "LoRA-like, rank 4: 10 % of the norm (model.layers." in edit_line(done)
    families = {entry["family"]: entry["changes"] for entry in report["edit"]["plan"]["families"]}
    assert families["model.layers.*.mlp.up_proj"] == {"LoRA-like, rank 4": 4}
