"""Paired statistics over windows: a ratio of perplexities, a mean, a share, each with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainccinv, betaincinv, stdtrit

Interval = tuple[float, float]

BATCH_NUMBERS = 2**20
NO_SPREAD = 1e-9
"""The share of the sample's standard error below which that of a draw is rounding: its windows are all alike."""


def exp(value: float) -> float:
    """The exponential of a float, infinite where it overflows."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def mean_per_token(totals: NDArray[np.float64], tokens: NDArray[np.int64], axis: int = -1) -> Any:
    """Sum of window totals over sum of window tokens: the mean in which each token weighs the same."""
    return totals.sum(axis=axis) / tokens.sum(axis=axis)


def ratio_interval(
    differences: NDArray[np.float64], tokens: NDArray[np.int64], *, level: float, reps: int, seed: int
) -> Interval | None:
    """A confidence interval of exp(sum of differences / sum of tokens): exp of that of the mean."""
    interval = mean_interval(differences, tokens, level=level, reps=reps, seed=seed)
    return None if interval is None else (exp(interval[0]), exp(interval[1]))


def share_interval(differing: int, count: int, *, level: float) -> Interval:
    """The exact confidence interval of a share (Clopper and Pearson 1934): each end holds at least its half of the
    level, however small the share or the count."""
    # A report that somebody changed may count anything.
    differing, tail = min(max(differing, 0), count), (1 - level) / 2
    low = float(betaincinv(differing, count - differing + 1, tail)) if differing else 0.0
    high = float(betainccinv(differing + 1, count - differing, tail)) if differing < count else 1.0
    return low, high


def mean_interval(
    differences: NDArray[np.float64], tokens: NDArray[np.int64], *, level: float, reps: int, seed: int
) -> Interval | None:
    """A confidence interval of sum of differences / sum of tokens, never narrower than Student's t.

    It is the wider, at either end, of t with n - 1 degrees of freedom and of the studentized bootstrap, which draws
    whole windows (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5). BCa and percentile
    intervals are those of a known variance: with few windows far too narrow. t holds for normal windows; where a few
    windows rise much more than others its upper end is too low, and the bootstrap sees the skew (Hall 1988,
    "Theoretical Comparison of Bootstrap Confidence Intervals"). ``benchmarks/coverage.py`` measures both.

    Where all windows agree, no draw can differ, and it is that point.

    :param differences: (n,), edited minus baseline loss of each window, in nats; all finite.
    :param tokens: (n,), the scored tokens of each window; a window without any says nothing.
    :param level: of confidence, between 0 and 1.
    :param reps: number of bootstrap draws.
    :returns: the two ends, or None for fewer than two windows: one window says nothing of how windows differ.
    """
    scored = tokens > 0
    differences, tokens = differences[scored], tokens[scored]
    if len(differences) < 2:
        return None
    point = float(mean_per_token(differences, tokens))
    if np.all(differences * tokens[0] == differences[0] * tokens):
        return point, point
    error = standard_error(differences, tokens)
    tails = np.array([(1 + level) / 2, (1 - level) / 2])
    low, high = point - stdtrit(len(differences) - 1, tails) * error
    drawn = _pivots(differences, tokens, reps, seed)
    if len(drawn):
        low_drawn, high_drawn = point - np.quantile(drawn, tails) * error
        low, high = min(low, low_drawn), max(high, high_drawn)
    return float(low), float(high)


def standard_error(differences: NDArray[np.float64], tokens: NDArray[np.int64]) -> Any:
    """Standard error of the mean per token, over the last axis: the jackknife's, at least that of the linearized ratio.

    The first is e_i / (T - t_i) squared and summed, times (n - 1) / n, with the residuals e_i = d_i - t_i * mean and T
    tokens in all. The second (Cochran 1977, "Sampling Techniques", section 6.4) has the average window in place of t_i;
    it is too small where one window holds much of the tokens. They are the same for windows of one size.
    """
    windows = differences.shape[-1]
    total = tokens.sum(axis=-1, keepdims=True)
    residuals = differences - tokens * mean_per_token(differences, tokens)[..., None]
    shifts = residuals / (total - np.maximum(tokens, total / windows))
    return np.sqrt((windows - 1) / windows * np.square(shifts).sum(axis=-1))


def _pivots(differences: NDArray[np.float64], tokens: NDArray[np.int64], reps: int, seed: int) -> NDArray[np.float64]:
    """Studentized deviations of draws from the sample; draws of windows that all agree are left out."""
    point, error = mean_per_token(differences, tokens), standard_error(differences, tokens)
    found = []
    for drawn in _draws(len(differences), reps, seed):
        means = mean_per_token(differences[drawn], tokens[drawn])
        errors = standard_error(differences[drawn], tokens[drawn])
        spread = errors > NO_SPREAD * error
        found.append((means[spread] - point) / errors[spread])
    return np.concatenate(found)


def _draws(windows: int, reps: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Places of windows, (draws, windows), as many at a time as memory is spent on."""
    rng, at_once = np.random.default_rng(seed), max(1, BATCH_NUMBERS // windows)
    for start in range(0, reps, at_once):
        yield rng.integers(windows, size=(min(at_once, reps - start), windows))
