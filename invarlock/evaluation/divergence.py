"""Agreement of the edited model's predictions with the baseline's, token by token.

The mean loss can stay where it is while decisions change (Dutta et al. 2024, "Accuracy is Not All You Need"), or while
a few windows break. Both show where predictions are compared with the baseline's own, and not with the text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from invarlock.core.results import Action
from invarlock.evaluation.confidence_sequence import by_document, mean_bounds
from invarlock.evaluation.metric import Stopping
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.power import windows_to_detect
from invarlock.evaluation.predictions import TokenChanges
from invarlock.evaluation.results import Bounds, DivergenceResult, MoreBy, PredictionLimits, Undecided
from invarlock.evaluation.statistics import mean_per_token, standard_error

BROKEN = math.log(2)
"""Nats of divergence at which a prediction counts as broken: the perplexity there is expected to double."""

OTHER_TOKENS = "predictions not measured, the two tokenizers give different ids for the same text"

SHOWN = {
    "kl_mean": "mean KL divergence",
    "kl_p95": "95th percentile of the KL divergence",
    "kl_p99": "99th percentile of the KL divergence",
    "window_p95": "95th percentile of the windows' loss increases",
    "flips": "top-1 disagreement",
    "broken": "share of predictions that broke",
}


REJECTING = ("kl_mean", "kl_p95", "kl_p99", "window_p95")
"""Figures that reject an edit above their limits; the others warn."""
SHARES_ABOVE = {"kl_p95": 0.05, "kl_p99": 0.01, "window_p95": 0.05}
"""The largest shares of what lies above the limit of a percentile."""


def limits_of(
    ratio: float, margins: NDArray[np.float64], *, flips: float | None = None, broken: float = 0.001
) -> PredictionLimits:
    """Figures of an edit at the edge of what the primary metric accepts, were it spread evenly.

    On text of the baseline's own making, its mean divergence from the edited model is the expected rise of the log
    loss: so L = log ``ratio`` is the limit of both. Spread evenly means many small, independent changes: logits
    then shift normally, the divergence at a token is a quadratic form in the shift, and

    - ``kl_p95`` is 4 L and ``kl_p99`` 8 L: chi-square of one degree of freedom, the form that scatters most, has
      them at 3.8 and 6.6 times its mean; noise, rounding and pruning of the demo model at 3.1 to 3.6 and 6.6 to 8;
    - ``window_p95`` is 2 L: a token's rise varies by twice its divergence, so that windows of T tokens have theirs
      at L + 1.645 sqrt(2 L / T), which is 1.7 L for a ratio of 1.1 and 128 tokens, and 2 L for 60;
    - ``flips`` is the mean of Phi(-margin / (2 sqrt L)): the difference of two logits shifts by 2 sqrt L, and a
      decision flips where that is more than its margin. Near ties flip under any edit: so this only warns.

    Beyond, an edit is concentrated on some tokens or windows, and does more to them than any may suffer on average.
    ``broken`` finds what is more concentrated still, such as one corrupted embedding row: evenly spread, an edit
    breaks one token in a thousand only at two thirds of L (chi-square again, for a ratio of 1.1).

    :param ratio: the largest perplexity ratio to accept (``eval.max_pm_ratio``).
    :param margins: of the baseline's likeliest tokens over their runners-up, in nats.
    :param flips: a limit of one's own in place of what follows.
    """
    rise = math.log(ratio)
    if flips is None:
        flips = float(ndtr(-margins / (2 * math.sqrt(max(rise, 1e-12)))).mean())
    return PredictionLimits(
        kl_mean=rise, kl_p95=4 * rise, kl_p99=8 * rise, window_p95=2 * rise, flips=flips, broken=broken
    )


def compare_predictions(
    baseline: PassResult,
    edited: PassResult,
    *,
    ratio: float,
    improving: bool = False,
    flips: float | None = None,
    broken: float = 0.001,
    stopping: Stopping | None = None,
) -> DivergenceResult:
    """Judge an edit by its predictions: rollback, or a warning, where a figure is above its limit.

    What was not measured is never accepted: rollback where the edited model's predictions are not finite, abort where
    the baseline's are not. Predictions of the same text in different tokens have nothing in common to compare: the loss
    per byte decides alone.

    :param edited: a pass over the same windows with ``baseline.record`` as its reference.
    :param ratio: the largest perplexity ratio to accept; with ``flips`` and ``broken`` as :func:`limits_of`.
    :param improving: as in :func:`judge_figures`.
    :param stopping: of windows that were measured until the limits were certain: confidence sequences are held against
        these. None holds the figures themselves against them, as suits a number of windows that was fixed before.
    :raises ValueError: the passes did not score the same tokens, or the edited one had no reference.
    """
    nothing: dict[str, Any] = dict.fromkeys([*SHOWN, "margin_baseline", "margin_loss", "limits"])
    if baseline.bytes is not None:
        return DivergenceResult(**nothing, action=Action.CONTINUE, message=OTHER_TOKENS)
    changes = edited.changes
    if changes is None or not np.array_equal(baseline.tokens, edited.tokens):
        raise ValueError("the edited pass was not made with the baseline's record as its reference")
    if not len(changes.kl) or not np.isfinite(baseline.losses).all() or np.isnan(changes.margin_before).any():
        message = "predictions not compared, the baseline's own are not finite"
        return DivergenceResult(**nothing, action=Action.ABORT, message=message)
    limits = limits_of(ratio, changes.margin_before, flips=flips, broken=broken)
    figures = _figures(baseline, edited, changes)
    bounds = None
    if stopping is not None and all(figures[name] is not None for name in SHOWN):
        bounds = prediction_bounds(baseline, edited, limits, stopping)
    more_by = stopping.more_by if stopping else "dataset.final_n"
    return judge_figures(figures, limits, improving=improving, bounds=bounds, more_by=more_by)


def prediction_bounds(
    baseline: PassResult,
    edited: PassResult,
    limits: PredictionLimits,
    stopping: Stopping,
) -> dict[str, Bounds]:
    """Confidence sequences of the figures, by their names, from the windows' sums.

    A percentile is at most its limit where the share of what lies above the limit is at most the rest: so that share is
    bounded, of tokens or, of the windows' loss increases, of windows.
    """
    changes, tokens = edited.changes, baseline.tokens
    if changes is None:
        raise ValueError("the edited pass was not made with the baseline's record as its reference")
    window = np.repeat(np.arange(len(tokens)), tokens)

    # Where no token is above a limit, the sequence has no spread to see: the exact end is -log(tail) / tokens.
    unseen = math.log(2 / (1 - stopping.level)) / tokens.sum()

    def summed(of_token: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(window, of_token, len(tokens)).astype(np.float64)

    def share(name: str, of_token: NDArray[np.bool_]) -> Bounds:
        limit = limit_of_bounds(name, limits)
        if of_token.any():
            return _bounds(summed(of_token), tokens, stopping, limit)
        needed = math.ceil(unseen / limit * len(tokens)) if unseen > limit > 0 else None
        return Bounds(0.0, min(unseen, 1.0), limit, needed)

    return {
        "kl_mean": _bounds(summed(changes.kl), tokens, stopping, limits.kl_mean),
        "kl_p95": share("kl_p95", changes.kl > limits.kl_p95),
        "kl_p99": share("kl_p99", changes.kl > limits.kl_p99),
        "window_p95": window_bounds(baseline, edited, limits, stopping),
        "flips": share("flips", changes.flipped),
        "broken": share("broken", ~(changes.kl <= BROKEN)),
    }


def window_bounds(baseline: PassResult, edited: PassResult, limits: PredictionLimits, stopping: Stopping) -> Bounds:
    """Of the share of windows whose loss rises by more than the limit of its 95th percentile."""
    above = edited.losses - baseline.losses > limits.window_p95 * baseline.tokens
    scored = (baseline.tokens > 0).astype(np.int64)
    return _bounds((above * scored).astype(np.float64), scored, stopping, limit_of_bounds("window_p95", limits))


def limit_of_bounds(name: str, limits: PredictionLimits) -> float:
    """The limit that the bounds of a figure are held against."""
    return SHARES_ABOVE[name] if name in SHARES_ABOVE else float(getattr(limits, name))


def _bounds(sums: NDArray[np.float64], counts: NDArray[np.int64], stopping: Stopping, limit: float) -> Bounds:
    units = by_document(sums, counts, stopping.units(len(sums)))
    low, high = (float(end) for end in mean_bounds(*units, level=stopping.level))
    found = Bounds(max(low, 0.0), high, limit)
    if found.side:
        return found
    missing, error = limit - float(mean_per_token(*units)), float(standard_error(*units))
    needed = windows_to_detect(missing, error, len(units[0]), level=stopping.level, sequence=True)
    return replace(found, windows=needed and math.ceil(needed * len(sums) / len(units[0])))


def judge_figures(
    figures: Mapping[str, Any],
    limits: PredictionLimits,
    *,
    improving: bool = False,
    bounds: Mapping[str, Bounds] | None = None,
    more_by: MoreBy = "dataset.max_n",
) -> DivergenceResult:
    """Hold figures, or their bounds where there are any, against their limits.

    :param figures: by the names of :class:`DivergenceResult`, each a number or None.
    :param improving: the edit is meant to change predictions (``eval.intent``), so that a figure above its limit only
        warns: it tells that they differ, and not which ones are better.
    """
    action, reason = _judge(figures, limits, improving)
    undecided = None if bounds is None or improving else _undecided(bounds, more_by)
    if undecided is not None:
        action, reason = Action.ROLLBACK, undecided.message
    return DivergenceResult(
        **figures,
        limits=limits,
        action=action,
        message=f"{_summary(figures)}: {reason}",
        bounds=bounds,
        undecided=undecided,
    )


def _undecided(bounds: Mapping[str, Bounds], more_by: MoreBy) -> Undecided | None:
    """The figure that most windows would settle, where none is above its limit for certain."""
    held = {name: bounds[name] for name in REJECTING}
    straddling = [name for name, bound in held.items() if bound.side == 0]
    if not straddling or any(bound.side == 1 for bound in held.values()):
        return None
    name = max(straddling, key=lambda name: held[name].windows or math.inf)
    undecided = Undecided(None, None, held[name].windows, "", more_by)
    return replace(undecided, message=f"{SHOWN[name]} not certain to be within its limit; {undecided.remedy}")


def window_p95(baseline: PassResult, edited: PassResult) -> float | None:
    """The 95th percentile over windows of the rise of the loss, in nats per token; None where one is not finite."""
    scored = baseline.tokens > 0
    rises = (edited.losses - baseline.losses)[scored] / baseline.tokens[scored]
    return _percentile(rises, 95)


def _figures(baseline: PassResult, edited: PassResult, changes: TokenChanges) -> dict[str, Any]:
    return {
        "kl_mean": _finite(changes.kl.mean()),
        "kl_p95": _percentile(changes.kl, 95),
        "kl_p99": _percentile(changes.kl, 99),
        "window_p95": window_p95(baseline, edited),
        "flips": float(changes.flipped.mean()),
        "broken": float((~(changes.kl <= BROKEN)).mean()),
        "margin_baseline": _finite(changes.margin_before.mean()),
        "margin_loss": _finite((changes.margin_before - changes.margin).mean()),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percentile(values: NDArray[np.float64], percent: int) -> float | None:
    return float(np.percentile(values, percent)) if np.isfinite(values).all() else None


def _judge(figures: Mapping[str, Any], limits: PredictionLimits, improving: bool) -> tuple[Action, str]:
    if any(figures[name] is None for name in SHOWN):
        return Action.ROLLBACK, "the edited model's predictions are not finite"
    above = [name for name in SHOWN if figures[name] > getattr(limits, name)]
    if not above:
        return Action.CONTINUE, "within the limits"
    action = Action.WARN if improving or set(above) <= {"flips", "broken"} else Action.ROLLBACK
    return action, ", ".join(f"{SHOWN[name]} {figures[name]:.4g} above {getattr(limits, name):.4g}" for name in above)


def _summary(figures: Mapping[str, Any]) -> str:
    def shown(value: float | None, form: str) -> str:
        return "not finite" if value is None else format(value, form)

    before, loss = figures["margin_baseline"], figures["margin_loss"]
    return (
        f"KL divergence at least {shown(figures['kl_mean'], '.4g')} nats per token, top-1 disagreement "
        f"{figures['flips']:.2%}, mean margin {shown(before, '.3g')} -> "
        f"{shown(None if loss is None else before - loss, '.3g')} nats"
    )
