"""Wording of a report's figures and parts, the same in every rendering."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from invarlock.core.errors import ExitCode
from invarlock.core.results import GUARD, Action, EditedWeight, Finding, GuardResult, SuspectedModule, Verdict
from invarlock.evaluation.results import DivergenceResult, FigureResult, MetricResult, Number
from invarlock.reporting.plain_data import Node
from invarlock.reporting.report import (
    AttemptSection,
    CoverageSection,
    EditSection,
    MetricsSection,
    ModelSection,
    ReferenceSection,
    Report,
    StorageSection,
)

NOT_MEASURED = "not measured"
MOST_SUSPECTS = 3
"""Named on the first screen."""
MOST_KINDS = 3
"""Kinds of change named there."""
STORED_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}
MOST_PATTERNS = 4
"""Of a rule: its first ones show what kind of modules it is for."""
MOST_FIGURES = 400
"""Of one guard; a report is to be read, and report.json has them all."""

PREDICTIONS = {
    "kl_mean": ("KL divergence, mean (a lower bound)", "nats per token"),
    "kl_p95": ("KL divergence, 95th percentile over tokens", "nats per token"),
    "kl_p99": ("KL divergence, 99th percentile over tokens", "nats per token"),
    "window_p95": ("rise of the loss, 95th percentile over windows", "nats per token"),
    "flips": ("tokens whose likeliest prediction is another one", "%"),
    "broken": ("tokens whose divergence is above log 2", "%"),
    "margin_baseline": ("margin of the likeliest token, baseline", "nats"),
    "margin_loss": ("margin of the likeliest token, lost by the edit", "nats"),
}


@dataclass(frozen=True)
class Measure:
    """A figure with its unit, and what it is held against."""

    name: str
    value: str
    limit: str
    within: bool | None
    """None for a figure that has no limit, or that was not measured."""

    @property
    def row(self) -> tuple[str, str]:
        """Of a table of figures without limits."""
        return self.name, self.value


def shown(value: Number | None, unit: str = "", digits: int = 4) -> str:
    """A number with its unit: ``0.09531 nats per token``, ``57.17 %``."""
    if value is None:
        return NOT_MEASURED
    value = float(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    text = f"{value * 100:.{digits}g}" if unit == "%" else f"{value:.{digits}g}"
    return f"{text} {unit}".strip()


def shown_bytes(count: int | None) -> str:
    if count is None:
        return NOT_MEASURED
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def word(verdict: Verdict) -> str:
    if verdict.accepted is None:
        return "NO VERDICT"
    return "ACCEPTED" if verdict.accepted else "INCONCLUSIVE" if is_inconclusive(verdict) else "REJECTED"


def is_inconclusive(verdict: Verdict) -> bool:
    return verdict.ending == "inconclusive"


def action_word(action: Action | None) -> str:
    """Also the class that the style sheet knows it by."""
    return action or "unknown"


def summary(verdict: Verdict) -> str:
    return "no guard objected" if verdict.action is Action.CONTINUE else f"decided by {verdict.decided_by}"


def sentence(verdict: Verdict) -> str:
    """The verdict in one sentence."""
    if verdict.accepted is None:
        return "The report holds no verdict."
    if verdict.exit_code == ExitCode.FAILED:
        return f"The edit was rejected, and {verdict.decided_by} itself failed: there is no verdict to rely on."
    if is_inconclusive(verdict):
        return f"The edit was not accepted: {verdict.decided_by} does not tell whether it is within the limit."
    if not verdict.accepted:
        return f"The edit was rejected: {verdict.decided_by} called for {action_word(verdict.action)}."
    warned = "" if verdict.action is Action.CONTINUE else " with a warning"
    return f"The edit was accepted{warned}: {summary(verdict)}."


def deciding(verdict: Verdict) -> Finding | None:
    """The finding that decided; None where nothing objected."""
    return next((found for found in verdict.findings if found.source == verdict.decided_by and found.objects), None)


def most_suspect(verdict: Verdict) -> Sequence[SuspectedModule]:
    return verdict.suspects[:MOST_SUSPECTS]


def evidence(suspect: SuspectedModule) -> str:
    """The first piece of it."""
    return suspect.evidence[0] if suspect.evidence else "suspected"


def said(guard: GuardResult) -> str:
    return NOT_MEASURED if guard.passed is None else action_word(guard.action)


def reasons(report: Report) -> list[str]:
    """Findings that decided, and those that no metric and no guard reports."""
    shown_elsewhere = [f"{GUARD}{guard.name}" for guard in report.guards]
    if report.metrics.primary:
        shown_elsewhere += ["primary metric", "predictions", *(figure.name for figure in report.metrics.figures)]
    others = tuple(f"{source}: " for source in shown_elsewhere if source != report.verdict.decided_by)
    return [reason for reason in report.verdict.reasons if not reason.startswith(others)]


def measures(metrics: MetricsSection) -> list[Measure]:
    return [*_primary(metrics.primary), *_predictions(metrics.predictions), *map(_figure, metrics.figures)]


def limits(metrics: MetricsSection) -> list[bool]:
    """Of each figure that has a limit: whether it is within."""
    return [measure.within for measure in measures(metrics) if measure.within is not None]


def seen(coverage: CoverageSection) -> str:
    """The share of the tokens of each kind that occur in the windows, and how many of these are of a special kind."""
    tokens = [each for each in coverage.tokens if each.share is not None]
    parts = [f"{shown(each.share, '%', digits=3)} of {each.known:,} {each.kind} tokens" for each in tokens]
    windows = ((coverage.conversations, "conversations"), (coverage.images, "windows with an image"))
    return ", ".join([*parts, *(f"{count} {kind}" for count, kind in windows if count)])


def metric_line(metrics: MetricsSection) -> str:
    if not metrics.primary:
        return NOT_MEASURED
    return "; ".join(filter(None, (metrics.primary.message, improvement(metrics.primary))))


def improvement(metric: MetricResult) -> str:
    """The fall of the perplexity in words, where its whole interval is below 1; else nothing."""
    if metric.ratio is None or metric.ci is None or not float(metric.ci[1]) < 1:
        return ""
    return f"{shown(1 - float(metric.ratio), '%', digits=3)} lower perplexity on this text"


def _primary(metric: MetricResult | None) -> Iterator[Measure]:
    if metric is None:
        yield Measure("primary metric", NOT_MEASURED, "", None)
    elif metric.is_distance:
        yield from _distance(metric)
    else:
        yield from _perplexity(metric)


def _perplexity(metric: MetricResult) -> Iterator[Measure]:
    kind = metric.name + (" per byte" if metric.unit == "byte" else "")
    yield Measure(f"{kind}, baseline", shown(metric.baseline, digits=5), "", None)
    yield Measure(f"{kind}, edited", shown(metric.edited, digits=5), "", None)
    ratio = ", ".join(filter(None, (shown(metric.ratio, digits=6), improvement(metric))))
    yield Measure("ratio, edited over baseline", ratio, "", None)
    upper = metric.ci[1] if metric.ci else None
    yield Measure(
        f"ratio, {shown(metric.ci_level, '%')} interval",
        " to ".join(shown(end, digits=6) for end in metric.ci or ()) or NOT_MEASURED,
        f"upper end at most {shown(metric.limit)}",
        None if upper is None or metric.limit is None else float(upper) <= metric.limit,
    )
    yield Measure("measured on", f"{metric.windows or 0:,} windows, {metric.tokens or 0:,} tokens", "", None)


def _distance(metric: MetricResult) -> Iterator[Measure]:
    yield Measure(f"{metric.name}, mean over samples", shown(metric.edited), "", None)
    yield Measure(
        f"{metric.name}, {shown(metric.ci_level, '%')} interval",
        " to ".join(map(shown, metric.ci or ())) or NOT_MEASURED,
        f"upper end at most {shown(metric.limit)}",
        None if metric.ci is None or metric.action is None else metric.action.accepted,
    )
    yield Measure("measured on", f"{metric.windows or 0:,} windows, {metric.tokens or 0:,} samples", "", None)


def _figure(figure: FigureResult) -> Measure:
    limit = "" if figure.limit is None else f"at most {shown(figure.limit, figure.unit)}"
    within = None if figure.value is None or figure.limit is None else float(figure.value) <= figure.limit
    return Measure(figure.name, shown(figure.value, figure.unit), limit, within)


def _predictions(divergence: DivergenceResult | None) -> Iterator[Measure]:
    if not divergence:
        return
    for key, (name, unit) in PREDICTIONS.items():
        value, limit = getattr(divergence, key), getattr(divergence.limits, key, None)
        within = None if value is None or limit is None else value <= limit
        yield Measure(name, shown(value, unit), "" if limit is None else f"at most {shown(limit, unit)}", within)


def model_line(model: ModelSection) -> str:
    description = Node(model.description)
    parameters = description["parameters"].whole()
    size = f", {parameters / 1e6:.2f} M parameters" if parameters is not None else ""
    ran = f"; code beside the weights ran: {', '.join(model.own_code)}" if model.own_code else ""
    return f"{model.id} (adapter {model.adapter}, {description['model_class'].text('unknown class')}{size}){ran}"


def edit_line(edit: EditSection) -> str:
    what = _compared(edit) if edit.is_comparison else _planned(edit)
    if not edit.modules:
        return f"{what}: not made"
    changed = [weight for weight in edit.modules if weight.is_changed]
    if not changed:
        return what
    errors = [(error, weight.name) for weight in changed if (error := weight.relative_error) is not None]
    if not errors:
        return f"{what}, relative error {NOT_MEASURED}"
    worst, name = max(errors, key=lambda entry: entry[0])
    return f"{what}, relative error up to {worst:.3g} ({name})"


def _compared(edit: EditSection) -> str:
    plan, changed = Node(edit.plan), [each for each in edit.modules if each.is_changed]
    subject = plan["subject"].text("unnamed") + (f" ({plan['merged'].text()})" if plan["merged"] else "")
    if edit.modules and not changed:
        return f"{subject} has the same numbers in all {len(edit.modules)} tensors"
    what = f"{len(changed)} of {len(edit.modules)} tensors, {edit.params_changed or 0:,} parameters"
    return ", ".join([f"{subject} differs in {what}", *_kinds(changed)])


def _kinds(changed: Sequence[EditedWeight]) -> list[str]:
    """The kinds of change, those with the largest error first, each by its worst weight."""
    kinds: dict[str, list[EditedWeight]] = {}
    for weight in sorted(changed, key=_unmeasured_first):
        kinds.setdefault(weight.kind, []).append(weight)
    told = [
        f"{of_it[0].change} ({of_it[0].name}{f' and {len(of_it) - 1} more' if len(of_it) > 1 else ''})"
        for of_it in kinds.values()
    ]
    return told[:MOST_KINDS] + ([f"{len(told) - MOST_KINDS} other changes"] if len(told) > MOST_KINDS else [])


def _unmeasured_first(weight: EditedWeight) -> float:
    return -math.inf if weight.relative_error is None else -float(weight.relative_error)


def _planned(edit: EditSection) -> str:
    what = f"{edit.name}, {_planned_numbers(Node(edit.plan))}"
    return f"{what}: {len(edit.modules)} weights, {edit.params_changed or 0:,} parameters"


def _planned_numbers(plan: Node) -> str:
    rules = [rule for rule in plan["rules"].entries() if not rule["keep"].flag()]
    if rules:
        return "; ".join(dict.fromkeys(map(_numbers, rules)))
    return f"{_numbers(plan)}, scope {plan['scope'].text('unknown')}"


def _numbers(plan: Node) -> str:
    """The numbers that a plan rounds to, and what shares a scale."""
    grain = "per output channel" if plan["per_channel"] else "per tensor"
    size, bits = plan["group_size"].text(), plan["bitwidth"].text("unknown")
    format_ = plan["format"].text("int")
    if format_ != "int":
        return f"{format_}, {bits} bits, {f'blocks of {size}' if plan['group_size'] else grain}"
    grain = f"groups of {size}" if plan["group_size"] else grain
    return f"{bits} bits, {'symmetric' if plan['symmetric'] else 'asymmetric'}, {grain}"


def plan_cells(edit: EditSection) -> dict[str, str]:
    cells = {key: cell(entry) for key, entry in edit.plan.items() if key not in ("families", "rules")}
    return cells | {f"rule {number}": _rule(rule) for number, rule in enumerate(Node(edit.plan)["rules"].entries())}


def _rule(rule: Node) -> str:
    """A rule as it stands in a table."""
    patterns = [pattern.text() for pattern in rule["match"].entries()]
    others = f" and {len(patterns) - MOST_PATTERNS} more" if len(patterns) > MOST_PATTERNS else ""
    numbers = "left alone" if rule["keep"].flag() else _numbers(rule)
    return f"{', '.join(patterns[:MOST_PATTERNS])}{others}: {numbers}"


def families(edit: EditSection) -> list[tuple[str, str, int]]:
    """Of a comparison: family, change, how many weights."""
    return [
        (family["family"].text("unnamed"), change, count.whole() or 0)
        for family in Node(edit.plan)["families"].entries()
        for change, count in family["changes"].items()
    ]


def storage_line(storage: StorageSection) -> str:
    """Bits a weight and bytes before and after, and the types after by their share; empty where nothing is known."""
    sides = [side for side in (storage.before, storage.after) if side]
    if not sides:
        return ""
    bits = " -> ".join(f"{shown(side.bits_per_weight)}" for side in sides)
    size = " -> ".join(shown_bytes(side.file_bytes) for side in sides)
    types = [f"{shown(100 * (each.share or 0))} % {each.format}" for each in sides[-1].types]
    return f"{bits} bits per weight, scales counted, {size}: {', '.join(types)}"


def bits_per_parameter(report: Report) -> float | None:
    """Mean over all parameters, without scales; what was not rounded has the bits of the model's data type."""
    description = Node(report.model.description)
    stored, total = STORED_BITS.get(description["dtype"].text()), description["parameters"].whole()
    rounded = [(each.bits, each.parameters) for each in report.edit.modules if each.bits and each.parameters]
    left = (total or 0) - sum(parameters for _, parameters in rounded)
    if not stored or not total or left < 0:
        return None
    return (sum(bits * parameters for bits, parameters in rounded) + stored * left) / total


