"""The ratio, its interval, and the verdict on it."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy import stats

from invarlock.core.errors import UsageError
from invarlock.core.plain import plain
from invarlock.core.results import Action
from invarlock.evaluation.metric import compare
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.power import detectable, windows_to_detect
from invarlock.evaluation.results import MetricResult
from invarlock.evaluation.statistics import ratio_interval, share_interval
from invarlock.evaluation.task import Metric

TOKENS = np.array([255, 255, 200, 31, 128, 255, 90, 10])
LOSSES = TOKENS * np.array([2.5, 2.8, 2.4, 3.3, 2.2, 2.6, 2.9, 2.0])
RISES = np.array([0.03, 0.05, 0.02, 0.2, 0.04, 0.01, -0.02, 0.3])


def interval(differences: Any, tokens: Any = TOKENS, **settings: Any) -> tuple[float, float] | None:
    return ratio_interval(
        np.asarray(differences, dtype=float), np.asarray(tokens), **{"level": 0.95, "reps": 1000, "seed": 0} | settings
    )


def judged(edited: Any, baseline: Any = LOSSES, tokens: Any = TOKENS, limit: float = 1.1) -> MetricResult:
    one, other = (PassResult(np.asarray(losses, dtype=float), np.asarray(tokens)) for losses in (baseline, edited))
    return compare(one, other, kind="perplexity", limit=limit, level=0.95, reps=1000, seed=0)


# The ratio


def test_every_token_weighs_the_same() -> None:
    metric = judged(LOSSES + RISES * TOKENS)
    assert metric.ratio == pytest.approx(math.exp(sum(RISES * TOKENS) / sum(TOKENS)))
    assert metric.ratio != pytest.approx(math.exp(RISES.mean()), rel=1e-3)
    assert metric.baseline == pytest.approx(math.exp(sum(LOSSES) / sum(TOKENS)))
    assert metric.ratio == pytest.approx(metric.edited / metric.baseline)
    assert (metric.windows, metric.tokens) == (8, sum(TOKENS))


# The interval


def test_the_interval_is_the_wider_of_t_and_the_studentized_bootstrap() -> None:
    """By hand, from Efron and Tibshirani 1993, section 12.5, with other draws: equal but for chance."""
    tokens = np.full(8, 100)
    differences = RISES * tokens
    draws = RISES[np.random.default_rng(7).integers(8, size=(200_000, 8))]
    draws = draws[draws.std(axis=1) > 1e-9]
    pivots = (draws.mean(axis=1) - RISES.mean()) / draws.std(axis=1, ddof=1) * math.sqrt(8)
    error = RISES.std(ddof=1) / math.sqrt(8)
    student = stats.t.interval(0.95, 7, RISES.mean(), error)
    studentized = RISES.mean() - np.quantile(pivots, [0.975, 0.025]) * error
    # A few windows rise much more than the others, so that t is wider below, and the bootstrap above.
    assert student[0] < studentized[0] and student[1] < studentized[1]
    expected = (math.exp(student[0]), math.exp(studentized[1]))
    assert interval(differences, tokens, reps=50_000) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("windows", [2, 3, 5, 9, 40])
def test_the_interval_is_never_narrower_than_students_t(windows: int) -> None:
    rng = np.random.default_rng(windows)
    for _ in range(20):
        tokens = rng.integers(20, 256, windows)
        differences = tokens * rng.normal(0.02, 0.03, windows)
        point = differences.sum() / tokens.sum()
        residuals = differences - tokens * point
        # Cochran 1977, section 6.4: the standard error of a ratio.
        error = math.sqrt(windows / (windows - 1) * (residuals**2).sum()) / tokens.sum()
        student = np.exp(stats.t.interval(0.95, windows - 1, point, error))
        low, high = interval(differences, tokens) or (0, 0)
        assert low <= student[0] * (1 + 1e-12) and high >= student[1] * (1 - 1e-12)


def test_the_seed_decides_the_interval() -> None:
    assert interval(RISES * TOKENS) == interval(RISES * TOKENS)
    assert interval(RISES * TOKENS) != interval(RISES * TOKENS, seed=1)


def test_a_higher_level_is_wider() -> None:
    narrow, wide = interval(RISES * TOKENS, level=0.8), interval(RISES * TOKENS, level=0.99)
    assert narrow is not None and wide is not None
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_size_of_batches_changes_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = interval(RISES * TOKENS)
    monkeypatch.setattr("invarlock.evaluation.statistics.BATCH_NUMBERS", 100)
    assert interval(RISES * TOKENS) == pytest.approx(whole, rel=1e-12)


def test_windows_that_agree_give_a_point() -> None:
    assert interval(np.zeros(8)) == (1.0, 1.0)
    low, high = interval(0.5 * np.array([2, 4, 8]), [2, 4, 8]) or (0, 0)
    assert low == high == pytest.approx(math.exp(0.5))


def test_equal_differences_of_unequal_windows_are_no_point() -> None:
    low, high = interval([1, 1, 1, 1], [2, 4, 8, 16]) or (0, 0)
    assert low < math.exp(4 / 30) < high


def test_fewer_than_two_windows_give_no_interval() -> None:
    assert interval([0.1], [5]) is None
    assert interval([], []) is None


def test_windows_without_a_scored_token_say_nothing() -> None:
    assert interval([0.1, 0.3, 0.0], [5, 7, 0]) == interval([0.1, 0.3], [5, 7])
    assert interval([0.1, 0.0], [5, 0]) is None


@pytest.mark.parametrize("differences", [[0.0, 1.0], [0, 0, 0, 0, 0, 3.0], [1e-300, 0.0, 0.0], [1e5, -1e5, 3e5]])
def test_where_draws_agree_there_are_still_two_ends(differences: list[float]) -> None:
    ends = interval(differences, [10] * len(differences))
    assert ends is not None
    assert not any(math.isnan(end) for end in ends)
    assert ends[0] <= ends[1]


@pytest.mark.parametrize("rises", ["normal", "lognormal"])
@pytest.mark.parametrize("windows", [2, 3, 5, 10])
def test_the_true_ratio_is_seldom_above_the_interval(windows: int, rises: str) -> None:
    """A small part of ``benchmarks/coverage.py``, which finds at most 4 %: here with room for chance, and seeded."""
    rng = np.random.default_rng(1)
    truth = 0.02 if rises == "normal" else math.exp(0.25**2 / 2)
    above = 0
    for sample in range(500):
        tokens = np.full(windows, 128) if sample % 2 else rng.integers(20, 256, windows)
        drawn = rng.normal(truth, 0.02, windows) if rises == "normal" else rng.lognormal(0, 0.25, windows)
        _, high = interval(tokens * (truth + (drawn - truth) * np.sqrt(128 / tokens)), tokens, reps=300) or (0, 0)
        above += math.exp(truth) > high
    assert above / 500 <= 0.05


# The verdict


def test_the_upper_end_decides_not_the_point() -> None:
    edited = LOSSES + RISES * TOKENS
    sure = judged(edited)
    assert sure.ci is not None and sure.ratio is not None
    between = (sure.ratio + sure.ci[1]) / 2
    assert judged(edited, limit=sure.ci[1]).action is Action.CONTINUE
    refused = judged(edited, limit=between)
    assert refused.action is Action.ROLLBACK
    assert refused.ratio is not None and refused.ratio < refused.limit
    assert "upper end is above the limit" in refused.message


@pytest.mark.parametrize(("end", "action"), [(0, Action.ROLLBACK), (1, Action.CONTINUE)])
def test_an_interval_that_touches_the_limit_is_undecided_only_where_its_lower_end_does(
    end: int, action: Action
) -> None:
    edited = LOSSES + RISES * TOKENS
    interval = judged(edited).ci
    assert interval is not None
    touching = judged(edited, limit=interval[end])
    assert touching.action is action
    assert (touching.undecided is not None) is (end == 0)


def test_an_interval_above_the_limit_is_decided() -> None:
    metric = judged(LOSSES + RISES * TOKENS, limit=1.0)
    assert metric.ci is not None and metric.ci[0] > 1.0
    assert (metric.action, metric.undecided) == (Action.ROLLBACK, None)


def test_what_so_many_windows_tell_and_how_many_would_decide() -> None:
    """By hand: the standard error of windows of one size is that of a mean, t has n - 1 degrees of freedom."""
    tokens = np.full(8, 100)
    metric = judged(tokens * 2.5 + RISES * 100, tokens * 2.5, tokens, limit=1.07)
    spread, gap = RISES.std(ddof=1), math.log(1.07) - RISES.mean()

    def reach(count: int) -> float:
        return (stats.t.ppf(0.975, count - 1) + stats.t.ppf(0.8, count - 1)) * spread / math.sqrt(count)

    assert metric.undecided is not None
    assert metric.undecided.below == pytest.approx(1.07 / math.exp(reach(8)))
    assert metric.undecided.above == pytest.approx(1.07 * math.exp(reach(8)))
    needed = metric.undecided.windows
    assert needed is not None and reach(needed) <= abs(gap) < reach(needed - 1)
    assert f"--set dataset.final_n={needed} would decide" in metric.message


def test_windows_without_a_scored_token_are_asked_for_too() -> None:
    tokens = np.full(8, 100)
    metric = judged(tokens * 2.5 + RISES * 100, tokens * 2.5, tokens, limit=1.07)
    halved = judged(
        [*(tokens * 2.5 + RISES * 100), *[0] * 8], [*(tokens * 2.5), *[0] * 8], [*tokens, *[0] * 8], limit=1.07
    )
    assert metric.undecided is not None and metric.undecided.windows is not None and halved.undecided is not None
    assert halved.undecided.below == metric.undecided.below
    assert halved.undecided.windows == 2 * metric.undecided.windows


def test_a_ratio_at_the_limit_is_decided_by_no_number_of_windows() -> None:
    metric = judged(LOSSES + RISES * TOKENS, limit=math.exp((RISES * TOKENS).sum() / TOKENS.sum()))
    assert metric.undecided is not None and metric.undecided.windows is None
    assert metric.message.endswith("it is at the limit") and "final_n" not in metric.message


@pytest.mark.parametrize("windows", [5, 12])
def test_the_effect_that_windows_detect_is_found_in_four_of_five_samples(windows: int) -> None:
    told = detectable(0.03 / math.sqrt(windows), windows, level=0.95)
    needed = windows_to_detect(0.9 * told, 0.03 / math.sqrt(windows), windows, level=0.95)
    assert needed is not None and needed > windows
    rng, draws = np.random.default_rng(windows), 20_000
    for count, rise in ((windows, told), (needed, 0.9 * told)):
        drawn = rng.normal(rise, 0.03, (draws, count))
        found = stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05
        assert 0.77 <= found.mean() <= 0.9  # a whole number of windows may find more


def test_the_message_has_the_numbers() -> None:
    assert judged(LOSSES).message == (
        "perplexity 13.213 -> 13.213, ratio 1 (95 % interval 1 to 1) on 8 windows: within the limit 1.1"
    )


def test_an_edited_model_that_is_not_finite_is_rolled_back() -> None:
    for bad in (math.nan, math.inf):
        edited = LOSSES.copy()
        edited[3] = bad
        metric = judged(edited)
        assert (metric.action, metric.edited, metric.ratio, metric.ci) == (Action.ROLLBACK, None, None, None)
        assert metric.baseline is not None
        assert "-> not finite on 8 windows: the edited model's loss is not finite" in metric.message


def test_a_baseline_that_is_not_finite_judges_nothing() -> None:
    for bad in (math.nan, math.inf):
        metric = judged(LOSSES, baseline=[bad, *LOSSES[1:]])
        assert (metric.action, metric.baseline, metric.ratio, metric.ci) == (Action.ABORT, None, None, None)
        assert "not measured" in metric.message
    assert judged([0, 0], [0, 0], tokens=[0, 0]).action is Action.ABORT


def test_one_window_is_not_measured_and_not_accepted() -> None:
    metric = judged([25.0], [25.0], tokens=[10])
    assert (metric.action, metric.ratio, metric.ci) == (Action.ROLLBACK, 1.0, None)
    assert "not measured" in metric.message and "dataset.final_n" in metric.message


def test_a_ratio_too_large_for_a_float_is_infinite() -> None:
    metric = judged(LOSSES + 1000.0 * TOKENS + RISES)
    assert (metric.edited, metric.ratio, metric.action) == (math.inf, math.inf, Action.ROLLBACK)


def test_an_edit_may_also_help() -> None:
    metric = judged(LOSSES * 0.99)
    assert metric.action is Action.CONTINUE
    assert metric.ratio is not None and metric.ratio < 1


def test_passes_over_other_tokens_are_not_compared() -> None:
    other = PassResult(LOSSES, TOKENS + 1)
    with pytest.raises(ValueError, match="same tokens"):
        compare(PassResult(LOSSES, TOKENS), other, kind="perplexity", limit=1.1, level=0.95, reps=10, seed=0)


def test_a_result_fits_a_report() -> None:
    written = plain(asdict(judged(LOSSES)))
    assert written == {
        "kind": "perplexity", "baseline": pytest.approx(13.213, abs=1e-3), "edited": pytest.approx(13.213, abs=1e-3),
        "ratio": 1.0, "ci": [1.0, 1.0], "ci_level": 0.95, "windows": 8, "tokens": 1224, "limit": 1.1, "action": "continue",
        "message": judged(LOSSES).message, "unit": "token", "statistic": "ratio", "undecided": None, "interval": "fixed",
    }  # fmt: skip


def test_a_task_has_one_metric() -> None:
    masked = Metric("masked_perplexity", "ratio")
    masked.check("auto", "masked")
    masked.check("masked_perplexity", "masked")
    with pytest.raises(
        UsageError, match=r"^eval\.metric\.kind: perplexity does not apply to masked models; use masked_perp"
    ):
        masked.check("perplexity", "masked")


def test_a_share_has_the_exact_interval() -> None:
    """Clopper and Pearson 1934: of 10 samples, 0, 1 and all."""
    assert share_interval(0, 10, level=0.95) == (0.0, pytest.approx(0.3085, abs=1e-4))
    assert share_interval(1, 10, level=0.95) == (pytest.approx(0.0025, abs=1e-4), pytest.approx(0.4450, abs=1e-4))
    assert share_interval(10, 10, level=0.95) == (pytest.approx(0.6915, abs=1e-4), 1.0)
