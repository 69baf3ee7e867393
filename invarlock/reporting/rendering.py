"""Reports as text of every format, each made from the one view of a report."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.core.text import markdown
from invarlock.reporting import describing
from invarlock.reporting.comparing import SideBySide, as_json
from invarlock.reporting.junit import Suite
from invarlock.reporting.reading import Run
from invarlock.reporting.report import to_json
from invarlock.reporting.view import View

if TYPE_CHECKING:
    import jinja2
    from rich.console import Console

TEMPLATES = resources.files(__package__) / "templates"
WIDTH = 100
"""Columns of what is written for a terminal into a file."""


def render_html(report: Mapping[str, Any], folder: Path | None = None) -> str:
    """One report as a page that needs nothing but itself.

    :param folder: the run's.
    """
    return _html([View.of(report, folder)])


def render(runs: Sequence[Run], format_: str) -> str:
    """One report, or several side by side, as text.

    :param format_: ``json``, or a key of ``FORMATS``.
    """
    if format_ == "json":
        return to_json(dict(runs[0].report)) if len(runs) == 1 else as_json(SideBySide.of(_views(runs)))
    return FORMATS[format_](_views(runs))


def _views(runs: Sequence[Run]) -> list[View]:
    return [View.of(run.report, run.folder) for run in runs]


def print_to(console: Console, runs: Sequence[Run]) -> None:
    """Print one report, or several side by side."""
    _print(console, _views(runs))


def _print(console: Console, views: Sequence[View]) -> None:
    # Only here: a page needs no rich.
    from invarlock.reporting import terminal

    if len(views) == 1:
        terminal.render(views[0], console)
    else:
        terminal.render_side_by_side(SideBySide.of(views), console)


def _terminal(views: Sequence[View]) -> str:
    from rich.console import Console

    text = io.StringIO()
    _print(Console(file=text, width=WIDTH, soft_wrap=True, no_color=True), views)
    return text.getvalue()


def _html(views: Sequence[View]) -> str:
    from invarlock.reporting.plots import plots_of

    page = {"style": _source("style.css"), "script": _source("page.js")}
    page["script_digest"] = _digest(page["script"])
    if len(views) > 1:
        return (
            _environment(autoescape=True)
            .get_template("side_by_side.html.jinja")
            .render(table=SideBySide.of(views), **page)
        )
    template = _environment(autoescape=True).get_template("report.html.jinja")
    return template.render(view=views[0], plots=plots_of(views[0]), **page)


def _markdown(views: Sequence[View]) -> str:
    environment = _environment(autoescape=False)
    if len(views) > 1:
        return environment.get_template("side_by_side.md.jinja").render(table=SideBySide.of(views))
    return environment.get_template("report.md.jinja").render(view=views[0])


def _junit(views: Sequence[View]) -> str:
    suites = [Suite.of(view) for view in views]
    return _environment(autoescape=True).get_template("junit.xml.jinja").render(suites=suites)


def _sarif(views: Sequence[View]) -> str:
    from invarlock.reporting.sarif import sarif_log

    return to_json(sarif_log(views))


FORMATS: Mapping[str, Callable[[Sequence[View]], str]] = {
    "terminal": _terminal,
    "markdown": _markdown,
    "html": _html,
    "junit": _junit,
    "sarif": _sarif,
}


@lru_cache(maxsize=2)
def _environment(*, autoescape: bool) -> jinja2.Environment:
    """Where whatever is put in is escaped: for HTML and XML, or else for Markdown."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=autoescape,
        finalize=None if autoescape else markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shown": describing.shown, "shown_bytes": describing.shown_bytes}
    return environment


def _source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
