"""Figures of the outputs that follow from the losses of a report's own windows, computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import get_args

import numpy as np

from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.results import Action
from invarlock.evaluation.confidence_sequence import sequence_level
from invarlock.evaluation.divergence import (
    SHOWN,
    compare_predictions,
    judge_figures,
    limit_of_bounds,
    limits_of,
    window_bounds,
    window_p95,
)
from invarlock.evaluation.metric import Stopping, compare
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenChanges
from invarlock.evaluation.results import (
    Bounds,
    DivergenceResult,
    IntervalKind,
    MetricResult,
    MoreBy,
    PredictionLimits,
    Statistic,
    Undecided,
    Unit,
)
from invarlock.evaluation.stopping import look_of
from invarlock.evidence.disagreements import Disagreement, differences
from invarlock.reporting.report import Report

NO_TOKENS = TokenChanges(np.empty(0), np.empty(0, dtype=np.bool_), np.empty(0), np.empty(0))


def metric(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The perplexities, their ratio and its interval, from the losses of each window."""
    stored = report.metrics.primary
    if not report.edit.is_comparison:
        yield from differences(
            "metrics.windows (whether measured)", report.metrics.windows is not None, was_edited(report)
        )
        yield from differences("metrics.windows.bytes", getattr(report.metrics.windows, "bytes", None), None)
    if (measured := passes(report)) is None or stored is None:
        yield from differences("metrics.primary (whether measured)", stored is not None, measured is not None)
        return
    section = config.eval
    wanted = section.metric.kind
    yield from differences("metrics.primary.kind", stored.kind, stored.kind if wanted == "auto" else wanted)
    yield from _number_of_windows(report, config, len(measured[0].tokens))
    # Earlier builds named none of them: the unit was the token, the metric a ratio, the number of windows fixed.
    unit = "token" if stored.unit not in get_args(Unit) else stored.unit
    statistic = stored.statistic if stored.is_distance else "ratio"
    interval = stored.interval if stored.interval in get_args(IntervalKind) else "fixed"
    stored = dataclasses.replace(stored, unit=unit, statistic=statistic, interval=interval)
    stopping = _stopping(report, config)
    found = compare(
        *measured,
        kind=stored.kind,
        statistic=stored.statistic,
        limit=_limit(stored, config),
        level=section.metric.ci_level,
        reps=section.metric.reps,
        seed=config.dataset.seed,
        stopping=stopping,
    )
    # Nor did they tell what is undecided.
    if report.verdict.ending is None and found.message.startswith(stored.message):
        found = dataclasses.replace(found, message=stored.message, undecided=None)
    if found.undecided and stored.undecided and stored.undecided.option not in get_args(MoreBy):
        stored = dataclasses.replace(stored, undecided=dataclasses.replace(stored.undecided, option="dataset.final_n"))
    yield from differences("metrics.primary", stored, found)
    if stopping is not None:
        yield from _path(report, measured, stopping, statistic)


def _number_of_windows(report: Report, config: RunConfig, found: int) -> Iterator[Disagreement]:
    wanted, path = config.dataset.final_n, report.metrics.path
    if wanted != "auto":
        yield from differences("metrics.windows (how many)", found, wanted)
    elif found > config.dataset.max_n:
        yield Disagreement("metrics.windows (how many)", found, f"at most {config.dataset.max_n}", how="expected")
    elif path:
        yield from differences("metrics.path[-1].windows", path[-1].windows, found)


def _stopping(report: Report, config: RunConfig) -> Stopping | None:
    """Of windows that were measured step by step; a share of samples is of a number of them that was fixed."""
    primary = report.metrics.primary
    if not config.dataset.is_stepped or primary is None or primary.statistic == "share":
        return None
    documents = report.metrics.windows.documents if report.metrics.windows else None
    units = None if documents is None else np.array(documents, dtype=np.int64)
    return Stopping(sequence_level(config.eval.metric.ci_level), units, _more_by(primary.undecided))


def _more_by(stored: Undecided | None) -> MoreBy:
    """The key that asks for more windows, as stored: it depends on the text, which no report holds."""
    return stored.option if stored and stored.option in get_args(MoreBy) else "dataset.max_n"


def _path(
    report: Report, measured: tuple[PassResult, PassResult], stopping: Stopping, statistic: Statistic
) -> Iterator[Disagreement]:
    """Each look, from the windows that it saw."""
    for place, stored in enumerate(report.metrics.path):
        where, windows = f"metrics.path[{place}]", stored.windows
        if not 0 < windows <= len(measured[0].tokens):
            yield Disagreement(
                f"metrics.path[{place}].windows", stored.windows, "windows that were measured", "expected"
            )
            continue
        before, after = (each.first(windows) for each in measured)
        yield from differences(where, stored, look_of(before, after, stopping, statistic))


