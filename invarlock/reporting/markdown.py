"""Markdown, for a pull request or a wiki."""

from __future__ import annotations

from collections.abc import Sequence

from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.templating import environment


def render(runs: Sequence[SavedReport]) -> str:
    templates = environment(html=False)
    if len(runs) > 1:
        return templates.get_template("side_by_side.md.jinja").render(runs=SideBySide.of(runs))
    return templates.get_template("report.md.jinja").render(report=runs[0].report, run=runs[0])
