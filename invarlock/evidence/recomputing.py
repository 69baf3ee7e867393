"""Parts of a report that follow from its findings, its weights and its configuration, computed again."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from invarlock.config.loading import rules_of
from invarlock.config.reading import Source
from invarlock.config.schema import RunConfig
from invarlock.core.results import Action, EditedWeight, Finding, Verdict, contradiction, fold
from invarlock.evidence.disagreements import ABSENT, Disagreement, differences, of_attributes
from invarlock.evidence.outputs import was_edited
from invarlock.pipeline.guarding import WEIGHTS_ALONE, rests_on
from invarlock.pipeline.planning.plans import plans_of
from invarlock.pipeline.report_builder import config_digest, families
from invarlock.pipeline.suspects import blame
from invarlock.quantization.rules import AnyPlan
from invarlock.quantization.scheme import Plan, Scheme, matches
from invarlock.quantization.selection import SCOPE_ROLES
from invarlock.reporting.report import Report

MADE_UP = re.compile("for samples are (.+)$")
"""In the coverage gap of samples that were made up."""
_BITS = re.compile(r"\((\d+) bits\)$")
"""In the change of a weight that lies on a grid."""
_OF_BLOCKS = re.compile(r"(\d)\w* \([\d.]+ bits per weight\)$")
"""A type of GGUF: its name has the bits of a code, and scales count among those per weight."""


def configuration(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The configuration's digest, and the plan and the guards that it asks for."""
    yield from _of_keys("config", report.config, config.as_dict())
    yield from differences("config_sha256", report.config_sha256, config_digest(report.config))
    yield from differences("guards[*].name", [guard.name for guard in report.guards], list(config.guards.order))
    changed = sum(weight.parameters for weight in report.edit.modules if weight.is_changed)
    yield from differences("edit.params_changed", report.edit.params_changed, changed)
    if report.edit.is_comparison:
        yield from differences("edit.plan.families", report.edit.plan.get("families"), families(report.edit.modules))
    else:
        yield from differences("edit.name", report.edit.name, config.edit.name)
        yield from _of_keys("edit.plan", report.edit.plan, dataclasses.asdict(_last_plan(report, config)))


def _of_keys(what: str, stored: Any, found: Any) -> Iterator[Disagreement]:
    """Keys of a configuration that differ; one that an older version did not know has its default."""
    known = differences(what, stored, found)
    return (disagreement for disagreement in known if disagreement.stored is not ABSENT)


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
        unasked = not failed and (config.guards.fail_fast and rejected if was_edited(report) else True)
        passed = guard.passed
        if unasked or (action is Action.CONTINUE and guard.metrics.get("measured") is False):
            passed = None
        elif passed is None or contradiction(passed, action):
            passed = action.accepted
        yield from differences(f"{where}.passed", guard.passed, passed)
        yield from differences(f"{where}.action", guard.action, Action.CONTINUE if unasked else guard.action)
        rejected = rejected or not action.accepted
    if not was_edited(report) and not rejected:
        yield Disagreement("edit.modules", [], "weights, or a guard that was not ready", how="expected")


