"""Several runs side by side, and the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

from invarlock.reporting.describing import (
    NOT_MEASURED,
    Measure,
    action_word,
    bits_per_parameter,
    measures,
    model_line,
    plan_cells,
    said,
    shown,
    word,
)
from invarlock.reporting.facts import saved_line
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import Report

RULE = "The best is the accepted run with the fewest bits a parameter; among equals, with the lowest primary metric."
VERDICT, PLAN = "verdict", "plan: "


@dataclass(frozen=True)
class SideBySide:
    """A column a run, a row a figure."""

    runs: list[str]
    best: int | None
    """The place of the best accepted run; None where none was accepted."""
    rows: list[tuple[str, list[str]]]
    actions: list[str]
    """Of each run's verdict."""
    links: list[str | None]
    """To the page of each run, where there is one."""
    rule: str = RULE
    verdict = VERDICT
    """The row whose cells are coloured."""

    @property
    def shown(self) -> list[tuple[str, list[str]]]:
        """The rows without those of the plans that are equal."""
        return [(name, cells) for name, cells in self.rows if not _is_alike(name, cells)]

    @property
    def folded(self) -> list[tuple[str, str]]:
        """Rows of the plans that are equal, as one cell."""
        return [(name, cells[0]) for name, cells in self.rows if _is_alike(name, cells)]

    @classmethod
    def of(cls, runs: Sequence[SavedReport]) -> SideBySide:
        rows: list[tuple[str, Callable[[SavedReport], str]]] = [
            (VERDICT, lambda run: f"{word(run.report.verdict).lower()} ({action_word(run.report.verdict.action)})"),
            ("decided by", lambda run: run.report.verdict.decided_by),
            ("bits a parameter", lambda run: shown(bits_per_parameter(run.report))),
            ("bits per weight as saved, scales counted", lambda run: _stored_bits(run.report)),
            ("saved artifacts", saved_line),
            ("model", lambda run: model_line(run.report.model)),
        ]
        plans = [plan_cells(run.report.edit) for run in runs]
        table = [(name, [of(run) for run in runs]) for name, of in rows]
        table += [(f"{PLAN}{key}", [plan.get(key) or "none" for plan in plans]) for key in dict.fromkeys(chain(*plans))]
        table += _named("", [{each.name: _limited(each) for each in measures(run.report.metrics)} for run in runs])
        table += _named("guard ", [{guard.name: said(guard) for guard in run.report.guards} for run in runs])
        return cls(
            [run.name for run in runs],
            best([run.report for run in runs]),
            table,
            [action_word(run.report.verdict.action) for run in runs],
            [run.page for run in runs],
        )


def _is_alike(name: str, cells: Sequence[str]) -> bool:
    return name.startswith(PLAN) and len(set(cells)) == 1


def best(reports: Sequence[Report]) -> int | None:
    accepted = [place for place, report in enumerate(reports) if report.verdict.accepted]
    return min(accepted, key=lambda place: _cost(reports[place]), default=None)


def _cost(report: Report) -> tuple[float, float]:
    """Bits and primary metric; what was not measured costs more than any figure that was."""
    bits, metric = bits_per_parameter(report), report.metrics.primary
    figure = math.inf if metric is None or metric.figure is None else float(metric.figure)
    return math.inf if bits is None else bits, math.inf if math.isnan(figure) else figure


def _stored_bits(report: Report) -> str:
    return shown(report.storage.after.bits_per_weight) if report.storage.after else NOT_MEASURED


def _limited(measure: Measure) -> str:
    return f"{measure.value} ({measure.limit})" if measure.limit else measure.value


def _named(prefix: str, columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [(f"{prefix}{name}", [column.get(name, NOT_MEASURED) for column in columns]) for name in names]
