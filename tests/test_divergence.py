"""Predictions of the edited model against the baseline's: the record, what changed of it, and the verdict."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import texts_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import invarlock
from invarlock.core.plain import plain
from invarlock.core.results import Action
from invarlock.datasets.layout import WindowLayout, Windows
from invarlock.datasets.windows import make_windows
from invarlock.evaluation.divergence import compare_predictions, limits_of
from invarlock.evaluation.metric import compare
from invarlock.evaluation.passes import PassResult, measure
from invarlock.evaluation.predictions import (
    KEPT,
    Comparer,
    Recorder,
    TokenChanges,
    TokenRecord,
    coarse_divergence,
    likeliest,
)
from invarlock.evaluation.reach import Reached
from invarlock.evaluation.results import DivergenceResult
from invarlock.models import sizes
from invarlock.models.facts import Predicted
from invarlock.testing import architectures

VOCABULARY = architectures.VOCABULARY
CAUSAL = WindowLayout(24)
MODELS: dict[str, tuple[Callable[[], nn.Module], Predicted, WindowLayout]] = {
    "llama": (architectures.llama, "causal", CAUSAL),
    "gpt2": (architectures.gpt2, "causal", CAUSAL),
    "bert": (architectures.bert, "masked", WindowLayout(24, prefix=(1,), suffix=(2,), special=(1, 2, 3), mask=3)),
    "t5": (architectures.t5, "seq2seq", WindowLayout(24, suffix=(1,), special=(0, 1), start=0)),
}


def windows_of(layout: WindowLayout, count: int = 5) -> Windows:
    generator = torch.Generator().manual_seed(count)
    return layout.windows(torch.randint(4, VOCABULARY, (count, layout.text), generator=generator), seed=1)


def passed(
    model: nn.Module, windows: Windows, task: Predicted = "causal", reference: TokenRecord | None = None
) -> PassResult:
    return measure(model, windows[:0], windows, task=task, reference=reference)


def noisy(model: nn.Module, share: float) -> nn.Module:
    edited = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in edited.parameters():
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator) if weight.dim() > 1 else 0
    return edited


def random_log_probs(rows: int, columns: int, *, scale: float = 3.0, seed: int = 0) -> Tensor:
    return (scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))).log_softmax(dim=-1)


def recorded(log_probs: Tensor) -> TokenRecord:
    recorder = Recorder()
    recorder.see(log_probs)
    return recorder.result()


def changed(before: Tensor, after: Tensor) -> TokenChanges:
    comparer = Comparer(recorded(before))
    comparer.see(after)
    return comparer.result()


def exact_divergence(before: Tensor, after: Tensor) -> Any:
    before, after = before.double(), after.double()
    return (before.exp() * (before - after)).sum(dim=1).numpy()


# The likeliest tokens


@pytest.mark.parametrize("columns", [40, 97, 300, 4096, 4097, 5000, 50257])
@pytest.mark.parametrize("count", [2, 32])
def test_the_likeliest_are_those_of_a_full_sort(columns: int, count: int) -> None:
    values = random_log_probs(7, columns)
    values[0, -count:] += 50  # In the tail that fills no group.
    values[1, : 2 * count] += 50  # All in the first groups.
    expected = values.sort(dim=1, descending=True)
    found, where = likeliest(values, count)
    assert torch.equal(found, expected.values[:, :count])
    assert torch.equal(where, expected.indices[:, :count])


@pytest.mark.parametrize("columns", [97, 5000])
def test_equals_and_nan_are_found_too(columns: int) -> None:
    values = random_log_probs(3, columns).bfloat16().float()
    values[1] = -1.0
    values[2] = math.nan
    found, where = likeliest(values, 32)
    assert torch.equal(found[:2], values.topk(32).values[:2])
    assert torch.equal(values.gather(1, where)[:2], found[:2])
    assert all(len(set(row)) == 32 for row in where.tolist())
    assert found[2].isnan().all()


# The record


@pytest.mark.parametrize("columns", [97, 5000])
def test_a_record_takes_the_same_memory_whatever_the_vocabulary(columns: int) -> None:
    log_probs = random_log_probs(11, columns)
    record = recorded(log_probs)
    assert record.tokens.nbytes + record.log_probs.nbytes == 11 * 8 * KEPT
    assert (record.tokens.dtype, record.log_probs.dtype) == (torch.int32, torch.float32)
    assert torch.equal(log_probs.gather(1, record.tokens.long()), record.log_probs)
    assert not record.log_probs._is_view()


def test_a_small_vocabulary_is_recorded_whole() -> None:
    before, after = random_log_probs(5, 9), random_log_probs(5, 9, seed=1)
    assert recorded(before).tokens.shape == (5, 9)
    assert changed(before, after).kl == pytest.approx(exact_divergence(before, after), abs=1e-5)


# The divergence


@pytest.mark.parametrize("columns", [40, 300, 5000])
@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_the_divergence_is_a_lower_bound(columns: int, scale: float, noise: float) -> None:
    before = random_log_probs(50, columns, scale=scale)
    after = (before + noise * random_log_probs(50, columns, scale=1.0, seed=1)).log_softmax(dim=-1)
    kl, exact = changed(before, after).kl, exact_divergence(before, after)
    assert (kl >= 0).all()
    assert (kl <= exact + 1e-6).all()
    if scale == 6.0:  # Peaked, as trained models are: little is left for the bucket.
        assert kl.mean() > 0.9 * exact.mean()


def test_the_divergence_by_hand() -> None:
    before = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]], dtype=torch.float64).log()
    after = torch.tensor([[0.4, 0.4, 0.2], [0.3, 0.7, 0.0]], dtype=torch.float64).log()
    by_hand = [
        0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4),
        0.9 * math.log(0.9 / 0.3) + 0.1 * math.log(0.1 / 0.7),
    ]
    assert coarse_divergence(before, after).numpy() == pytest.approx(by_hand, abs=1e-12)
    # The last column as the bucket of all others, which is not told.
    assert coarse_divergence(before[:, :2], after[:, :2]).numpy() == pytest.approx(by_hand, abs=1e-12)
    joined = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    assert coarse_divergence(before[:1, :1], after[:1, :1]).item() == pytest.approx(joined, abs=1e-12)


def test_a_token_that_became_impossible_is_infinitely_far() -> None:
    before = random_log_probs(2, 60)
    after = before.clone()
    after[1, before[1].argmax()] = -torch.inf
    assert changed(before, after).kl.tolist() == [0.0, math.inf]
    # What the baseline holds impossible may become possible.
    assert math.isfinite(changed(after, before).kl[1])


def test_tokens_that_a_smaller_vocabulary_lacks_join_the_others() -> None:
    before = random_log_probs(6, 50, scale=1.0)
    before[0, 47] = 5.0
    before = before.log_softmax(dim=-1)
    after = (before + random_log_probs(6, 50, scale=0.1, seed=1))[:, :45].log_softmax(dim=-1)
    changes = changed(before, after)
    assert changes.flipped[0]
    assert np.isfinite(changes.kl).all()
    padded = torch.cat([after, torch.full((6, 10), -40.0)], dim=1)
    assert np.isfinite(changed(after, padded).kl).all()
    assert changed(after, padded).kl == pytest.approx(0, abs=1e-6)


# Flips and margins


def test_flips_and_margins_by_hand() -> None:
    before = torch.tensor([[0.5, 0.3, 0.2]]).repeat(4, 1).log()
    after = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.3, 0.5, 0.2], [0.1, 0.3, 0.6]]).log()
    changes = changed(before, after)
    assert changes.flipped.tolist() == [False, False, True, True]
    assert changes.margin_before == pytest.approx([math.log(5 / 3)] * 4, abs=1e-6)
    by_hand = [math.log(6 / 3), math.log(0.4 / 0.35), math.log(3 / 5), math.log(1 / 6)]
    assert changes.margin == pytest.approx(by_hand, abs=1e-6)


def test_a_flip_to_a_token_outside_the_record_is_seen() -> None:
    before = random_log_probs(1, 5000)
    after = before.clone()
    after[0, before.argmin()] = 3.0
    changes = changed(before, after.log_softmax(dim=-1))
    assert changes.flipped.all()
    assert changes.margin == pytest.approx([before.max().item() - 3.0], abs=1e-5)


def test_which_of_equals_comes_first_is_no_flip() -> None:
    before = torch.tensor([[0.4, 0.4, 0.2]]).log()
    for after, flips in ([[0.4, 0.4, 0.2], False], [[0.5, 0.3, 0.2], False], [[0.3, 0.5, 0.2], False], [[0.3, 0.3, 0.4], True]):  # fmt: skip
        assert changed(before, torch.tensor([after]).log()).flipped.item() is flips
    tied = changed(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.4, 0.4, 0.2]]).log())
    assert (tied.flipped.item(), tied.margin.item()) == (False, 0.0)


# In the pass


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unedited_model_differs_in_nothing(name: str, dtype: torch.dtype) -> None:
    maker, task, layout = MODELS[name]
    model, windows = maker().to(dtype), windows_of(layout)
    baseline = passed(model, windows, task)
    edited = passed(model, windows, task, baseline.record)
    assert (baseline.changes, edited.record) == (None, None)
    assert baseline.record is not None
    assert len(baseline.record) == baseline.tokens.sum()
    result = compare_predictions(baseline, edited, ratio=1.0)
    assert (result.action, result.message[-17:]) == (Action.CONTINUE, "within the limits")
    assert (result.kl_mean, result.kl_p99, result.window_p95, result.flips, result.broken) == (0, 0, 0, 0, 0)
    assert (result.margin_loss, edited.losses.tolist()) == (0, baseline.losses.tolist())


@pytest.mark.parametrize("name", MODELS)
def test_changes_are_those_of_the_scored_tokens_in_float64(name: str) -> None:
    maker, task, layout = MODELS[name]
    model, windows = maker(), windows_of(layout)
    edited = noisy(model, 0.3)
    changes = passed(edited, windows, task, passed(model, windows, task).record).changes
    assert changes is not None
    with torch.no_grad():
        logits = [copy.deepcopy(some).double()(**windows.inputs()).logits for some in (model, edited)]
    shift = int(task == "causal")
    scored = windows.labels[:, shift:] != -100
    before, after = (some[:, : some.shape[1] - shift][scored].log_softmax(dim=-1) for some in logits)
    top = before.topk(KEPT).indices
    best = after.topk(2).values
    own = after.gather(1, top[:, :1])
    assert changes.kl == pytest.approx(coarse_divergence(before.gather(1, top), after.gather(1, top)), abs=1e-5)
    assert (changes.kl <= exact_divergence(before, after) + 1e-6).all()
    assert changes.flipped.tolist() == (before.argmax(dim=1) != after.argmax(dim=1)).tolist()
    assert changes.flipped.any()
    rival = torch.where(own == best[:, :1], best[:, 1:], best[:, :1])
    assert changes.margin == pytest.approx((own - rival).squeeze(1).numpy(), abs=1e-5)
    assert changes.margin_before == pytest.approx((before.topk(2).values @ torch.tensor([1.0, -1]).double()), abs=1e-5)


def test_chunks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = architectures.llama(), windows_of(CAUSAL)
    edited = noisy(model, 0.1)
    record = passed(model, windows).record
    at_once = passed(edited, windows, reference=record).changes
    monkeypatch.setattr(sizes, "CPU", replace(sizes.CPU, log_probs=7 * 4 * VOCABULARY, batch_tokens=2 * 24))
    in_pieces = passed(edited, windows, reference=record).changes
    assert at_once is not None and in_pieces is not None
    assert in_pieces.kl == pytest.approx(at_once.kl, abs=1e-6)
    assert in_pieces.margin == pytest.approx(at_once.margin, abs=1e-5)
    assert (in_pieces.flipped == at_once.flipped).all()


def test_each_window_passes_once_with_a_reference_too() -> None:
    model, windows = architectures.llama(), windows_of(CAUSAL)
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, output: seen.append(len(output.logits)))
    sides = windows[:2], windows[2:]
    baseline = measure(model, *sides, task="causal", taps=[{"lm_head": Reached()}])
    measure(model, *sides, task="causal", taps=[{"lm_head": Reached()}], reference=baseline.record)
    assert seen == [2, 3] * 2


def test_the_same_pass_gives_the_same_bits() -> None:
    model, windows = architectures.llama(), windows_of(CAUSAL)
    one, other = (passed(model, windows).record for _ in range(2))
    assert one is not None and other is not None
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.log_probs, other.log_probs)


def test_a_reference_of_other_windows_is_refused() -> None:
    model, windows = architectures.llama(), windows_of(CAUSAL)
    baseline, fewer = passed(model, windows), passed(model, windows[:3])
    with pytest.raises(ValueError, match="the reference has fewer scored tokens than the windows"):
        passed(model, windows, reference=fewer.record)
    with pytest.raises(ValueError, match="the reference has more scored tokens than the windows"):
        passed(model, windows[:3], reference=baseline.record)
    for edited in (baseline, passed(model, windows[:3], reference=fewer.record)):
        with pytest.raises(ValueError, match="not made with the baseline's record"):
            compare_predictions(baseline, edited, ratio=1.1)


# The verdict


def judged(kl: Any, *, flipped: Any = False, margin: Any = 1.0, rises: Any = 0.0, **settings: Any) -> DivergenceResult:
    """100 windows of 10 tokens."""
    shape = (100, 10)
    kl, flipped, margin = (np.broadcast_to(np.asarray(some), shape).flatten() for some in (kl, flipped, margin))
    tokens = np.full(100, 10)
    changes = TokenChanges(kl.astype(float), flipped, margin.astype(float), np.full(1000, 1.5))
    baseline = PassResult(np.full(100, 25.0), tokens)
    edited = PassResult(baseline.losses + np.broadcast_to(rises, 100) * tokens, tokens, changes=changes)
    return compare_predictions(baseline, edited, **{"ratio": 1.1} | settings)


def share(part: float, value: float) -> Any:
    return np.where(np.arange(1000).reshape(100, 10) < 1000 * part, value, 0.0)


def test_figures_are_means_shares_and_percentiles() -> None:
    kl = np.arange(1000).reshape(100, 10) / 2000
    result = judged(kl, flipped=share(0.03, 1) > 0, margin=1.2, rises=np.arange(100) / 1000)
    assert result.kl_mean == pytest.approx(kl.mean())
    assert (result.kl_p95, result.kl_p99) == pytest.approx((0.95 * 999 / 2000, 0.99 * 999 / 2000))
    assert result.window_p95 == pytest.approx(0.95 * 99 / 1000)
    assert (result.flips, result.broken) == (0.03, 0.0)
    assert (result.margin_baseline, result.margin_loss) == (1.5, pytest.approx(0.3))


def test_limits_follow_from_the_ratio_and_the_margins() -> None:
    limits = limits_of(1.1, np.array([0.0, 100.0, 2 * math.sqrt(math.log(1.1))]))
    rise = math.log(1.1)
    assert (limits.kl_mean, limits.kl_p95, limits.kl_p99, limits.window_p95) == (rise, 4 * rise, 8 * rise, 2 * rise)
    assert limits.flips == pytest.approx((0.5 + 0 + 0.158655) / 3, rel=1e-5)
    assert limits_of(1.0, np.array([0.0, 0.1])).flips == 0.25
    assert limits_of(1.1, np.array([1.0]), flips=0.2, broken=0.3) == replace(limits, flips=0.2, broken=0.3)


@pytest.mark.parametrize(
    ("edit", "action", "said"),
    [
        ({"kl": 0.09}, Action.CONTINUE, "within the limits"),
        ({"kl": 0.10}, Action.ROLLBACK, "mean KL divergence 0.1 above 0.09531"),
        ({"kl": share(0.06, 0.39)}, Action.ROLLBACK, "95th percentile of the KL divergence 0.39 above 0.3812"),
        ({"kl": share(0.04, 0.39)}, Action.CONTINUE, "within the limits"),
        ({"kl": share(0.02, 0.77)}, Action.ROLLBACK, "99th percentile of the KL divergence 0.77 above 0.7625"),
        ({"kl": 0.0, "rises": share(0.06, 0.2)[:, 0]}, Action.ROLLBACK, "95th percentile of the windows' loss increases"),
        ({"kl": 0.0, "rises": share(0.04, 0.2)[:, 0]}, Action.CONTINUE, "within the limits"),
        ({"kl": 0.0, "rises": -0.3}, Action.CONTINUE, "within the limits"),
        ({"kl": 0.0, "flipped": share(0.02, 1) > 0}, Action.WARN, "top-1 disagreement 0.02 above 0.00756"),
        ({"kl": 0.0, "flipped": share(0.02, 1) > 0, "flips": 0.03}, Action.CONTINUE, "within the limits"),
        ({"kl": share(0.002, 0.7)}, Action.WARN, "share of predictions that broke 0.002 above 0.001"),
        ({"kl": share(0.001, 0.7)}, Action.CONTINUE, "within the limits"),
        ({"kl": share(0.002, 0.7), "broken": 0.01}, Action.CONTINUE, "within the limits"),
        ({"kl": 0.10, "ratio": 1.2}, Action.CONTINUE, "within the limits"),
    ],
)  # fmt: skip
def test_what_is_above_its_limit_decides(edit: dict[str, Any], action: Action, said: str) -> None:
    result = judged(**edit)
    assert result.action is action
    assert said in result.message


def test_every_reason_is_said_and_the_gravest_decides() -> None:
    result = judged(0.8, flipped=True, rises=1.0)
    assert result.action is Action.ROLLBACK
    assert result.message.count(" above ") == 6


def test_a_model_that_gives_nan_is_not_measured_but_its_flips_count() -> None:
    model, windows = architectures.llama(), windows_of(CAUSAL)
    baseline = passed(model, windows)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight[3] = math.nan
    result = compare_predictions(baseline, passed(broken, windows, reference=baseline.record), ratio=1.1)
    assert (result.kl_mean, result.kl_p95, result.kl_p99, result.window_p95, result.margin_loss) == (None,) * 5
    assert (result.flips, result.broken, result.action) == (1.0, 1.0, Action.ROLLBACK)
    assert "predictions are not finite" in result.message
    assert "nan" not in result.message
    json.dumps(plain(asdict(result)), allow_nan=False)

    part = judged(share(0.3, math.nan), flipped=share(0.3, 1) > 0)
    assert (part.kl_mean, part.kl_p95, part.flips, part.broken) == (None, None, 0.3, 0.3)
    assert part.action is Action.ROLLBACK

    itself = passed(broken, windows)
    result = compare_predictions(itself, passed(model, windows, reference=itself.record), ratio=1.1)
    assert (result.action, result.kl_mean, result.flips, result.limits) == (Action.ABORT, None, None, None)


# A trained model


@dataclass(frozen=True)
class Demo:
    provider: str = "demo"
    path: str | None = None
    name: str | None = None
    text_field: str = "text"
    split: str = "validation"
    seq_len: int = 128
    stride: int | None = None
    preview_n: int = 2
    final_n: int = 32
    seed: int = 42


class Judge:
    """The demo model, its windows, and what metric and predictions say of an edit of it."""

    def __init__(self) -> None:
        checkpoint = Path(invarlock.__file__).parent / "demo" / "checkpoint"
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        _, self.windows = make_windows(Demo(), self.model, tokenizer, task="causal", documents=texts_of(Demo()))
        self.baseline = passed(self.model, self.windows)
        self.judged: dict[Callable[[Any], None], tuple[Action, DivergenceResult]] = {}

    def __call__(self, edit: Callable[[Any], None]) -> tuple[Action, DivergenceResult]:
        if edit not in self.judged:
            self.judged[edit] = self.judge(edit)
        return self.judged[edit]

    def judge(self, edit: Callable[[Any], None]) -> tuple[Action, DivergenceResult]:
        edited_model = copy.deepcopy(self.model)
        with torch.no_grad():
            edit(edited_model)
        edited = passed(edited_model, self.windows, reference=self.baseline.record)
        settings: dict[str, Any] = {"kind": "perplexity", "limit": 1.1, "level": 0.95, "reps": 200, "seed": 0}
        metric = compare(self.baseline, edited, **settings)
        return metric.action, compare_predictions(self.baseline, edited, ratio=1.1)

    def frequent(self, place: int) -> int:
        return int(self.windows.input_ids.flatten().bincount().argsort(descending=True)[place])


@pytest.fixture(scope="module")
def demo() -> Iterator[Judge]:
    return Judge()


def linears(model: Any) -> list[Tensor]:
    return [
        module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear) and "head" not in name
    ]


def rounded(bits: int) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for weight in linears(model):
            step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
            weight.copy_((weight / step).round() * step)

    return edit


@cache
def perturbed(amount: float) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for weight in linears(model):
            weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)

    return edit


def halved(model: Any) -> None:
    for weight in model.parameters():
        weight.copy_(weight.half())


def permuted(model: Any) -> None:
    order = torch.randperm(384, generator=torch.Generator().manual_seed(0))
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.copy_(layer.mlp.gate_proj.weight[order])
        layer.mlp.up_proj.weight.copy_(layer.mlp.up_proj.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


@pytest.mark.parametrize("edit", [halved, permuted, rounded(8), rounded(5), perturbed(0.05)])
def test_harmless_edits_are_accepted_without_a_warning(demo: Judge, edit: Callable[[Any], None]) -> None:
    metric, result = demo(edit)
    assert (metric, result.action) == (Action.CONTINUE, Action.CONTINUE)
    assert result.kl_mean is not None and result.limits is not None
    assert result.kl_mean < 0.1 * result.limits.kl_mean


def test_figures_grow_with_the_damage(demo: Judge) -> None:
    results = [demo(perturbed(amount))[1] for amount in (0.01, 0.05, 0.2, 0.4)]
    for name in ("kl_mean", "kl_p95", "kl_p99", "window_p95", "flips", "margin_loss"):
        figures = [getattr(result, name) for result in results]
        assert figures == sorted(figures)
    assert results[-1].action is Action.ROLLBACK


@pytest.mark.parametrize("amount", [0.01, 0.05, 0.2])
def test_an_evenly_spread_edit_shows_what_the_limits_suppose(demo: Judge, amount: float) -> None:
    """Were its divergence the limit, it would be at the other limits, or just below: none of them is idle or unfair."""
    result = demo(perturbed(amount))[1]
    assert result.kl_mean and result.kl_p95 and result.flips and demo.baseline.record
    margins = demo.baseline.record.log_probs[:, :2].double() @ torch.tensor([1.0, -1.0]).double()
    supposed = limits_of(math.exp(result.kl_mean), margins.numpy())
    assert result.kl_p99 and 0.7 < result.kl_p95 / supposed.kl_p95 < 1
    assert 0.7 < result.kl_p99 / supposed.kl_p99 < 1.1
    assert 0.7 < result.flips / supposed.flips < 1.5


def test_sharper_predictions_keep_the_mean_and_every_decision_but_are_seen(demo: Judge) -> None:
    metric, result = demo(lambda model: model.model.norm.weight.mul_(1.3))
    assert (metric, result.flips) == (Action.CONTINUE, 0.0)
    assert result.action is Action.ROLLBACK
    assert "mean KL divergence" in result.message
    assert result.margin_loss is not None and result.margin_loss < 0


def test_a_corrupted_row_breaks_some_windows_and_is_seen(demo: Judge) -> None:
    rare = demo.frequent(100)
    metric, result = demo(lambda model: model.model.embed_tokens.weight[rare].zero_())
    assert metric is Action.CONTINUE
    assert result.action is Action.ROLLBACK
    assert "95th percentile of the windows' loss increases" in result.message
    assert "predictions that broke" in result.message
