"""A page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.templating import environment, source


def render_html(report: Mapping[str, Any], folder: Path | None = None) -> str:
    """The page of one report.

    :param folder: the run's.
    """
    return render([SavedReport(report, folder)])


def render(runs: Sequence[SavedReport]) -> str:
    from invarlock.reporting.plots.plot import plots_of

    page = {"style": source("style.css"), "script": source("page.js")}
    page["script_digest"] = base64.b64encode(hashlib.sha256(page["script"].encode()).digest()).decode()
    templates = environment(html=True)
    if len(runs) > 1:
        return templates.get_template("side_by_side.html.jinja").render(table=SideBySide.of(runs), **page)
    report = runs[0].report
    template = templates.get_template("report.html.jinja")
    return template.render(report=report, name=runs[0].name, plots=plots_of(report), **page)
