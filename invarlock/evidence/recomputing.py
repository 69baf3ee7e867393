"""Figures that follow from a report's own windows, findings and configuration, computed again."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.results import Action, EditedWeight, Finding, Verdict, contradiction, fold
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
from invarlock.evidence.disagreements import ABSENT, Disagreement, differences, of_attributes
from invarlock.pipeline.guarding import WEIGHTS_ALONE, rests_on
from invarlock.pipeline.plans import plans_of
from invarlock.pipeline.report_builder import config_digest, families
from invarlock.pipeline.suspects import blame
from invarlock.quantization.selection import SCOPE_ROLES
from invarlock.reporting.report import Report

NO_TOKENS = TokenChanges(np.empty(0), np.empty(0, dtype=np.bool_), np.empty(0), np.empty(0))
MADE_UP = re.compile("for samples are (.+)$")
"""In the gap of samples that are no data."""
_BITS = re.compile(r"\((\d+) bits\)$")
_OF_BLOCKS = re.compile(r"(\d)\w* \([\d.]+ bits per weight\)$")
"""A type of GGUF: its name has the bits of a code, and scales count among those a weight."""
"""In the change of a weight that lies on a grid."""


def configuration(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The configuration's digest, and the plan and the guards that it asks for."""
    # A key that an older version did not know has its default.
    known = differences("config", report.config, config.as_dict())
    yield from (disagreement for disagreement in known if disagreement.stored is not ABSENT)
    yield from differences("config_sha256", report.config_sha256, config_digest(report.config))
    yield from differences("guards[*].name", [guard.name for guard in report.guards], list(config.guards.order))
    changed = sum(weight.parameters for weight in report.edit.modules if weight.is_changed)
    yield from differences("edit.params_changed", report.edit.params_changed, changed)
    if report.edit.is_comparison:
        yield from differences("edit.plan.families", report.edit.plan.get("families"), families(report.edit.modules))
    else:
        plan = {**config.as_dict()["edit"]["plan"], "bitwidth": report.attempts[-1].bitwidth}
        yield from differences("edit.name", report.edit.name, config.edit.name)
        yield from differences("edit.plan", report.edit.plan, plan)


