"""Windows measured step by step: no further than it takes to be certain, and each of the baseline's once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tiny_models
from conftest import DEMO, Done, read_report
from test_compare import rtn, save
from tiny_models import MODELS

from invarlock.core.results import Action
from invarlock.evaluation.confidence_sequence import by_document, mean_bounds
from invarlock.evaluation.divergence import judge_figures, limits_of, prediction_bounds
from invarlock.evaluation.metric import Stopping
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenChanges
from invarlock.evaluation.stopping import LEAST_UNTOUCHED, look_at
from invarlock.evaluation.task import Judging
from invarlock.pipeline.stepping import MOST_TIMES, PLANNED, looks
from invarlock.quantization import Plan, quantize_model
from invarlock.reporting.report import json_schema
from plugins_builtin.tasks.language import Causal

BASELINE, TEXT = DEMO / "checkpoint", DEMO / "text.jsonl"
SMALL = {"provider": "demo", "seq_len": 64, "preview_n": 1}
COUNTING = """
import torch

from invarlock.core.api import ModelAdapter

SEEN = []

def see(model, args, kwargs):
    if torch.is_grad_enabled():
        # Shares are predicted by gradients, of the beginning of one window.
        return
    weights = float(model.model.layers[0].mlp.up_proj.weight.double().sum())
    SEEN.extend((weights, tuple(row)) for row in kwargs["input_ids"].tolist())

class Counting(ModelAdapter):
    name = "counting"

    def load_model(self, model_id, **options):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_id, dtype="float32").eval()
        model.register_forward_pre_hook(see, with_kwargs=True)
        return model

    def load_tokenizer(self, model_id, **options):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_id)
