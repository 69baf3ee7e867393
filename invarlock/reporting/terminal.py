"""What a terminal shows of a report: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from invarlock.core.text import on_one_line
from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.describing import NOT_MEASURED
from invarlock.reporting.view import Guard, Section, View

COLOURS = {"continue": "green", "warn": "yellow", "rollback": "red", "abort": "bold red", "unknown": "bold red"}


def render(view: View, console: Console, *, verbose: bool = False) -> None:
    """Print a report.

    :param verbose: a row for each weight, too.
    """
    for line in _lines(view):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    if view.families:
        console.print(_families(view))
    console.print(_guards(view))
    for section in view.sections:
        for line in (_line(f"{section.title} (by {section.source})"), escape(section.text)):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(_section(section))
    if verbose:
        console.print(_modules(view))


def verdict_line(view: View) -> str:
    """The verdict in one line, with rich's markup."""
    verdict = view.verdict
    return f"[{COLOURS[verdict.action]}]{verdict.word}[/] ({verdict.action}): {_line(verdict.summary)}"


def render_side_by_side(table: SideBySide, console: Console) -> None:
    """Print several runs, a column each."""
    best = "none was accepted" if table.best is None else table.runs[table.best]
    console.print(f"best     {_line(best)}", highlight=False, soft_wrap=True)
    console.print(escape(table.rule), highlight=False, soft_wrap=True)
    console.print()
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("figure", overflow="fold")
    for place, run in enumerate(table.runs):
        shown.add_column(escape(run) + (" (best)" if place == table.best else ""), overflow="fold")
    for name, cells in table.rows:
        shown.add_row(escape(name), *map(escape, cells))
    console.print(shown)


def _lines(view: View) -> Iterator[str]:
    yield verdict_line(view)
    for reason in view.reasons:
        yield f"  - {_line(reason)}"
    for suspect in view.most_suspect:
        yield f"suspect  {_line(suspect.module)} ({_line(suspect.evidence[0])})"
    yield ""
    yield f"model    {_line(view.model)}"
    yield f"edit     {_line(view.edit)}"
    yield f"metric   {_line(view.metric)}"
    if view.predictions:
        yield f"tokens   {_line(view.predictions)}"
    yield f"rests on {_line(view.verdict.rests_on)}"
    if view.restored is not None:
        yield f"model    {'restored bit for bit' if view.restored else 'NOT RESTORED'}"
    for attempt in view.attempts[:-1]:
        yield f"attempt  {_line(attempt.number)} at {attempt.bitwidth} bits: {attempt.action}"


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


def _guards(view: View) -> Padding:
    table = _table("guard", "action", "seconds", "what it says", right=("seconds",), fold=("what it says",))
    for guard in view.guards:
        seconds = NOT_MEASURED if guard.seconds is None else f"{guard.seconds:.2f}"
        table.add_row(escape(guard.name), _said(guard), seconds, escape(guard.message))
    return _below(table)


def _said(guard: Guard) -> str:
    return f"[{'dim' if guard.passed is None else COLOURS[guard.action]}]{guard.said}[/]"


def _families(view: View) -> Padding:
    """What was changed, by family: a layer that was meant to be quantized and was not stands out."""
    table = _table("family", "weights", "change", right=("weights",), fold=("family", "change"))
    for family, change, count in view.families:
        table.add_row(escape(family), str(count), escape(change))
    return _below(table)


def _section(section: Section) -> Padding:
    table = _table(*section.columns, fold=tuple(section.columns))
    for row in section.rows:
        table.add_row(*map(escape, row))
    return _below(table)


def _modules(view: View) -> Table:
    figures = ("bits", "relative error", "SQNR dB", "clipped")
    table = _table("weight", *figures, right=figures, fold=("weight",))
    for module in view.modules:
        measured = (module.relative_error, module.sqnr_db, module.clipped_share)
        shown = [NOT_MEASURED if value is None else f"{value:.4g}" for value in measured]
        table.add_row(escape(module.name), str(module.bits), *shown)
    return table