def metric(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The perplexities, their ratio and its interval, from the losses of each window."""
    stored = report.metrics.primary
    if not report.edit.is_comparison:
        yield from differences("metrics.windows (whether measured)", report.metrics.windows is not None, _made(report))
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
    """What more windows take: it depends on the text, which no report holds."""
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


def findings(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The folded findings, against the coverage, the guards, the metric and the predictions."""
    expected = report.coverage.findings
    expected += [Finding.of_guard(guard) for guard in report.guards if guard.passed is not None]
    expected += report.metrics.findings
    stored = report.verdict.findings
    beside = stored[len(expected) :] if report.edit.is_comparison else []
    others = [finding for finding in beside if not finding.is_of_guard]
    yield from differences("verdict.findings", stored, [*expected, *others])


def guards(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The judgement of each guard, against its action; a guard that was not asked has none."""
    rejected = False
    for place, guard in enumerate(report.guards):
        action, where = guard.action, f"guards[{place}]"
        failed = guard.error is not None or guard.prepare.get("ready") is False
        yield from differences(f"{where}.action", guard.action, Action.ABORT if failed else guard.action)
        unasked = not failed and (config.guards.fail_fast and rejected if _made(report) else True)
        passed = guard.passed
        if unasked or (action is Action.CONTINUE and guard.metrics.get("measured") is False):
            passed = None
        elif passed is None or contradiction(passed, action):
            passed = action.accepted
        yield from differences(f"{where}.passed", guard.passed, passed)
        yield from differences(f"{where}.action", guard.action, Action.CONTINUE if unasked else guard.action)
        rejected = rejected or not action.accepted
    if not _made(report) and not rejected:
        yield Disagreement("edit.modules", [], "weights, or a guard that was not ready", how="expected")


def weights(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The change of each weight, against the plan or, of a comparison, against its own words."""
    for place, weight in enumerate(report.edit.modules):
        where = f"edit.modules[{place}]"
        found = _compared(weight) if report.edit.is_comparison else _planned(weight, report, config)
        yield from of_attributes(where, weight, found)
        if not report.edit.is_comparison and not config.edit.plan.include:
            roles = sorted(role.value for role in SCOPE_ROLES[config.edit.plan.scope])
            if weight.role not in roles:
                yield Disagreement(f"{where}.role", weight.role, " or ".join(roles), how="expected")
    names = [weight.name for weight in report.edit.modules]
    yield from differences("edit.modules (different names)", len(names), len(set(names)))


def _planned(weight: EditedWeight, report: Report, config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"bits": report.attempts[-1].bitwidth, "change": "quantized"}
    if not config.edit.plan.clamp_ratio:
        found["clipped_share"] = 0.0
    if weight.relative_error is not None and math.isfinite(weight.relative_error):
        error = weight.relative_error
        found["sqnr_db"] = -20 * math.log10(error) if error > 0 else None
    return found


def _compared(weight: EditedWeight) -> dict[str, Any]:
    grid = _BITS.search(weight.change) or _OF_BLOCKS.search(weight.change)
    found: dict[str, Any] = {"bits": int(grid[1]) if grid else None}
    return found | ({"relative_error": 0.0} if not weight.is_changed else {})


def verdict(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The fold: action, acceptance, what decided, reasons, exit code; the suspects, and what it rests on."""
    folded = folded_anew(report)
    found = {name: getattr(folded, name) for name in ("action", "accepted", "decided_by", "reasons", "exit_code")}
    if report.verdict.ending is not None:
        found["ending"] = folded.ending
    found["suspects"] = [] if folded.accepted else blame(report.guards, report.edit.modules)
    if report.metrics.windows is not None or not report.edit.is_comparison:
        measured = report.metrics.windows
        found["rests_on"] = rests_on(config, _samples(report), len(measured.tokens) if measured else None)
    elif _made(report):
        found["rests_on"] = WEIGHTS_ALONE
    yield from of_attributes("verdict", report.verdict, found)


def attempts(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The last attempt is the one that the verdict is of; each before it was rolled back, with one bit less.

    A rollback is the last one only where the plan has no bits left to try.
    """
    folded, last = folded_anew(report), report.attempts[-1]
    metric = report.metrics.primary
    expected = {"action": folded.action, "decided_by": folded.decided_by, "ratio": metric.ratio if metric else None}
    if last.figure is not None:  # Earlier builds had none.
        expected["figure"] = metric.figure if metric else None
    yield from of_attributes("attempts[-1]", last, expected)
    count = len(report.attempts)
    yield from differences("attempts[*].attempt", [each.attempt for each in report.attempts], [*range(1, count + 1)])
    earlier = [each.action for each in report.attempts[:-1]]
    yield from differences("attempts[:-1].action", earlier, [Action.ROLLBACK] * (count - 1))
    bits: list[int | None] = [None]
    if not report.edit.is_comparison:
        planned: list[int | None] = [plan.bitwidth for plan in plans_of(config)]
        bits = planned if folded.action is Action.ROLLBACK else planned[:count]
    yield from differences("attempts[*].bitwidth", [each.bitwidth for each in report.attempts], bits)


def model(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The model, and the return of the baseline, against the verdict and the fingerprints."""
    stored, rejected = report.model, not folded_anew(report).accepted
    yield from differences("model.id", stored.id, config.model.id)
    if config.model.adapter != "auto":
        yield from differences("model.adapter", stored.adapter, config.model.adapter)
    restored = True if rejected and not report.edit.is_comparison else None
    yield from differences("model.restored", stored.restored, restored)
    if restored or not _made(report):
        yield from differences("model.fingerprint_after", stored.fingerprint_after, stored.fingerprint_before)


def passes(report: Report) -> tuple[PassResult, PassResult] | None:
    """Results of the two passes, or None where outputs were not measured.

    :raises UsageError: the windows are none.
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


def _samples(report: Report) -> str:
    """The samples of a task that makes its own, as the report's coverage has them; empty for text of the baseline."""
    told = (MADE_UP.search(gap.message) for gap in report.coverage.gaps)
    return next((found[1] for found in told if found), "")


def folded_anew(report: Report) -> Verdict:
    return fold(report.verdict.findings, strict=report.verdict.strict)


def _made(report: Report) -> bool:
    """True where there was an edit to judge: there is none where a guard was not ready."""
    return bool(report.edit.modules)
