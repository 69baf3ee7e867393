"""The noise floor: how far a baseline is from itself where nothing but the way of computing differs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from invarlock.datasets.layout import Windows
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.results import MetricResult, NoiseResult, NoiseRun, Number
from invarlock.models.batches import batch_size
from invarlock.pipeline.session import Baseline
from invarlock.pipeline.tasks import judging_of
from invarlock.reporting.report import MetricsSection


def noise_of(baseline: Baseline, model: torch.nn.Module, final: Windows, before: PassResult) -> Iterator[NoiseRun]:
    """Run a baseline over its final windows again, in other ways; its weights are in bfloat16 afterwards.

    :param before: the usual pass, with its record.
    """
    usual = batch_size(model, final.length)
    other = 1 if usual > 1 else 2
    yield _run(baseline, model, final, before, f"{other} instead of up to {usual} windows at once", other)
    if next(model.parameters()).dtype == torch.float32:
        yield _run(baseline, model.to(torch.bfloat16), final, before, "in bfloat16", None)


def _run(
    baseline: Baseline, model: torch.nn.Module, final: Windows, before: PassResult, how: str, at_once: int | None
) -> NoiseRun:
    task, session = baseline.task, baseline.session
    with session.clock.stage("noise", how):
        again = task.measure(model, final[:0], final, reference=before.record, at_once=at_once)
    found = task.compare(before, again, judging_of(session.config))
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
