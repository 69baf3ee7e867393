"""Paired statistics over windows: how many times worse is the edited model, and how sure is that."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]

BATCH_NUMBERS = 2**20


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
    """A confidence interval of exp(sum of differences / sum of tokens), from a bootstrap that draws whole windows.

    Bias-corrected and accelerated (Efron 1987, "Better Bootstrap Confidence Intervals"), or percentile where that is
    not defined. Both commute with the exponential, so the interval is sought for the logarithm. Where all windows
    agree, no draw can differ, and the interval is that point.

    :param differences: (n,), edited minus baseline loss of each window, in nats; all finite.
    :param tokens: (n,), the scored tokens of each window.
    :param level: of confidence, between 0 and 1.
    :param reps: how often the windows are drawn.
    :returns: the two ends, or None for fewer than two windows: one window says nothing of how windows differ.
    """
    if len(differences) < 2:
        return None
    if np.all(differences * tokens[0] == differences[0] * tokens):
        point = exp(mean_per_token(differences, tokens))
        return point, point
    bootstrap = partial(
        stats.bootstrap,
        (differences, tokens),
        mean_per_token,
        paired=True,
        vectorized=True,
        confidence_level=level,
        batch=max(1, BATCH_NUMBERS // len(differences)),
    )
    # Where BCa is not defined it gives NaN, which is looked at; the warnings only say so again.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        drawn = bootstrap(n_resamples=reps, method="BCa", rng=np.random.default_rng(seed))
        if not np.isfinite(drawn.confidence_interval).all():
            drawn = bootstrap(n_resamples=0, method="percentile", bootstrap_result=drawn)
    low, high = drawn.confidence_interval
    return exp(low), exp(high)
