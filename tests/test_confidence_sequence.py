"""The confidence sequence of the ratio: its formula, and that it holds at any stopping time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate, optimize, stats

from invarlock.evaluation.confidence_sequence import EFFECTS, by_document, mean_bounds

LOOKS = (4, 8, 16, 32, 64)
RUNS = 10_000


def e_value(rises: NDArray[np.float64], mean: float) -> float:
    """The mixture itself, by numerical integration: normal effects in units of sigma, sigma by d sigma / sigma.

    For x with the likelihood sigma**-n exp(-sum((x - mean - effect sigma)**2) / (2 sigma**2)) the integral over sigma
    is done in its logarithm, and the likelihood without an effect is the denominator.
    """
    deviations = rises - mean
    count, total, squares = len(rises), deviations.sum(), (deviations**2).sum()
    scale = math.sqrt(squares / count)

    def likelihood(log_sigma: float, effect: float) -> float:
        sigma = scale * math.exp(log_sigma)
        rest = (squares - 2 * effect * sigma * total) / sigma**2 + count * effect**2
        return math.exp(-count * log_sigma - rest / 2 + count / 2)

    def over_scales(effect: float) -> float:
        return integrate.quad(likelihood, -8, 8, args=(effect,), limit=400, points=[0.0], epsrel=1e-9)[0]

    deviation = math.sqrt(EFFECTS)
    center = total / count / scale
    mixed = integrate.quad(
        lambda effect: over_scales(effect) * stats.norm.pdf(effect, scale=deviation),
        -6 * deviation, 6 * deviation, limit=400, points=[0.0, center], epsrel=1e-7,
    )[0]  # fmt: skip
    return mixed / over_scales(0.0)


@pytest.mark.parametrize("count", [4, 7])
def test_the_ends_are_those_of_the_integrated_mixture(count: int) -> None:
    rises = np.random.default_rng(count).normal(0.02, 0.03, count)
    low, high = mean_bounds(rises * 100, np.full(count, 100), level=0.95)
    error = rises.std(ddof=1) / math.sqrt(count)

    def excess(mean: float) -> float:
        return math.log(e_value(rises, mean) * 0.05)

    middle = rises.mean()
    assert low == pytest.approx(optimize.brentq(excess, middle - 30 * error, middle, rtol=1e-7), rel=1e-4)
    assert high == pytest.approx(optimize.brentq(excess, middle, middle + 30 * error, rtol=1e-7), rel=1e-4)


def stopped(differences: NDArray[np.float64], tokens: NDArray[np.int64], truth: float, *, every: bool) -> float:
    """The share of runs in which the true mean is outside at some look."""
    looks = range(2, differences.shape[1] + 1) if every else LOOKS
    outside = np.zeros(len(differences), dtype=bool)
    for count in looks:
        low, high = mean_bounds(differences[:, :count], tokens[:, :count], level=0.95)
        outside |= (truth < low) | (high < truth)
    return float(outside.mean())


@pytest.mark.parametrize("every", [True, False])
def test_the_true_mean_is_seldom_outside_however_often_one_looks(every: bool) -> None:
    rng = np.random.default_rng(1)
    tokens = np.full((RUNS, 64), 100)
    differences = tokens * rng.normal(0.02, 0.03, tokens.shape)
    share = stopped(differences, tokens, 0.02, every=every)
    assert share <= 0.05
    fixed = sum(
        abs(stats.ttest_1samp(differences[:, :count] / 100, 0.02, axis=1).statistic) > stats.t.ppf(0.975, count - 1)
        for count in LOOKS
    )
    assert (fixed > 0).mean() > 0.1, "the runs would not show an interval that is too narrow"


@pytest.mark.parametrize("rises", ["normal", "lognormal"])
def test_unequal_windows_and_skewed_rises_keep_the_level(rises: str) -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(20, 256, (RUNS, 64))
    drawn = rng.normal(0, 1, tokens.shape) if rises == "normal" else rng.lognormal(0, 0.25, tokens.shape)
    truth = 0.0 if rises == "normal" else math.exp(0.25**2 / 2)
    differences = tokens * (truth + (drawn - truth) * np.sqrt(128 / tokens))
    assert stopped(differences, tokens, truth, every=False) <= 0.05


def test_windows_of_one_document_count_once() -> None:
    rng = np.random.default_rng(3)
    documents, windows = 16, 4
    numbers = np.repeat(np.arange(documents), windows)
    tokens = np.full(len(numbers), 100)
    outside = {"windows": 0, "documents": 0}
    for _ in range(1000):
        differences = 100.0 * (np.repeat(rng.normal(0, 1, documents), windows) + rng.normal(0, 0.1, len(numbers)))
        together = by_document(differences, tokens, numbers)
        for name, pair in {"windows": (differences, tokens), "documents": together}.items():
            low, high = mean_bounds(*pair, level=0.95)
            outside[name] += not low <= 0 <= high
    assert outside["documents"] <= 50 < outside["windows"]


def test_documents_are_summed_in_the_order_of_their_numbers() -> None:
    summed = by_document(np.array([1.0, 2.0, 4.0, 0.0]), np.array([1, 1, 1, 0]), np.array([7, 3, 7, 9]))
    assert [part.tolist() for part in summed] == [[2.0, 5.0], [1, 2]]


rise = st.floats(-1e3, 1e3).map(lambda value: round(value, 6))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(rise, st.integers(1, 500)), min_size=2, max_size=40), st.floats(0.5, 0.999))
def test_it_is_never_narrower_than_students_t(windows: list[tuple[float, int]], level: float) -> None:
    rises, tokens = np.array([rise for rise, _ in windows]), np.array([count for _, count in windows])
    differences, count = rises * tokens, len(tokens)
    low, high = mean_bounds(differences, tokens, level=level)
    point = differences.sum() / tokens.sum()
    error = math.sqrt(count / (count - 1) * ((differences - tokens * point) ** 2).sum()) / tokens.sum()
    reach = stats.t.ppf((1 + level) / 2, count - 1) * error
    slack = 1e-9 * (1 + abs(point) + reach)
    assert low <= point - reach + slack and high >= point + reach - slack


@given(st.integers(0, 2**32), st.integers(3, 60))
def test_a_higher_level_is_wider(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 200, count)
    differences = tokens * rng.normal(0, 1, count)
    ends = [mean_bounds(differences, tokens, level=level) for level in (0.8, 0.95, 0.99)]
    assert ends[2][0] <= ends[1][0] <= ends[0][0] <= ends[0][1] <= ends[1][1] <= ends[2][1]


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_windows_exclude_nothing(count: int) -> None:
    low, high = mean_bounds(np.ones((3, count)), np.ones((3, count), dtype=np.int64), level=0.95)
    assert low.tolist() == [-math.inf] * 3 and high.tolist() == [math.inf] * 3


def test_windows_that_agree_give_a_point() -> None:
    low, high = mean_bounds(np.zeros(4), np.full(4, 100), level=0.95)
    assert low == high == 0


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, math.nan])
def test_a_level_is_between_0_and_1(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        mean_bounds(np.ones(4), np.ones(4, dtype=np.int64), level=level)
