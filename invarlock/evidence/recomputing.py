"""What follows from a report's own windows, findings and configuration, computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.plain import OWN, plain
from invarlock.core.results import Action, Finding, GuardResult, Verdict, fold
from invarlock.evaluation.divergence import SHOWN, Limits, judge_figures, window_p95
from invarlock.evaluation.metric import compare
from invarlock.evaluation.passes import PassResult
from invarlock.evidence.disagreements import Disagreement, differences
from invarlock.pipeline.assembly import WEIGHTS_ALONE, config_digest, divergence_section, metric_section, rests_on
from invarlock.pipeline.comparison import families
from invarlock.pipeline.suspects import blame
from invarlock.reporting.report import FindingSection, GuardSection, Number, Report

_plain = partial(plain, limits=OWN)

BESIDE = ("tokenizer", "primary metric")
"""Who may object to a comparison beside the guards and what was measured."""


def configuration(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The configuration's digest, and the plan and the guards that it asks for."""
    yield from differences("config", report.config, _plain(config.as_dict()))
    yield from differences("config_sha256", report.config_sha256, config_digest(report.config))
    yield from differences("guards[*].name", [guard.name for guard in report.guards], list(config.guards.order))
    changed = sum(module.parameters for module in report.edit.modules if module.change != "unchanged")
    yield from differences("edit.params_changed", report.edit.params_changed, changed)
    if _is_comparison(report):
        yield from differences("edit.plan.families", report.edit.plan.get("families"), families(report.edit.modules))
    else:
        plan = _plain({**config.as_dict()["edit"]["plan"], "bitwidth": report.attempts[-1].bitwidth})
        yield from differences("edit.name", report.edit.name, config.edit.name)
        yield from differences("edit.plan", report.edit.plan, plan)