"""


@pytest.fixture
def run(invarlock: Callable[..., Done], config: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """Run the demo model over windows of its text; keyword arguments are keys of the section dataset."""

    def report_of(*settings: str, arguments: tuple[str, ...] = (), **dataset: Any) -> dict[str, Any]:
        path = config(dataset=SMALL | dataset)
        words = [word for setting in settings for word in ("--set", setting)]
        done = invarlock("run", "-c", path, *words, *arguments, "--out", "out", "--force")
        assert done.code in (0, 1), done.err
        report = read_report(Path("out"))
        jsonschema.validate(report, json_schema())
        return report | {"out": done.out, "code": done.code}

    return report_of


@pytest.fixture
def counted(module: Callable[[str, str], Path]) -> Callable[[], dict[float, Counter[tuple[int, ...]]]]:
    """How often each window passed through the models, by the sum of a weight."""
    module("counting", COUNTING)

    def count() -> dict[float, Counter[tuple[int, ...]]]:
        import counting

        found: dict[float, Counter[tuple[int, ...]]] = {}
        for weights, row in counting.SEEN:
            found.setdefault(weights, Counter())[row] += 1
        return found

    return count


@pytest.mark.parametrize(("bits", "ending"), [(8, "accepted"), (2, "rejected")])
def test_what_is_clear_takes_a_few_windows(run, bits: int, ending: str) -> None:
    report = run(f"edit.plan.bitwidth={bits}", seq_len=128)
    metrics = report["metrics"]
    assert report["verdict"]["ending"] == ending
    assert metrics["primary"]["interval"] == "sequence"
    assert metrics["path"][-1]["windows"] == metrics["primary"]["windows"] == len(metrics["windows"]["tokens"]) < 8
    assert [metrics["path"][-1][end] for end in ("low", "high")] == metrics["primary"]["ci"]
    assert report["verdict"]["rests_on"] == f"1 + {metrics['primary']['windows']} windows of the dataset"


def test_what_stays_uncertain_is_inconclusive_and_names_what_would_decide(run) -> None:
    report = run("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", max_n=10)
    metric, path = report["metrics"]["primary"], report["metrics"]["path"]
    assert report["verdict"]["ending"] == "inconclusive" and report["code"] == 1
    assert [look["windows"] for look in path] == [4, 6, 8, 10]
    assert all(look["low"] <= 1.03 < look["high"] for look in path)
    option = f"--set dataset.max_n={metric['undecided']['windows']}"
    assert f"; {option} would decide" in report["out"].splitlines()[0]


def test_where_the_text_ends_more_of_it_is_asked_for(run) -> None:
    lines = TEXT.read_text().splitlines()[:8]
    Path("short.jsonl").write_text("\n".join(lines))
    text = {"provider": "local_jsonl", "path": "short.jsonl", "seq_len": 64}
    report = run("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", **text)
    assert len(report["metrics"]["windows"]["tokens"]) < 256
    assert report["metrics"]["primary"]["undecided"]["option"] == "text"
    assert "give more text" in report["out"].splitlines()[0]
    assert report["config"]["dataset"]["final_n"] == "auto"


def test_a_number_measures_so_many_windows_as_before(run) -> None:
    report = run("edit.plan.bitwidth=8", final_n=6)
    assert report["metrics"]["primary"]["interval"] == "fixed"
    assert report["metrics"]["path"] == [] and report["metrics"]["predictions"]["bounds"] is None
    assert report["metrics"]["primary"]["windows"] == 6


def test_attempts_share_the_windows_of_the_baseline(run, counted) -> None:
    report = run(
        "model.adapter=counting", "plugins=[counting]", "edit.plan.bitwidth=2", "edit.retry.max_attempts=4",
        "eval.max_pm_ratio=1.03", max_n=20,
    )  # fmt: skip
    assert len(report["attempts"]) > 2
    baseline, *attempts = counted().values()
    assert len(attempts) == len(report["attempts"])
    assert {*baseline.values()} == {1}
    assert all({*attempt.values()} == {1} and attempt.keys() <= baseline.keys() for attempt in attempts)


def test_a_comparison_measures_little_more_than_the_decision_needs(invarlock, config, counted) -> None:
    subject = save(rtn(4), dtype="float32")
    path = config(dataset=SMALL, eval={"max_pm_ratio": 1.06})
    sides = ("--baseline", BASELINE, "--subject", subject, "--set", "model.adapter=counting", "-p", "counting")
    done = invarlock("compare", "-c", path, *sides, "--out", "out")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    path_of = [look["windows"] for look in report["metrics"]["path"]]
    assert report["verdict"]["ending"] == "accepted" and len(path_of) > 2
    baseline, edited = counted().values()
    assert {*baseline.values()} == {*edited.values()} == {1}
    # With one preview window each; the decision needs more windows than the last look but one saw.
    assert len(baseline) + len(edited) - 2 <= MOST_TIMES * 2 * (path_of[-2] + 1)


@pytest.mark.parametrize("most", [4, 5, 30, 256, 1000])
def test_looks_come_after_a_fifth_more_at_most(most: int) -> None:
    found = looks(most, first=4, growth=1.2, least=2)
    assert found[-1] == most and (found[0] == 4 or most < 6)
    assert all(2 <= other - one < max(2, 0.2 * one) + 2 for one, other in pairwise(found))
    shared = looks(most, first=4, growth=1.2, least=3)
    assert shared[-1] == most and all(other - one >= 3 for one, other in pairwise([0, *shared]))


def test_a_streamed_run_takes_longer_steps(run) -> None:
    report = run("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", arguments=("--stream",), max_n=20)
    assert [look["windows"] for look in report["metrics"]["path"]] == [16, 20]


def test_written_windows_do_not_depend_on_how_many_there_may_be(run) -> None:
    limits = ("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", "guards.order=[invariants]")
    few, more = (
        run(*limits, provider="generated", seq_len=24, max_n=most)["metrics"]["windows"]["baseline"] for most in (5, 9)
    )
    assert len(few) == 5 and more[:5] == few


def test_a_report_of_steps_is_verified(run, invarlock) -> None:
    run("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", max_n=6)
    done = invarlock("verify", "out", "--baseline", BASELINE)
    assert done.code == 0 and "losses of the baseline model, measured again" in done.out, done.out
    report = read_report(Path("out"))
    report["metrics"]["path"][1]["high"] = 1.0
    Path("out/report.json").write_text(json.dumps(report))
    assert "metrics.path[1].high" in invarlock("verify", "out").out


def test_windows_of_one_document_count_as_one(run, invarlock) -> None:
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    pieces = (text[start : start + 150] for text in texts for start in range(0, 1500, 150))
    Path("pieces.jsonl").write_text("\n".join(json.dumps({"text": piece}) for piece in pieces))
    text = {"provider": "local_jsonl", "path": "pieces.jsonl", "seq_len": 16, "max_n": 64}
    report = run("edit.plan.bitwidth=4", "eval.max_pm_ratio=1.03", **text)
    windows, path = report["metrics"]["windows"], report["metrics"]["path"]
    assert len({*windows["documents"]}) < len(windows["documents"]) == path[-1]["windows"]
    rises = np.array(windows["edited"]) - windows["baseline"]
    units = by_document(rises, np.array(windows["tokens"]), np.array(windows["documents"]))
    assert np.exp(mean_bounds(*units, level=0.965)) == pytest.approx(report["metrics"]["primary"]["ci"])
    assert invarlock("verify", "out").code == 0


def compared(name: str, invarlock: Callable[..., Done], *settings: str) -> dict[str, Any]:
    """A tiny model of a class, and itself rounded to 4 bits."""
    model = MODELS[name]()
    tiny_models.save(model, Path("baseline"))
    quantize_model(model, Plan(bitwidth=4, scope="all"))
    tiny_models.save(model, Path("subject"))
    words = [word for each in (*settings, "dataset.seq_len=32", "model.device=cpu") for word in ("--set", each)]
    sides = ("--baseline", "baseline", "--subject", "subject")
    done = invarlock("compare", *sides, "--dataset", TEXT, *words, "--out", "out", "--force")
    assert done.code in (0, 1), done.err
    assert invarlock("verify", "out", *sides).code == 0
    return read_report(Path("out"))["metrics"]


def test_samples_of_several_steps_belong_to_their_windows(invarlock) -> None:
    first = compared("BertModel", invarlock, "dataset.max_n=4")["path"][-1]
    limit = f"eval.metric.limit={(first['figure'] + first['high']) / 2}"
    metrics = compared("BertModel", invarlock, "dataset.max_n=12", limit)
    assert metrics["primary"]["interval"] == "sequence" and len(metrics["path"]) > 1
    assert len(metrics["windows"]["tokens"]) == metrics["path"][-1]["windows"]


def test_a_share_of_samples_is_of_a_fixed_number_of_windows(invarlock) -> None:
    metrics = compared("BertForSequenceClassification", invarlock)
    assert (metrics["primary"]["interval"], metrics["primary"]["windows"], metrics["path"]) == ("fixed", PLANNED, [])


# -- one look ----------------------------------------------------------------------------------------------------------

TOKENS = np.full(64, 100)


def passes(rises: Any, kl: Any = 0.0) -> tuple[PassResult, PassResult]:
    """Of windows whose loss rises so much per token; ``kl`` is of each token."""
    tokens = TOKENS[: len(rises)]
    scored = int(tokens.sum())
    flat = np.zeros(scored)
    changes = TokenChanges(np.broadcast_to(kl, scored).astype(float), flat > 0, flat, flat + 1)
    before = PassResult(3.0 * tokens, tokens)
    return before, PassResult(before.losses + np.asarray(rises) * tokens, tokens, changes=changes)


def judging(windows: int) -> Judging:
    return Judging(1.1, None, 0.95, 2000, 0, improving=False, windows=windows)


def decided(rises: Any, kl: Any = 0.0, *, changed: bool = True) -> bool:
    given = judging(len(rises))
    return look_at(Causal(), *passes(rises, kl), given, Stopping(0.95), changed=changed).decided


def test_an_edit_that_leaves_windows_untouched_is_not_accepted_after_a_few() -> None:
    assert decided(np.zeros(4), changed=False)
    assert not decided(np.zeros(4)) and not decided([0.001, 0.001, 0.0, 0.0012])
    assert decided(np.zeros(LEAST_UNTOUCHED))
    assert decided([0.5, 0.5, 0.0, 0.5, 0.5, 0.6, 0.5, 0.4]), "harm is certain even so"


def test_every_limit_that_rejects_has_to_be_certain() -> None:
    rises = np.random.default_rng(1).normal(0.01, 0.004, 16)
    assert decided(rises)
    # 5 % of the tokens of some windows, and none of the others.
    some = np.zeros(1600)
    some[:100] = 0.5
    assert not decided(rises, some)
    assert decided(rises, 1.0), "each limit on the divergence is broken"
    assert not decided(rises[:2], 0.0), "two windows do not bound anything"


def test_a_share_of_no_token_is_bounded_by_the_number_of_tokens() -> None:
    before, after = passes([0.001, 0.002])
    bounds = prediction_bounds(before, after, limits_of(1.1, np.empty(0), flips=0.5), Stopping(0.95))
    assert bounds["kl_p99"].high == pytest.approx(np.log(40) / 200)
    assert bounds["kl_p99"].side == 0 and bounds["kl_p99"].windows == 4
    assert bounds["kl_p95"].side == -1


def test_a_straddled_limit_of_the_predictions_is_inconclusive() -> None:
    before, after = passes(np.random.default_rng(1).normal(0.01, 0.004, 16), np.linspace(0, 0.2, 1600))
    limits = limits_of(1.1, np.empty(0), flips=0.5)
    figures = dict.fromkeys(["kl_mean", "kl_p95", "kl_p99", "window_p95", "flips", "broken"], 0.01)
    figures |= {"margin_baseline": 1.0, "margin_loss": 0.0}
    found = judge_figures(figures, limits, bounds=prediction_bounds(before, after, limits, Stopping(0.95)))
    assert found.action is Action.ROLLBACK and found.undecided is not None
    assert found.undecided.message.startswith("mean KL divergence not certain to be within its limit; ")
