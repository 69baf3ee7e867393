"""Agreement of a classifier's labels with the baseline's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Scores = NDArray[np.float32]
"""Of each sample, (samples, labels). One score alone, as a reranker gives it, has no label of its own."""


def changed_labels(before: Scores, after: Scores) -> NDArray[np.float64]:
    """1 for each sample whose best label is another one, else 0; NaN where a score is not finite."""
    first, second = _comparable(before, after)
    changed = (first.argmax(axis=1) != second.argmax(axis=1)).astype(np.float64)
    finite = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    return np.where(finite, changed, np.nan)


def label_divergence(before: Scores, after: Scores) -> float | None:
    """The mean Kullback-Leibler divergence of the labels' distribution from the baseline's, in nats; None where a score
    is not finite."""
    first, second = (log_softmax(scores, axis=1) for scores in _comparable(before, after))
    divergence = float((np.exp(first) * (first - second)).sum(axis=1).mean())
    return divergence if np.isfinite(divergence) else None


def _comparable(before: Scores, after: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores of at least two labels: of one score alone, whether it is above the baseline's median."""
    first, second = before.astype(np.float64), after.astype(np.float64)
    if first.shape[1] > 1:
        return first, second
    middle = np.full_like(first, np.median(first))
    return np.hstack([first, middle]), np.hstack([second, middle])