def bits_of(attempt: AttemptSection) -> str:
    """Bits of an attempt: those of its scheme, or those per weight, scales counted, of several."""
    if attempt.bitwidth is not None:
        return f"{attempt.bitwidth} bits"
    return f"{shown(attempt.bits_per_weight)} bits per weight"


def reference_line(reference: ReferenceSection) -> str:
    used = f"reference {reference.folder}, SHA-256 {reference.digest}"
    return f"{used}, and the baseline's pass was run: {reference.pass_again}" if reference.pass_again else used


def provenance(report: Report) -> list[tuple[str, str]]:
    """Origin of the report: versions, digests, the machine."""
    return [
        ("made", report.created),
        ("InvarLock", report.invarlock_version),
        ("configuration, SHA-256", report.config_sha256),
        ("baseline, fingerprint", report.model.fingerprint_before),
        ("model as it was left, fingerprint", report.model.fingerprint_after),
        ("devices", ", ".join(report.model.devices)),
        *((name, cell(entry)) for name, entry in report.environment.items()),
    ]


def cell(value: Any) -> str:
    """Plain data as it stands in a table."""
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return Node(value).text("" if not isinstance(value, bool) else "yes" if value else "no")


def figures(guard: GuardResult) -> list[tuple[str, str]]:
    """Nested figures as rows, their keys joined by dots; lists of plain values in one row."""
    rows = list(islice(_rows("", Node(guard.metrics)), MOST_FIGURES + 1))
    if len(rows) > MOST_FIGURES:
        rows[-1] = ("…", "the others are in report.json")
    return rows


def _rows(path: str, node: Node) -> Iterator[tuple[str, str]]:
    nested = node.items() or [(str(place), entry) for place, entry in enumerate(node.entries())]
    if not nested or (not any(isinstance(entry.value, dict | list) for _, entry in nested) and node.entries()):
        if path:
            yield path, _value(node)
        return
    for key, entry in nested:
        yield from _rows(f"{path}.{key}" if path else key, entry)


def _value(node: Node) -> str:
    if node.value is None:
        return NOT_MEASURED
    if isinstance(node.value, float):
        return shown(node.value)
    if isinstance(node.value, list):
        return ", ".join(_value(entry) for entry in node.entries()) or "none"
    return node.text(json.dumps(node.value))
