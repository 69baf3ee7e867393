"""Primary metric of two passes, against a limit: a ratio of perplexities, a mean distance, or a share that differs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from invarlock.core.results import Action
from invarlock.evaluation.confidence_sequence import by_document, mean_bounds
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.power import detectable, windows_to_detect
from invarlock.evaluation.results import MetricResult, MoreBy, Statistic, Undecided
from invarlock.evaluation.statistics import (
    Interval,
    exp,
    mean_interval,
    mean_per_token,
    ratio_interval,
    share_interval,
    standard_error,
)


@dataclass(frozen=True)
class Stopping:
    """Circumstances of windows that are measured until the limits are certain."""

    level: float
    """Of the confidence sequences, as :func:`~invarlock.evaluation.confidence_sequence.sequence_level` has it."""
    documents: NDArray[np.int64] | None = None
    """Number of the document that each window is of, and those to come; None where each window stands for itself."""
    more_by: MoreBy = "dataset.max_n"
    """The key that asks for more of them, or more text."""

    def units(self, windows: int) -> NDArray[np.int64]:
        """Number of the unit that each window is of: its document, or itself."""
        return np.arange(windows) if self.documents is None else self.documents[:windows]


def compare(
    baseline: PassResult,
    edited: PassResult,
    *,
    kind: str,
    limit: float,
    level: float,
    reps: int,
    seed: int,
    statistic: Statistic = "ratio",
    stopping: Stopping | None = None,
) -> MetricResult:
    """Compare two passes over the same windows.

    A pass over samples that are not predictions of tokens (``statistic``) holds the distances from the baseline, summed
    over the samples of each window: their mean, or the share of samples that differ, is held against the limit.

    The ratio is exp of the paired differences of log loss, every token weighing the same. What was not measured is
    never accepted: rollback where the edited model's loss is not finite or one window gives no interval, abort where
    the baseline's loss is not finite, because then no edit can be judged. Where the interval straddles the limit the
    rollback is inconclusive, and ``undecided`` has what would decide.

    Of passes over the same text in different tokens (``PassResult.bytes``) all figures are per byte, every byte
    weighing the same; the limit becomes that of a byte: the same loss of the whole text reaches either.

    :param limit: the largest ratio to accept (``eval.max_pm_ratio``).
    :param level: of confidence; with ``reps`` and ``seed`` as :func:`~invarlock.evaluation.statistics.ratio_interval`.
    :param stopping: of windows that were measured until the limit was certain; None for a number fixed before.
    :raises ValueError: the passes did not score the same tokens.
    """
    if not np.array_equal(baseline.tokens, edited.tokens):
        raise ValueError("the two passes did not score the same tokens")
    if statistic != "ratio":
        return _distance(baseline, edited, kind, statistic, limit, level, reps, seed, stopping)
    tokens, sizes = baseline.tokens, baseline.sizes
    per_token, per_byte = limit, baseline.bytes is not None
    limit = limit_of(baseline, limit)
    before, after = _finite_perplexity(baseline), _finite_perplexity(edited)
    ratio = interval = undecided = None
    if before is not None and after is not None:
        differences = edited.losses - baseline.losses
        ratio = exp(mean_per_token(differences, sizes))
        if stopping is None:
            interval = ratio_interval(differences, sizes, level=level, reps=reps, seed=seed)
        else:
            interval = sequence(baseline, edited, stopping)
        if interval is not None and interval[0] <= limit < interval[1]:
            undecided = _undecided(differences, sizes, limit, level, stopping)
    action, reason = _judge(before, after, interval, limit)
    name = kind.replace("_", " ") + (" per byte" if per_byte else "")
    numbers = f"{name} {_shown(before)} -> {_shown(after)}"
    if ratio is not None:
        numbers += f", ratio {ratio:.6g}"
    if interval is not None:
        numbers += f" ({level * 100:g} % interval {interval[0]:.6g} to {interval[1]:.6g})"
    if per_byte:
        reason += f" per byte ({per_token:g} per token of the baseline)"
    if undecided is not None:
        reason += f", and its lower end is not: {undecided.message}"
    return MetricResult(
        kind=kind,
        baseline=before,
        edited=after,
        ratio=ratio,
        ci=interval,
        ci_level=level,
        windows=len(tokens),
        tokens=int(tokens.sum()),
        limit=limit,
        action=action,
        message=f"{numbers} on {len(tokens)} windows: {reason}",
        unit="byte" if per_byte else "token",
        undecided=undecided,
        interval="fixed" if stopping is None else "sequence",
    )


def sequence(
    baseline: PassResult,
    edited: PassResult,
    stopping: Stopping,
    *,
    statistic: Statistic = "ratio",
) -> Interval | None:
    """Both ends of the confidence sequence of the ratio or of the mean, or None where no window is scored."""
    differences, sizes = edited.losses - baseline.losses, baseline.sizes
    differences, sizes = by_document(differences, sizes, stopping.units(len(sizes)))
    if not len(sizes):
        return None
    low, high = (float(end) for end in mean_bounds(differences, sizes, level=stopping.level))
    return (exp(low), exp(high)) if statistic == "ratio" else (low, high)


def limit_of(baseline: PassResult, limit: float) -> float:
    """The largest ratio to accept, per byte where losses are per byte: the loss of the whole text that reaches it."""
    if baseline.bytes is None or not baseline.bytes.any():
        return limit
    return float(limit ** float(baseline.tokens.sum() / baseline.bytes.sum()))


def _distance(
    baseline: PassResult,
    edited: PassResult,
    kind: str,
    statistic: Statistic,
    limit: float,
    level: float,
    reps: int,
    seed: int,
    stopping: Stopping | None,
) -> MetricResult:
    before, after = (_finite_mean(measured) for measured in (baseline, edited))
    interval: Interval | None = None
    if before is not None and after is not None and stopping is not None:
        interval = sequence(baseline, edited, stopping, statistic=statistic)
    elif before is not None and after is not None and statistic == "mean":
        interval = mean_interval(edited.losses - baseline.losses, edited.tokens, level=level, reps=reps, seed=seed)
    elif before is not None and after is not None:
        interval = share_interval(int(edited.losses.sum()), int(edited.tokens.sum()), level=level)
    action, reason = _judge(before, after, interval, limit, measured="output")
    if statistic == "share" and after == 0 and action is Action.ROLLBACK:
        # As good as so few samples can show: what else is compared has to tell.
        action, reason = Action.CONTINUE, f"no sample differs, too few of them for the limit {limit:g}"
    numbers = f"{kind.replace('_', ' ')} {_shown(after)}"
    if interval is not None:
        numbers += f" ({level * 100:g} % interval {interval[0]:.4g} to {interval[1]:.4g})"
    return MetricResult(
        kind=kind,
        baseline=before,
        edited=after,
        ratio=None,
        ci=interval,
        ci_level=level,
        windows=len(edited.tokens),
        tokens=int(edited.tokens.sum()),
        limit=limit,
        action=action,
        message=f"{numbers} on {int(edited.tokens.sum())} samples in {len(edited.tokens)} windows: {reason}",
        unit="sample",
        statistic=statistic,
        interval="fixed" if stopping is None else "sequence",
    )


def _finite_mean(measured: PassResult) -> float | None:
    finite = np.isfinite(measured.losses).all() and measured.tokens.any()
    return float(mean_per_token(measured.losses, measured.tokens)) if finite else None


def _undecided(
    differences: NDArray[np.float64], sizes: NDArray[np.int64], limit: float, level: float, stopping: Stopping | None
) -> Undecided:
    units = by_document(differences, sizes, (stopping or Stopping(level)).units(len(sizes)))
    windows, edge = len(units[1]), math.log(limit)
    error = float(standard_error(*units))
    level, is_sequence = (stopping.level, True) if stopping else (level, False)
    told = detectable(error, windows, level=level, sequence=is_sequence)
    missing = edge - float(mean_per_token(differences, sizes))
    needed = windows_to_detect(missing, error, windows, level=level, sequence=is_sequence)
    if needed is not None:
        # Windows without a scored token are asked for, too.
        needed = math.ceil(needed * len(sizes) / windows)
    below, above = exp(edge - told), exp(edge + told)
    more_by: MoreBy = "dataset.final_n" if stopping is None else stopping.more_by
    told_apart = (
        f"{len(sizes)} windows tell ratios of at most {below:.4g} or at least {above:.4g} from the limit {limit:g}"
    )
    undecided = Undecided(below, above, needed, told_apart, more_by)
    return replace(undecided, message=f"{told_apart}; {undecided.remedy}")


def _judge(
    before: float | None, after: float | None, interval: Interval | None, limit: float, *, measured: str = "loss"
) -> tuple[Action, str]:
    if before is None:
        return Action.ABORT, f"not measured, the baseline's own {measured} is not finite"
    if after is None:
        return Action.ROLLBACK, f"the edited model's {measured} is not finite"
    if interval is None:
        return Action.ROLLBACK, "not measured, an interval needs two windows; raise dataset.final_n"
    if interval[1] <= limit:
        return Action.CONTINUE, f"within the limit {limit:g}"
    return Action.ROLLBACK, f"the interval's upper end is above the limit {limit:g}"


def _finite_perplexity(measured: PassResult) -> float | None:
    return measured.perplexity if np.isfinite(measured.losses).all() and measured.sizes.any() else None


def _shown(perplexity: float | None) -> str:
    return "not finite" if perplexity is None else f"{perplexity:.5g}"
