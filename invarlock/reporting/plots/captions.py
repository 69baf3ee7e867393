"""Captions of plots: what is shown, in which unit, and against which limit."""

from __future__ import annotations

from collections.abc import Sequence

from invarlock.evaluation.results import MetricResult
from invarlock.reporting.describing import NOT_MEASURED, shown
from invarlock.reporting.plots.data import MOST_POINTS, Point, log, nats_per

SPECTRUM = (
    "The leading singular values, in units of the weight: above, the baseline's as rings around the edited ones; "
    "below, edited minus baseline. There is no limit."
)
RUNS = "The ratio of the perplexities with its interval, against the mean bits over all parameters, scales not counted."

FRONTIER = (
    "The ratio of the perplexities of each plan that was judged, with its interval, against its bits per weight, "
    "scales counted; rings are what the sensitivities predict."
)


def missing(what: str) -> str:
    return f"{what}: {NOT_MEASURED}."


def unchanged(what: str) -> str:
    return f"{what}: the same before and after the edit."


def errors(measured: Sequence[Point], drawn: int) -> str:
    worst = max(measured, key=lambda point: point.value)
    caption = (
        "How far each weight has moved: the Frobenius norm of the change over that of the weight (0 is unchanged, 1 as "
        f"if set to zero). The largest is {shown(worst.value)}, of {worst.weight.name}. It has no limit of its own: "
        "what counts is what the model computes."
    )
    if any(point.place < 0 for point in measured):
        caption += " Weights in front of the blocks, as an embedding, are left of block 0."
    if drawn < len(measured):
        caption += f" Of {len(measured):,} weights the most changed of each block and role are drawn."
    return caption


def equal_bits(bits: int, weights: int, mean: float | None) -> str:
    return f"Bits per weight: {bits} in each of {weights:,} weights; {_mean_bits(mean)}"


def bits(mean: float | None) -> str:
    return f"The bits that each weight was rounded to. {_mean_bits(mean).capitalize()}"


def _mean_bits(mean: float | None) -> str:
    return f"over all parameters {shown(mean, 'bits')} per parameter, scales not counted."


def rises(windows: int, finite: int, drawn: int, metric: MetricResult | None) -> str:
    """
    :param windows: how many there are.
    :param finite: in how many of them the rise is a finite number.
    :param drawn: points of the plot.
    """
    caption = _distances(windows, metric) if metric and metric.is_distance else _losses(windows, metric)
    if finite < windows:
        caption += f" {windows - finite:,} windows whose loss is not a finite number are not drawn."
    if drawn < finite:
        caption += f" Each point is the mean of up to {-(-finite // MOST_POINTS)} windows."
    return caption


def _losses(windows: int, metric: MetricResult | None) -> str:
    caption = f"Edited minus baseline loss of {windows:,} windows."
    if not metric:
        return caption
    span = " to ".join(shown(log(end)) for end in metric.ci or () if log(end) is not None) or NOT_MEASURED
    return (
        f"{caption} The mean is {shown(log(metric.ratio), nats_per(metric))}, its {shown(metric.ci_level, '%')} "
        f"interval {span}; the upper end may be {shown(log(metric.limit))} at most, the logarithm of the limit "
        f"{shown(metric.limit)} on the ratio of the perplexities."
    )


def _distances(windows: int, metric: MetricResult) -> str:
    span = " to ".join(map(shown, metric.ci or ())) or NOT_MEASURED
    return (
        f"The {metric.name} of the edited model from the baseline in {windows:,} windows. The mean is "
        f"{shown(metric.edited)}, its {shown(metric.ci_level, '%')} interval {span}; the upper end may be "
        f"{shown(metric.limit)} at most."
    )


def stages(total: float) -> str:
    return f"In the order of the run; {shown(total, 's')} in all. There is no limit."
