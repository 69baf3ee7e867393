"""Several runs side by side, and the best of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from invarlock.reporting.describing import NOT_MEASURED, Measure, shown, shown_bytes
from invarlock.reporting.report import to_json
from invarlock.reporting.view import View

RULE = "The best is the accepted run with the fewest bits a parameter; among equals, with the lowest perplexity ratio."


@dataclass(frozen=True)
class SideBySide:
    """A column a run, a row a figure."""

    runs: list[str]
    best: int | None
    """The place of the best accepted run; None where none was accepted."""
    rows: list[tuple[str, list[str]]]
    rule: str = RULE

    @classmethod
    def of(cls, views: Sequence[View]) -> SideBySide:
        rows: list[tuple[str, Callable[[View], str]]] = [
            ("verdict", lambda view: f"{view.verdict.word.lower()} ({view.verdict.action})"),
            ("decided by", lambda view: view.verdict.decided_by),
            ("bits a parameter", lambda view: shown(view.bits_per_parameter)),
            ("saved artifacts", lambda view: shown_bytes(view.saved_bytes)),
            ("model", lambda view: view.model),
        ]
        keys = dict.fromkeys(key for view in views for key in view.plan)
        table = [(name, [of(view) for view in views]) for name, of in rows]
        table += [(f"plan: {key}", [view.plan.get(key) or "none" for view in views]) for key in keys]
        table += _named("", [{measure.name: _limited(measure) for measure in view.measures} for view in views])
        table += _named("guard ", [{guard.name: guard.said for guard in view.guards} for view in views])
        return cls([view.name for view in views], best(views), table)


def best(views: Sequence[View]) -> int | None:
    accepted = [place for place, view in enumerate(views) if view.verdict.accepted]
    return min(accepted, key=lambda place: _cost(views[place]), default=None)


def _cost(view: View) -> tuple[float, float]:
    """What was not measured costs more than anything that was."""
    bits, ratio = view.bits_per_parameter, view.ratio
    return math.inf if bits is None else bits, math.inf if ratio is None or math.isnan(ratio) else ratio


def as_json(table: SideBySide) -> str:
    return to_json(dataclasses.asdict(table))


def _limited(measure: Measure) -> str:
    return f"{measure.value} ({measure.limit})" if measure.limit else measure.value


def _named(prefix: str, columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [(f"{prefix}{name}", [column.get(name, NOT_MEASURED) for column in columns]) for name in names]
