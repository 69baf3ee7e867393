"""What a terminal shows of a report: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

COLOURS = {"continue": "green", "warn": "yellow", "rollback": "red", "abort": "bold red"}
NOT_MEASURED = "not measured"
MOST_SUSPECTS = 3


def render(report: Mapping[str, Any], console: Console, *, verbose: bool = False) -> None:
    """Print a report, as ``report.json`` holds it.

    :param verbose: a row for each weight, too.
    """
    for line in _lines(report):
        console.print(line, highlight=False, soft_wrap=True)
    console.print()
    if families := report["edit"]["plan"].get("families"):
        console.print(_families(families))
    console.print(_guards(report))
    if verbose:
        console.print(_modules(report))


def verdict_line(report: Mapping[str, Any]) -> str:
    """The verdict in one line, with rich's markup."""
    verdict = report["verdict"]
    word = "ACCEPTED" if verdict["accepted"] else "REJECTED"
    return f"[{COLOURS[verdict['action']]}]{word}[/] ({verdict['action']}): {escape(_summary(verdict))}"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    verdict, edit, model = report["verdict"], report["edit"], report["model"]
    yield verdict_line(report)
    for reason in _reasons(report):
        yield f"  - {escape(reason)}"
    for suspect in verdict["suspects"][:MOST_SUSPECTS]:
        yield f"suspect  {escape(suspect['module'])} ({escape(suspect['evidence'][0])})"
    yield ""
    yield f"model    {escape(model['id'])} (adapter {escape(model['adapter'])}, {_described(model['description'])})"
    yield f"edit     {escape(_edit(edit))}"
    yield f"metric   {escape(_metric(report['metrics']['primary']))}"
    if predictions := report["metrics"]["predictions"]:
        yield f"tokens   {escape(predictions['message'])}"
    yield f"rests on {escape(verdict['rests_on'])}"
    if model["restored"] is not None:
        yield f"model    {'restored bit for bit' if model['restored'] else 'NOT RESTORED'}"
    for attempt in report["attempts"][:-1]:
        yield f"attempt  {attempt['attempt']} at {attempt['bitwidth']} bits: {attempt['action']}"


def _summary(verdict: Mapping[str, Any]) -> str:
    if verdict["action"] == "continue":
        return "no guard objected"
    return f"decided by {verdict['decided_by']}"


def _reasons(report: Mapping[str, Any]) -> list[str]:
    """What decided, and what stands in no line or table below."""
    shown = [f"guard {guard['name']}" for guard in report["guards"]]
    if report["metrics"]["primary"]:
        shown += ["primary metric", "predictions"]
    deciding = report["verdict"]["decided_by"]
    others = tuple(f"{source}: " for source in shown if source != deciding)
    return [reason for reason in report["verdict"]["reasons"] if not reason.startswith(others)]


def _described(description: Mapping[str, Any]) -> str:
    parameters = description.get("parameters")
    size = f", {parameters / 1e6:.2f} M parameters" if isinstance(parameters, int) else ""
    return escape(f"{description.get('model_class', 'unknown class')}{size}")


def _edit(edit: Mapping[str, Any]) -> str:
    what = _compared(edit) if "subject" in edit["plan"] else _planned(edit)
    modules = edit["modules"]
    if not modules:
        return f"{what}: not made"
    errors = [module["relative_error"] for module in modules if module["relative_error"] is not None]
    if not errors:
        return f"{what}, relative error {NOT_MEASURED}"
    worst = max(modules, key=lambda module: module["relative_error"] or 0.0)
    return f"{what}, relative error up to {max(errors):.3g} ({worst['name']})"


def _compared(edit: Mapping[str, Any]) -> str:
    changed = sum(module["change"] != "unchanged" for module in edit["modules"])
    what = f"{changed} of {len(edit['modules'])} weights, {edit['params_changed']:,} parameters"
    return f"{edit['plan']['subject']} differs in {what}"


def _planned(edit: Mapping[str, Any]) -> str:
    plan = edit["plan"]
    kind = "symmetric" if plan["symmetric"] else "asymmetric"
    if plan["group_size"]:
        grain = f"groups of {plan['group_size']}"
    else:
        grain = "per output channel" if plan["per_channel"] else "per tensor"
    what = f"{edit['name']}, {plan['bitwidth']} bits, {kind}, {grain}, scope {plan['scope']}"
    return f"{what}: {len(edit['modules'])} weights, {edit['params_changed']:,} parameters"


def _metric(metric: Mapping[str, Any] | None) -> str:
    return metric["message"] if metric else NOT_MEASURED


def _guards(report: Mapping[str, Any]) -> Padding:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("guard", "action", "seconds"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "seconds" else "left")
    table.add_column("what it says", overflow="fold")
    for guard in report["guards"]:
        said = "not run" if guard["passed"] is None else guard["action"]
        style = COLOURS[guard["action"]] if guard["passed"] is not None else "dim"
        table.add_row(escape(guard["name"]), f"[{style}]{said}[/]", f"{guard['seconds']:.2f}", escape(guard["message"]))
    return Padding(table, (0, 0, 1, 0))


def _families(families: Sequence[Mapping[str, Any]]) -> Padding:
    """What was changed, by family: a layer that was meant to be quantized and was not stands out."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("family", overflow="fold")
    table.add_column("weights", no_wrap=True, justify="right")
    table.add_column("change", overflow="fold")
    for family in families:
        for change, count in family["changes"].items():
            table.add_row(escape(family["family"]), str(count), escape(change))
    return Padding(table, (0, 0, 1, 0))


def _modules(report: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("weight", overflow="fold")
    for heading in ("bits", "relative error", "SQNR dB", "clipped"):
        table.add_column(heading, justify="right", no_wrap=True)
    for module in report["edit"]["modules"]:
        figures = (module["relative_error"], module["sqnr_db"], module["clipped_share"])
        shown = [f"{value:.4g}" if isinstance(value, float) else str(value or NOT_MEASURED) for value in figures]
        table.add_row(escape(module["name"]), str(module["bits"]), *shown)
    return table