def metric(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The perplexities, their ratio and its interval, from the losses of each window."""
    stored = report.metrics.primary
    if (measured := passes(report)) is None or stored is None:
        yield from differences("metrics.primary (whether measured)", stored is not None, measured is not None)
        return
    section = config.eval
    wanted = section.metric.kind
    yield from differences("metrics.primary.kind", stored.kind, stored.kind if wanted == "auto" else wanted)
    yield from differences("metrics.windows (how many)", len(measured[0].tokens), config.dataset.final_n)
    found = compare(
        *measured,
        kind=stored.kind,
        limit=section.max_pm_ratio,
        level=section.metric.ci_level,
        reps=section.metric.reps,
        seed=config.dataset.seed,
    )
    yield from _differing("metrics.primary", stored, metric_section(found, section.metric.ci_level))


def predictions(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The windows' rises, and what follows from the figures that only a pass can measure."""
    stored = report.metrics.predictions
    if (measured := passes(report)) is None or stored is None:
        yield from differences("metrics.predictions (whether measured)", stored is not None, measured is not None)
        return
    if stored.limits is None or stored.flips is None:
        yield from differences("metrics.predictions.action", stored.action, Action.ABORT.value)
        return
    figures = {name: getattr(stored, name) for name in (*SHOWN, "margin_baseline", "margin_loss")}
    figures["window_p95"] = window_p95(*measured)
    # The limit of flips comes from margins of single tokens, which no report holds.
    limits = Limits.of(config.eval.max_pm_ratio, np.empty(0), flips=stored.limits.get("flips", 0.0))
    yield from _differing("metrics.predictions", stored, divergence_section(judge_figures(figures, limits)))


def findings(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """What was folded, against what the guards, the metric and the predictions say."""
    expected = [_of_guard(guard) for guard in report.guards if guard.passed is not None]
    outputs = {"primary metric": report.metrics.primary, "predictions": report.metrics.predictions}
    expected += [FindingSection(name, each.action, each.message, False) for name, each in outputs.items() if each]
    stored = report.verdict.findings
    beside = [finding for finding in stored[len(expected) :] if _is_comparison(report) and finding.source in BESIDE]
    yield from _differing("verdict.findings", stored, [*expected, *beside])
    for place, guard in enumerate(report.guards):
        if guard.error is not None:
            yield from differences(f"guards[{place}].action", guard.action, Action.ABORT.value)
            yield from differences(f"guards[{place}].passed", guard.passed, False)


def verdict(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The fold: action, acceptance, what decided, reasons, exit code; the suspects, and what it rests on."""
    stored, folded = report.verdict, folded_anew(report)
    found = {
        "action": folded.action.value,
        "accepted": folded.accepted,
        "decided_by": folded.decided_by,
        "reasons": list(folded.reasons),
        "exit_code": int(folded.exit_code),
        "suspects": [] if folded.accepted else _plain(blame(map(_result, report.guards))),
    }
    if report.metrics.windows is not None or stored.rests_on != WEIGHTS_ALONE:
        found["rests_on"] = rests_on(config)
    yield from differences("verdict", {name: _plain(getattr(stored, name)) for name in found}, found)


def attempts(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The last attempt is the one that the verdict is of; each before it was rolled back, with one bit less."""
    folded, last = folded_anew(report), report.attempts[-1]
    found = {
        "action": folded.action.value,
        "decided_by": folded.decided_by,
        "ratio": report.metrics.primary.ratio if report.metrics.primary else None,
    }
    yield from differences("attempts[-1]", {name: getattr(last, name) for name in found}, found)
    count = len(report.attempts)
    yield from differences("attempts[*].attempt", [each.attempt for each in report.attempts], [*range(1, count + 1)])
    earlier = [each.action for each in report.attempts[:-1]]
    yield from differences("attempts[:-1].action", earlier, [Action.ROLLBACK.value] * (count - 1))
    if not _is_comparison(report):
        first = config.edit.plan.bitwidth
        bits = [each.bitwidth for each in report.attempts]
        yield from differences("attempts[*].bitwidth", bits, [*range(first, first + count)])


def model(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """Whether the baseline came back agrees with the verdict and the fingerprints."""
    stored, rejected = report.model, not folded_anew(report).accepted
    restored = True if rejected and not _is_comparison(report) else None
    yield from differences("model.restored", stored.restored, restored)
    if restored:
        yield from differences("model.fingerprint_after", stored.fingerprint_after, stored.fingerprint_before)


def passes(report: Report) -> tuple[PassResult, PassResult] | None:
    """What the two passes measured, or None where outputs were not.

    :raises UsageError: the windows are none.
    """
    windows = report.metrics.windows
    if windows is None:
        return None
    try:
        tokens = np.array(windows.tokens, dtype=np.int64)
        before, after = map(_losses, (windows.baseline, windows.edited))
    except OverflowError as error:
        raise UsageError(f"report.json: metrics.windows: {one_line(error)}") from None
    if not len(tokens) == len(before) == len(after) or not len(tokens) or tokens.min() < 0:
        raise UsageError("report.json: metrics.windows: each window has a number of tokens and two losses")
    return PassResult(before, tokens), PassResult(after, tokens)


def folded_anew(report: Report) -> Verdict:
    said = [Finding(each.source, Action(each.action), each.message, each.failed) for each in report.verdict.findings]
    return fold(said, strict=report.verdict.strict)


def _losses(stored: Sequence[Number]) -> Any:
    return np.array([float(loss) for loss in stored], dtype=np.float64)


def _differing(what: str, stored: Any, found: Any) -> Iterator[Disagreement]:
    return differences(what, _plain(stored), _plain(found))


def _is_comparison(report: Report) -> bool:
    return report.edit.name == "compare"


def _of_guard(guard: GuardSection) -> FindingSection:
    return FindingSection(**dataclasses.asdict(Finding.of_guard(_result(guard))))


def _result(guard: GuardSection) -> GuardResult:
    return GuardResult(
        guard.name,
        guard.passed,
        Action(guard.action),
        guard.message,
        tuple(guard.warnings),
        guard.metrics,
        guard.error,
    )
