"""Text for a terminal: the verdict first, then what it rests on."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from invarlock.core.results import Action
from invarlock.core.sections import ReportSection
from invarlock.core.text import on_one_line
from invarlock.reporting import describing, searches, shares
from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.describing import NOT_MEASURED
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import EditSection, Report, SearchSection

COLOURS = {"continue": "green", "warn": "yellow", "rollback": "red", "abort": "bold red", "unknown": "bold red"}
WIDTH = 100
"""Columns of what is written for a terminal into a file."""


def render(runs: Sequence[SavedReport]) -> str:
    text = io.StringIO()
    print_to(Console(file=text, width=WIDTH, soft_wrap=True, no_color=True), runs)
    return text.getvalue()


def print_to(console: Console, runs: Sequence[SavedReport]) -> None:
    """Print one report, or several side by side."""
    if len(runs) == 1:
        print_report(runs[0].report, console)
    else:
        _print_side_by_side(SideBySide.of(runs), console)


def print_report(report: Report, console: Console, *, verbose: bool = False) -> None:
    """:param verbose: a row for each weight, too."""
    for line in _lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    if families := describing.families(report.edit):
        console.print(_families(families))
    if report.search:
        console.print(_plans(report.search))
    console.print(_guards(report))
    for section in report.sections:
        for line in (_line(f"{section.title} (by {section.source})"), escape(section.text)):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(_section(section))
    if verbose:
        console.print(_weights(report.edit))


def verdict_line(report: Report) -> str:
    """The verdict in one line, with rich's markup."""
    verdict, action = report.verdict, describing.action_word(report.verdict.action)
    return f"[{COLOURS[action]}]{describing.word(verdict)}[/] ({action}): {_line(_summary(report))}"


def _summary(report: Report) -> str:
    undecided = report.metrics.undecided
    if undecided and describing.is_inconclusive(report.verdict):
        return undecided.message
    return describing.summary(report.verdict)


def _print_side_by_side(table: SideBySide, console: Console) -> None:
    best = "none was accepted" if table.best is None else table.runs[table.best]
    console.print(f"best     {_line(best)}", highlight=False, soft_wrap=True)
    console.print(escape(table.rule), highlight=False, soft_wrap=True)
    console.print()
    runs = [f"{run} (best)" if place == table.best else run for place, run in enumerate(table.runs)]
    shown = _table("figure", *runs, fold=("figure", *runs))
    for name, cells in table.shown:
        coloured = zip(cells, table.actions, strict=True) if name == table.verdict else ((cell, None) for cell in cells)
        shown.add_row(escape(name), *(_in_colour(cell, action) for cell, action in coloured))
    console.print(shown)
    if table.folded:
        alike = ", ".join(f"{name} {cell}" for name, cell in table.folded)
        console.print(f"the same in all: {_line(alike)}", highlight=False, soft_wrap=True)


def _lines(report: Report) -> Iterator[str]:
    yield verdict_line(report)
    for reason in describing.reasons(report):
        yield f"  - {_line(reason)}"
    for suspect in describing.most_suspect(report.verdict):
        yield f"suspect  {_line(suspect.module)} ({_line(describing.evidence(suspect))})"
    for step in report.what_next:
        yield f"next     {_line(': '.join(filter(None, (step.reason, step.option))))}"
    yield ""
    yield f"model    {_line(describing.model_line(report.model))}"
    yield f"edit     {_line(describing.edit_line(report.edit))}"
    if stored := describing.storage_line(report.storage):
        yield f"storage  {_line(stored)}"
    yield f"metric   {_line(describing.metric_line(report.metrics))}"
    if report.metrics.predictions:
        yield f"tokens   {_line(report.metrics.predictions.message)}"
    for figure in report.metrics.figures:
        yield f"besides  {_line(figure.message)}"
    if report.metrics.noise:
        yield f"noise    {_line(report.metrics.noise.message)}"
    yield f"rests on {_line(report.verdict.rests_on)}"
    if report.reference:
        yield f"         {_line(describing.reference_line(report.reference))}"
    if seen := describing.seen(report.coverage):
        yield f"coverage {_line(seen)} seen"
    for gap in report.coverage.gaps:
        if gap.action is Action.CONTINUE:  # The others are among the reasons.
            yield f"  - {_line(gap.sentence)}"
    if line := shares.shares_line(report):
        yield f"shares   {_line(line)}"
    if measured := shares.put_back(report):
        yield f"rise     {_line(shares.contributions_line(report))}"
        for part in measured:
            alone, noise = describing.shown(part.measured), describing.shown(part.noise)
            yield f"  - {_line(part.module)}: put back alone {alone}, noise of the same norm {noise}"
    if report.model.restored is not None:
        yield f"model    {'restored bit for bit' if report.model.restored else 'NOT RESTORED'}"
    if report.search:
        yield f"search   {_line(searches.search_line(report.search))}"
        return
    for attempt in report.attempts[:-1]:
        metric = describing.shown(attempt.metric)
        action = describing.action_word(attempt.action)
        yield f"attempt  {attempt.attempt} at {describing.bits_of(attempt)}: {action}, primary metric {metric}"


def _plans(search: SearchSection) -> Table:
    *figures, verdict = searches.POINT_COLUMNS
    table = _table(*figures, verdict, right=(*figures,))
    for point in search.points:
        *cells, action = searches.point_cells(point)
        table.add_row(*map(escape, cells), _in_colour(action, action))
    return table


def _in_colour(cell: str, action: str | None) -> str:
    return f"[{COLOURS[action]}]{escape(cell)}[/]" if action else escape(cell)


def _line(text: str) -> str:
    return escape(on_one_line(text))


def _table(*headings: str, right: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        folds = heading in fold
        table.add_column(
            escape(heading), no_wrap=not folds, overflow="fold" if folds else "ellipsis",
            justify="right" if heading in right else "left",
        )  # fmt: skip
    return table


def _below(table: Table) -> Padding:
    return Padding(table, (0, 0, 1, 0))


def _guards(report: Report) -> Padding:
    table = _table("guard", "action", "seconds", "what it says", right=("seconds",), fold=("what it says",))
    for guard in report.guards:
        seconds = NOT_MEASURED if guard.seconds is None else f"{guard.seconds:.2f}"
        said = describing.said(guard)
        table.add_row(escape(guard.name), f"[{COLOURS.get(said, 'dim')}]{said}[/]", seconds, escape(guard.message))
    return _below(table)


def _families(families: Sequence[tuple[str, str, int]]) -> Padding:
    """Changes by family: a layer that was meant to be quantized and was not stands out."""
    table = _table("family", "weights", "change", right=("weights",), fold=("family", "change"))
    for family, change, count in families:
        table.add_row(escape(family), str(count), escape(change))
    return _below(table)


def _section(section: ReportSection) -> Padding:
    table = _table(*section.columns, fold=tuple(section.columns))
    for row in section.rows:
        table.add_row(*(escape(describing.cell(entry)) for entry in row))
    return _below(table)


def _weights(edit: EditSection) -> Table:
    figures = ("bits", "relative error", "SQNR dB", "clipped")
    table = _table("weight", *figures, right=figures, fold=("weight",))
    for weight in edit.modules:
        measured = (weight.relative_error, weight.sqnr_db, weight.clipped_share)
        shown = [NOT_MEASURED if value is None else f"{value:.4g}" for value in measured]
        table.add_row(escape(weight.name), str(weight.bits), *shown)
    return table
