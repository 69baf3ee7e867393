"""Figures of a report as a plot shows them: finite, in places along an axis, and not too many."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from invarlock.core.results import EditedWeight, GuardResult, Verdict
from invarlock.evaluation.results import MetricResult, Number
from invarlock.reporting.describing import MOST_SUSPECTS, bits_per_parameter
from invarlock.reporting.plain_data import Node
from invarlock.reporting.report import Report, SearchPoint, SearchSection, WindowsSection

MOST_POINTS = 600
"""In one plot; of more weights the most changed of each block and role are shown, and windows in groups."""
MOST_RATIO = 1e6
"""Of perplexities: beyond, the scale would hide all other runs."""
SHAPES = 5
"""Markers that there are."""
ROLES = ("attention", "ffn", "embedding", "head")
"""Each with a colour and a marker of its own; any other role shares the last ones."""


@dataclass(frozen=True)
class Point:
    """A weight, its place along the depth of the model, and its value."""

    weight: EditedWeight
    place: float
    value: float

    @property
    def role(self) -> int:
        """Place in ``ROLES``, or one beyond."""
        return ROLES.index(self.weight.role) if self.weight.role in ROLES else len(ROLES)


@dataclass(frozen=True)
class SpectrumChange:
    """Leading singular values of one weight, the largest first, before and after the edit."""

    module: str
    before: list[float]
    after: list[float]

    @property
    def differences(self) -> list[float]:
        """After minus before, of those that both sides have."""
        return [after - before for before, after in zip(self.before, self.after, strict=False)]


@dataclass(frozen=True)
class RunPoint:
    """A run among several: its bits, and its ratio with the interval."""

    name: str
    shape: int
    """Place in the markers, so that runs of one verdict can be told apart."""
    accepted: bool
    bits: float
    ratio: float
    low: float
    high: float
    limit: float | None


def run_points(runs: Sequence[tuple[str, Report]]) -> list[RunPoint]:
    """Of the runs that have bits and an interval that can be drawn."""
    found = (_run_point(name, place % SHAPES, report) for place, (name, report) in enumerate(runs))
    return [point for point in found if point is not None]


def _run_point(name: str, shape: int, report: Report) -> RunPoint | None:
    bits, metric = bits_per_parameter(report), report.metrics.primary
    if bits is None or not finite(bits) or metric is None or metric.ci is None:
        return None
    figures = [_drawable(value) for value in (metric.ratio, *metric.ci)]
    if None in figures:
        return None
    ratio, low, high = (figure or 0.0 for figure in figures)
    return RunPoint(name, shape, report.verdict.accepted is True, bits, ratio, low, high, _drawable(metric.limit))


def search_points(search: SearchSection, limit: float | None) -> list[tuple[RunPoint, float]]:
    """Of the plans that can be drawn, each with the ratio that was predicted."""
    found = ((point, _search_point(point, limit)) for point in search.points)
    return [(drawn, point.predicted) for point, drawn in found if drawn and _drawable(point.predicted)]


def _search_point(point: SearchPoint, limit: float | None) -> RunPoint | None:
    figures = [_drawable(value) for value in (point.ratio, *(point.ci or (None,)))]
    if None in figures or not finite(point.bits_per_weight):
        return None
    ratio, low, high = (figure or 0.0 for figure in figures)
    accepted = point.action is not None and point.action.accepted
    return RunPoint("", 0 if accepted else 1, accepted, point.bits_per_weight, ratio, low, high, limit)


def _drawable(ratio: Number | None) -> float | None:
    value = math.nan if ratio is None else float(ratio)
    return value if 0 < value < MOST_RATIO else None


def points(weights: Sequence[EditedWeight], values: Mapping[str, float]) -> list[Point]:
    """:param values: by the name of the weight."""
    places = _places(weights)
    found = {each.name: Point(each, places[each.name], values[each.name]) for each in weights if each.name in values}
    return list(found.values())


def _places(weights: Sequence[EditedWeight]) -> dict[str, float]:
    """Of each weight: the number of its block, in the order of the model, and how far in it the weight is.

    Weights without a number are outside of the blocks: the first ones, as an embedding, are left of block 0.
    """
    numbers: dict[str, int] = {}
    blocks: dict[int, list[str]] = {}
    for weight in weights:
        block = re.match(r"\D*\d+", weight.name)
        number = numbers.setdefault(block[0], len(numbers)) if block else len(numbers) or -1
        blocks.setdefault(number, []).append(weight.name)
    return {name: number + place / len(names) for number, names in blocks.items() for place, name in enumerate(names)}


def thinned(found: Sequence[Point]) -> list[Point]:
    if len(found) <= MOST_POINTS:
        return list(found)
    largest: dict[tuple[int, int], Point] = {}
    for point in sorted(found, key=lambda point: point.value):
        largest[int(point.place), point.role] = point
    kept = sorted(largest.values(), key=lambda point: point.place)
    return sorted(kept, key=lambda point: -point.value)[:MOST_POINTS]


def nats_per(metric: MetricResult | None) -> str:
    """The unit of the rise of the loss, or the distance that stands in its place."""
    if metric and metric.is_distance:
        return metric.name
    return "nats per byte" if metric and metric.unit == "byte" else "nats per token"


def rise_of(metric: MetricResult, value: Number | None) -> float | None:
    """A value of the primary metric as the rise of a window is drawn: the logarithm of a ratio of perplexities."""
    if not metric.is_distance:
        return log(value)
    return None if value is None else float(value)


def rises(windows: WindowsSection | None) -> list[tuple[int, float | None]]:
    """Of each window its scored tokens, or its bytes where the loss is per byte, and how much the loss of each rose, in
    nats; None where that is not finite."""
    if windows is None:
        return []
    columns = zip(windows.bytes or windows.tokens, windows.baseline, windows.edited, strict=False)
    return [(size, _rise(size, before, after)) for size, before, after in columns if size and size > 0]


def _rise(size: int, before: Number | None, after: Number | None) -> float | None:
    if before is None or after is None:
        return None
    rise = (float(after) - float(before)) / size
    return rise if math.isfinite(rise) else None


def grouped(found: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(found) // MOST_POINTS)
    groups = [found[start : start + size] for start in range(0, len(found), size)]
    return [(group[0][0], sum(rise for _, rise in group) / len(group)) for group in groups]


def log(ratio: Number | None) -> float | None:
    value = math.nan if ratio is None else float(ratio)
    return math.log(value) if 0 < value < math.inf else None


def spectra(guards: Sequence[GuardResult], verdict: Verdict) -> list[SpectrumChange]:
    """Those of the suspects, the most suspect first, and else those that a guard put first.

    A guard lists its own in ``metrics["spectra"]``: dicts with ``module``, ``before`` and ``after``.
    """
    found = [
        SpectrumChange(entry["module"].text("unnamed"), _positive(entry["before"]), _positive(entry["after"]))
        for guard in guards
        for entry in Node(guard.metrics)["spectra"].entries()
    ]
    order = {suspect.module: place for place, suspect in enumerate(verdict.suspects)}
    return sorted(found, key=lambda spectrum: order.get(spectrum.module, len(order)))[:MOST_SUSPECTS]


def _positive(values: Node) -> list[float]:
    numbers = (entry.number() for entry in values.entries()[:MOST_POINTS])
    return [number for number in numbers if number is not None and 1e-300 < number < 1e300]


def finite(value: float | None) -> bool:
    """True of a number that can be drawn."""
    return value is not None and abs(value) < 1e300
