"""How a report's figures and parts are put into words, the same ones in every rendering."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from invarlock.core.text import cleaned
from invarlock.reporting.plain_data import Node

NOT_MEASURED = "not measured"
MOST_FIGURES = 400
"""Of one guard; a report is to be read, and report.json has them all."""

PREDICTIONS = {
    "kl_mean": ("KL divergence, mean (a lower bound)", "nats a token"),
    "kl_p95": ("KL divergence, 95th percentile over tokens", "nats a token"),
    "kl_p99": ("KL divergence, 99th percentile over tokens", "nats a token"),
    "window_p95": ("rise of the loss, 95th percentile over windows", "nats a token"),
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


def shown(value: float | None, unit: str = "", digits: int = 4) -> str:
    """A number with its unit: ``0.09531 nats a token``, ``57.17 %``."""
    if value is None:
        return NOT_MEASURED
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    text = f"{value * 100:.{digits}g}" if unit == "%" else f"{value:.{digits}g}"
    return f"{text} {unit}".strip()


def shown_bytes(count: int | None) -> str:
    if count is None:
        return NOT_MEASURED
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def measures_of(metrics: Node) -> list[Measure]:
    return [*_perplexity(metrics["primary"]), *_predictions(metrics["predictions"])]


def _perplexity(metric: Node) -> Iterator[Measure]:
    if not metric:
        yield Measure("perplexity ratio", NOT_MEASURED, "", None)
        return
    kind = metric["kind"].text("perplexity").replace("_", " ")
    yield Measure(f"{kind}, baseline", shown(metric["baseline"].number(), digits=5), "", None)
    yield Measure(f"{kind}, edited", shown(metric["edited"].number(), digits=5), "", None)
    yield Measure("ratio, edited over baseline", shown(metric["ratio"].number(), digits=6), "", None)
    ends, limit = [entry.number() for entry in metric["ci"].entries()], metric["limit"].number()
    level = shown(metric["ci_level"].number(), "%")
    upper = ends[1] if len(ends) == 2 else None
    yield Measure(
        f"ratio, {level} interval",
        " to ".join(shown(end, digits=6) for end in ends) or NOT_MEASURED,
        f"upper end at most {shown(limit)}",
        None if upper is None or limit is None else upper <= limit,
    )
    amount = f"{metric['windows'].whole() or 0:,} windows, {metric['tokens'].whole() or 0:,} tokens"
    yield Measure("measured on", amount, "", None)


def _predictions(divergence: Node) -> Iterator[Measure]:
    if not divergence:
        return
    for key, (name, unit) in PREDICTIONS.items():
        value, limit = divergence[key].number(), divergence["limits"][key].number()
        within = None if value is None or limit is None else value <= limit
        yield Measure(name, shown(value, unit), "" if limit is None else f"at most {shown(limit, unit)}", within)


def model_line(model: Node) -> str:
    description = model["description"]
    parameters = description["parameters"].whole()
    size = f", {parameters / 1e6:.2f} M parameters" if parameters is not None else ""
    described = f"{description['model_class'].text('unknown class')}{size}"
    return f"{model['id'].text('unnamed')} (adapter {model['adapter'].text('unknown')}, {described})"


def edit_line(edit: Node) -> str:
    what = _compared(edit) if edit["plan"]["subject"] else _planned(edit)
    modules = edit["modules"].entries()
    if not modules:
        return f"{what}: not made"
    errors = [(error, module) for module in modules if (error := module["relative_error"].number()) is not None]
    if not errors:
        return f"{what}, relative error {NOT_MEASURED}"
    worst, module = max(errors, key=lambda entry: entry[0])
    return f"{what}, relative error up to {worst:.3g} ({module['name'].text('unnamed')})"


def _compared(edit: Node) -> str:
    modules = edit["modules"].entries()
    changed = sum(module["change"].text() != "unchanged" for module in modules)
    what = f"{changed} of {len(modules)} weights, {edit['params_changed'].whole() or 0:,} parameters"
    return f"{edit['plan']['subject'].text('unnamed')} differs in {what}"


def _planned(edit: Node) -> str:
    plan = edit["plan"]
    kind = "symmetric" if plan["symmetric"] else "asymmetric"
    if plan["group_size"]:
        grain = f"groups of {plan['group_size'].text()}"
    else:
        grain = "per output channel" if plan["per_channel"] else "per tensor"
    bits, scope = plan["bitwidth"].text("unknown"), plan["scope"].text("unknown")
    what = f"{edit['name'].text('unknown')}, {bits} bits, {kind}, {grain}, scope {scope}"
    return f"{what}: {len(edit['modules'].entries())} weights, {edit['params_changed'].whole() or 0:,} parameters"


def provenance_of(report: Node) -> list[tuple[str, str]]:
    """Where the report comes from: versions, digests, the machine."""
    model = report["model"]
    facts = {
        "made": report["created"],
        "InvarLock": report["invarlock_version"],
        "configuration, SHA-256": report["config_sha256"],
        "baseline, fingerprint": model["fingerprint_before"],
        "model as it was left, fingerprint": model["fingerprint_after"],
    }
    devices = ", ".join(entry.text() for entry in model["devices"].entries())
    environment = [(name, entry.text()) for name, entry in report["environment"].items()]
    return [*((name, node.text()) for name, node in facts.items()), ("devices", devices), *environment]


def flattened(node: Node) -> list[tuple[str, str]]:
    """Nested figures as rows, their keys joined by dots; lists of plain values in one row."""
    rows: list[tuple[str, str]] = []
    for row in _rows("", node):
        if len(rows) == MOST_FIGURES:
            return [*rows, ("…", "the others are in report.json")]
        rows.append(row)
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
    return node.text(cleaned(json.dumps(node.value)))
