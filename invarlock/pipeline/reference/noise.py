"""The noise floor: how far a baseline is from itself where nothing but the way of computing differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from invarlock.datasets.layout import Windows
from invarlock.datasets.window_order import windows_between
from invarlock.evaluation.results import MetricResult, NoiseResult, NoiseRun, Number
from invarlock.models.batches import batch_size
from invarlock.pipeline.reference.kept import BaselinePass
from invarlock.pipeline.session import Baseline
from invarlock.pipeline.stepping import joined
from invarlock.pipeline.tasks import judging_of
from invarlock.reporting.report import MetricsSection


def noise_of(baseline: Baseline, model: torch.nn.Module, final: Windows, measured: BaselinePass) -> Iterator[NoiseRun]:
    """Run a baseline over its final windows again, in other ways; its weights are in bfloat16 afterwards.

    :param final: all windows, of which ``measured`` is over those up to its last step.
    """
    again = windows_between(final, measured.made, 0, measured.looks[-1])
    at_once = batch_size(model, final.length)
    # No batch is larger than a step.
    largest = max(end - start for start, end in pairwise([0, *measured.looks]))
    other = 1 if min(at_once, largest) > 1 else max(2, at_once)
    yield _run(baseline, model, again, measured, f"in batches of {other}", other)
    if next(model.parameters()).dtype == torch.float32:
        media = {name: each.bfloat16() if each.is_floating_point() else each for name, each in again.media.items()}
        again = replace(again, media=media)
        yield _run(baseline, model.to(torch.bfloat16), again, measured, "in bfloat16", None)


def _run(
    baseline: Baseline, model: torch.nn.Module, final: Windows, measured: BaselinePass, how: str, at_once: int | None
) -> NoiseRun:
    task, session = baseline.task, baseline.session
    before = joined(measured.parts, measured.looks)
    with session.clock.stage("noise", how):
        after = task.measure(model, final[:0], final, reference=measured.record, at_once=at_once)
    found = task.compare(before, after, judging_of(session.config, measured.looks[-1], baseline.reader))
    predictions = found.predictions
    return NoiseRun(
        how,
        _size_of(found.primary) or 0.0,
        predictions.kl_mean if predictions else None,
        predictions.flips if predictions else None,
    )


def with_noise(metrics: MetricsSection, runs: Sequence[NoiseRun]) -> MetricsSection:
    """The figures of an edit, held against the noise floor where there is one."""
    if not runs:
        return metrics
    size, predictions = _size_of(metrics.primary), metrics.predictions
    kl = (predictions.kl_mean if predictions else None) or 0.0
    floor, kl_floor = max(run.figure for run in runs), max(run.kl_mean or 0.0 for run in runs)
    below = None if size is None else size <= floor and kl <= kl_floor
    told = "not measured" if below is None else "below" if below else "above"
    message = f"the difference is {told} what the machine itself makes ({'; '.join(map(_described, runs))})"
    return replace(metrics, noise=NoiseResult(list(runs), below, message))


def _size_of(metric: MetricResult | None) -> float | None:
    """The figure of a metric as a distance from none."""
    value: Number | None = metric.figure if metric else None
    if metric is None or value is None or not math.isfinite(float(value)):
        return None
    if metric.is_distance:
        return float(value)
    return abs(math.log(float(value))) if float(value) > 0 else None


def _described(run: NoiseRun) -> str:
    kl = "" if run.kl_mean is None else f", KL {run.kl_mean:.2g} nats, top-1 disagreement {run.flips or 0:.2%}"
    return f"{run.how}: {run.figure:.2g}{kl}"