def _limit(stored: MetricResult, config: RunConfig) -> float:
    """The limit of the configuration; where that leaves it to the task, which no report holds, the stored one."""
    section = config.eval
    own = stored.limit if section.metric.limit is None else section.metric.limit
    return (own or 0.0) if stored.is_distance else section.max_pm_ratio


def predictions(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The windows' rises, and what follows from the figures that only a pass can measure."""
    stored, metric = report.metrics.predictions, report.metrics.primary
    if metric is not None and metric.is_distance:
        yield from differences("metrics.predictions (whether measured)", stored is not None, False)
        yield from _figures(report)
        return
    if (measured := passes(report)) is None or stored is None:
        yield from differences("metrics.predictions (whether measured)", stored is not None, measured is not None)
        return
    comparable = measured[0].tokens.any() and np.isfinite(measured[0].losses).all()
    if not comparable or stored.limits is None or stored.flips is None or measured[0].bytes is not None:
        nothing = dataclasses.replace(measured[1], changes=NO_TOKENS)
        found = compare_predictions(measured[0], nothing, ratio=config.eval.max_pm_ratio)
        yield from differences("metrics.predictions", stored, found)
        return
    figures = {name: getattr(stored, name) for name in (*SHOWN, "margin_baseline", "margin_loss")}
    figures["window_p95"] = window_p95(*measured)
    # The limit of flips comes from margins of single tokens, which no report holds.
    limits = limits_of(config.eval.max_pm_ratio, np.empty(0), flips=stored.limits.flips)
    stopping = _stopping(report, config)
    bounds = _bounds(stored, measured, limits, stopping) if stopping else None
    more_by = _more_by(stored.undecided)
    found = judge_figures(figures, limits, improving=config.eval.improving, bounds=bounds, more_by=more_by)
    yield from differences("metrics.predictions", stored, found)


def _bounds(
    stored: DivergenceResult, measured: tuple[PassResult, PassResult], limits: PredictionLimits, stopping: Stopping
) -> dict[str, Bounds] | None:
    """The stored bounds, which follow from single tokens, with the limits that they are held against; those of the
    windows' rises made anew."""
    if stored.bounds is None or {*stored.bounds} != {*SHOWN}:
        return None
    own = {
        name: dataclasses.replace(bound, limit=limit_of_bounds(name, limits)) for name, bound in stored.bounds.items()
    }
    return own | {"window_p95": window_bounds(*measured, limits, stopping)}


def _figures(report: Report) -> Iterator[Disagreement]:
    """The action of each further figure, against its limit: the figures themselves follow from no window."""
    for place, stored in enumerate(report.metrics.figures):
        where = f"metrics.figures[{place}].action"
        if stored.value is not None and stored.limit is not None:
            above = not float(stored.value) <= stored.limit
            yield from differences(f"{where} (above its limit)", stored.action is not Action.CONTINUE, above)


def passes(report: Report) -> tuple[PassResult, PassResult] | None:
    """Results of the two passes, or None where outputs were not measured.

    :raises UsageError: the windows are malformed.
    """
    windows = report.metrics.windows
    if windows is None:
        return None
    try:
        tokens = np.array(windows.tokens, dtype=np.int64)
        before, after = (np.array(list(map(float, losses))) for losses in (windows.baseline, windows.edited))
    except OverflowError as error:
        raise UsageError(f"report.json: metrics.windows: {one_line(error)}") from None
    if not len(tokens) == len(before) == len(after) or not len(tokens) or tokens.min() < 0:
        raise UsageError("report.json: metrics.windows: each window has a number of tokens and two losses")
    sizes = None if windows.bytes is None else np.array(windows.bytes, dtype=np.int64)
    if windows.documents is not None and len(windows.documents) != len(tokens):
        raise UsageError("report.json: metrics.windows: each window is of a document, or none is")
    if sizes is not None and (len(sizes) != len(tokens) or sizes.min() < 0):
        raise UsageError("report.json: metrics.windows: each window of text has a number of bytes")
    return PassResult(before, tokens, bytes=sizes), PassResult(after, tokens, bytes=sizes)


def was_edited(report: Report) -> bool:
    """True where there was an edit to judge: there is none where a guard was not ready."""
    return bool(report.edit.modules)
