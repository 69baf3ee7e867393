"""Agreement of the edited model's predictions with the baseline's, token by token.

The mean loss can stay where it is while decisions change (Dutta et al. 2024, "Accuracy is Not All You Need"), or while
a few windows break. Both show where predictions are compared with the baseline's own, and not with the text alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from invarlock.core.results import Action
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenChanges
from invarlock.evaluation.results import DivergenceResult, PredictionLimits

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
) -> DivergenceResult:
    """Judge an edit by its predictions: rollback, or a warning, where a figure is above its limit.

    What was not measured is never accepted: rollback where the edited model's predictions are not finite, abort where
    the baseline's are not. Predictions of the same text in different tokens have nothing in common to compare: the loss
    per byte decides alone.

    :param edited: a pass over the same windows with ``baseline.record`` as its reference.
    :param ratio: the largest perplexity ratio to accept; with ``flips`` and ``broken`` as :func:`limits_of`.
    :param improving: as in :func:`judge_figures`.
    :raises ValueError: the passes did not score the same tokens, or the edited one had no reference.
    """
    nothing = dict.fromkeys([*SHOWN, "margin_baseline", "margin_loss", "limits"])
    if baseline.bytes is not None:
        return DivergenceResult(**nothing, action=Action.CONTINUE, message=OTHER_TOKENS)
    changes = edited.changes
    if changes is None or not np.array_equal(baseline.tokens, edited.tokens):
        raise ValueError("the edited pass was not made with the baseline's record as its reference")
    if not len(changes.kl) or not np.isfinite(baseline.losses).all() or np.isnan(changes.margin_before).any():
        message = "predictions not compared, the baseline's own are not finite"
        return DivergenceResult(**nothing, action=Action.ABORT, message=message)
    limits = limits_of(ratio, changes.margin_before, flips=flips, broken=broken)
    return judge_figures(_figures(baseline, edited, changes), limits, improving=improving)


def judge_figures(figures: Mapping[str, Any], limits: PredictionLimits, *, improving: bool = False) -> DivergenceResult:
    """Hold figures against their limits.

    :param figures: by the names of :class:`DivergenceResult`, each a number or None.
    :param improving: the edit is meant to change predictions (``eval.intent``), so that a figure above its limit only
        warns: it tells that they differ, and not which ones are better.
    """
    action, reason = _judge(figures, limits, improving)
    return DivergenceResult(**figures, limits=limits, action=action, message=f"{_summary(figures)}: {reason}")


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