def weights(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The change of each weight, against the plan or, of a comparison, against its own words."""
    for place, weight in enumerate(report.edit.modules):
        where = f"edit.modules[{place}]"
        found = _compared(weight) if report.edit.is_comparison else _planned(weight, report, config)
        yield from of_attributes(where, weight, found)
        plan = config.edit.plan
        if not report.edit.is_comparison and isinstance(plan, Plan) and not plan.include:
            roles = sorted(role.value for role in SCOPE_ROLES[plan.scope])
            if weight.role not in roles:
                yield Disagreement(f"{where}.role", weight.role, " or ".join(roles), how="expected")
    names = [weight.name for weight in report.edit.modules]
    yield from differences("edit.modules (different names)", len(names), len(set(names)))


def _planned(weight: EditedWeight, report: Report, config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"change": "quantized"}
    if scheme := _scheme_of(weight, _last_plan(report, config)):
        found["bits"] = scheme.bitwidth
        if not scheme.clamp_ratio:
            found["clipped_share"] = 0.0
    if weight.relative_error is not None and math.isfinite(weight.relative_error):
        error = weight.relative_error
        found["sqnr_db"] = -20 * math.log10(error) if error > 0 else None
    return found


def _last_plan(report: Report, config: RunConfig) -> AnyPlan:
    """The plan that the verdict is of."""
    listed = (report.attempts[-1].plan or {}).get("rules") if report.attempts else None
    if config.edit.is_searched and listed is None:
        # No guard was ready, so nothing was searched.
        return config.edit.plan
    if config.edit.is_searched or (config.edit.retry.strategy == "suspects" and len(report.attempts) > 1):
        return rules_of(listed, Source("report.json: attempts[-1].plan"))
    plans = plans_of(config)
    return plans[min(len(report.attempts), len(plans)) - 1]


def _scheme_of(weight: EditedWeight, plan: AnyPlan) -> Scheme | None:
    """The scheme that a plan has for a weight; None where a name alone does not tell."""
    if isinstance(plan, Plan):
        return plan
    # Names of a weight that is tied elsewhere, and what else a wide pattern matches, only a model tells.
    if weight.role not in SCOPE_ROLES["all"]:
        return None
    names = (weight.name, f"{weight.name}.weight")
    found = (rule for rule in plan.rules if any(matches(pattern, name) for pattern in rule.match for name in names))
    return next(found, None)


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
    elif was_edited(report):
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
    if config.edit.is_searched:
        yield from _searched(report, config)
        return
    earlier = [each.action for each in report.attempts[:-1]]
    yield from differences("attempts[:-1].action", earlier, [Action.ROLLBACK] * (count - 1))
    if report.edit.is_comparison:
        yield from differences("attempts[*].bitwidth", [each.bitwidth for each in report.attempts], [None])
        return
    plans = [dataclasses.asdict(plan) for plan in plans_of(config)]
    if config.edit.retry.strategy == "suspects":
        # Which modules get more bits follows from gradients and from guards that no report holds.
        plans += [dict(each.plan or {}) for each in report.attempts[1:]]
        at_most = min(count, config.edit.retry.max_attempts)
        yield from differences("attempts (at most edit.retry.max_attempts)", count, at_most)
    elif folded.action is not Action.ROLLBACK:
        plans = plans[:count]
    bits = [plan.get("bitwidth") for plan in plans]
    yield from differences("attempts[*].bitwidth", [each.bitwidth for each in report.attempts], bits)
    for place, (attempt, plan) in enumerate(zip(report.attempts, plans, strict=False)):
        if attempt.plan is not None:  # Earlier builds had none.
            yield from _of_keys(f"attempts[{place}].plan", attempt.plan, plan)


def _searched(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The attempts of a search, in any order of size, are among its plans; the best one may be judged once more."""
    points = {point.bits_per_weight: point for point in report.search.points} if report.search else {}
    at_most = min(len(report.attempts), config.edit.search.max_attempts + 1)
    yield from differences("attempts (at most edit.search.max_attempts and one)", len(report.attempts), at_most)
    for place, attempt in enumerate(report.attempts):
        # No guard was ready where nothing was rounded.
        if attempt.bits_per_weight is not None:
            point = points.get(round(attempt.bits_per_weight, 4))
            expected = (point.action, point.ratio) if point else None
            yield from differences(f"attempts[{place}]", (attempt.action, attempt.ratio), expected)


def model(report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """The model, and the return of the baseline, against the verdict and the fingerprints."""
    stored, rejected = report.model, not folded_anew(report).accepted
    yield from differences("model.id", stored.id, config.model.id)
    if config.model.adapter != "auto":
        yield from differences("model.adapter", stored.adapter, config.model.adapter)
    restored = True if rejected and not report.edit.is_comparison else None
    yield from differences("model.restored", stored.restored, restored)
    if restored or not was_edited(report):
        yield from differences("model.fingerprint_after", stored.fingerprint_after, stored.fingerprint_before)


def _samples(report: Report) -> str:
    """The samples of a task that makes its own, as the report's coverage has them; empty for text of the baseline."""
    told = (MADE_UP.search(gap.message) for gap in report.coverage.gaps)
    return next((found[1] for found in told if found), "")


def folded_anew(report: Report) -> Verdict:
    return fold(report.verdict.findings, strict=report.verdict.strict)
