"""A confidence sequence for the mean rise of the loss: it holds however often one looks, and so tells when to stop.

An interval for a fixed number of windows does not: whoever looks after each window, and stops as soon as the limit is
outside, is wrong far more often than its level says.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from invarlock.evaluation.statistics import mean_per_token, standard_error

EFFECTS = 10.0
"""Variance of the mixture's effects, in units of a window's own standard deviation: after 4 windows, where the first
look is, 10 gives a narrower interval than 1, 5, 25 or 100, and after 256 one that is 10 % wider than 1 does."""


KEPT = 0.7
"""Share of the error that a sequence may spend; the rest is for windows that are not normal. Of resampled windows of
SmolLM2 at int6, which lean to one side, it otherwise rejects 3.1 % at the limit, where 2.5 % are allowed."""


def sequence_level(level: float) -> float:
    """The level of a sequence that is to hold at ``level`` for windows as they are."""
    return 1 - KEPT * (1 - level)


def mean_bounds(
    differences: NDArray[np.float64], tokens: NDArray[np.int64], *, level: float, effects: float = EFFECTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both ends of the t-mixture confidence sequence for sum of differences / sum of tokens, after n windows.

    With t the distance of a mean from the measured one in standard errors, that mean is excluded where

        (1 + k) ** (-1/2) * ((1 + t**2 / (n - 1)) / (1 + t**2 / ((n - 1) (1 + k)))) ** (n / 2) > 1 / (1 - level),

    with k = n * effects: the likelihood ratio of normal windows, mixed over effects that are normal with that variance
    and over every scale (Lai 1976, "On confidence sequences"; Wang and Ramdas 2023, "Anytime-valid t-tests and
    confidence sequences for Gaussian means with unknown variance"). It is a martingale where the mean is the true one,
    so that it ever exceeds 1 / (1 - level) with a probability of at most 1 - level. Solved for t:

        t**2 = (n - 1) (r - 1) (1 + k) / (1 + k - r), with r = ((1 + k) / (1 - level)**2) ** (1/n).

    Where 1 + k <= r no mean can be excluded yet, and the ends are infinite: with fewer than 3 windows at 95 %. The
    standard error is that of :func:`~invarlock.evaluation.statistics.ratio_interval`. For windows of one size the level
    is exact; for unequal ones it is an approximation.

    :param differences: (..., n), n at least 1: edited minus baseline loss of each window, in nats; all finite.
        Windows of one document depend on each other: give :func:`by_document` of them.
    :param tokens: the scored tokens of each, at least one.
    :param level: of confidence, in each of the leading axes, over all n together.
    :raises ValueError: the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    mean = mean_per_token(differences, tokens)
    reach = errors_reached(differences.shape[-1], level, effects)
    if math.isinf(reach):
        return np.full_like(mean, -np.inf), np.full_like(mean, np.inf)
    width = reach * standard_error(differences, tokens)
    return mean - width, mean + width


def by_document(
    differences: NDArray[np.float64], tokens: NDArray[np.int64], documents: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums over the windows of each document, in the order of their numbers, without those that have no scored token.

    :param documents: (n,), the number of the document that each window is of.
    """
    _, places = np.unique(documents, return_inverse=True)
    totals = np.bincount(places, weights=differences).astype(np.float64)
    counts = np.bincount(places, weights=tokens).astype(np.int64)
    return totals[counts > 0], counts[counts > 0]


def errors_reached(windows: int, level: float, effects: float = EFFECTS) -> float:
    """Standard errors from the mean to either end."""
    spread = 1 + windows * effects
    ratio = (spread / (1 - level) ** 2) ** (1 / windows)
    if spread <= ratio:
        return math.inf
    return math.sqrt((windows - 1) * (ratio - 1) * spread / (spread - ratio))
