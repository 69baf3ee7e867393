"""A page of HTML that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.plots import plot
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.templating import environment, source


def render_html(
    report: Mapping[str, Any],
    folder: Path | None = None,
    plots: Sequence[plot.Plot] | None = None,
    files: Path | None = None,
) -> str:
    """The page of one report.

    :param folder: the run's.
    :param plots: those of the edit, if they are drawn already.
    :param files: the folder that holds the run's files, while they are not in place yet.
    """
    run = SavedReport(report, folder, files=files)
    drawn = plot.plots_of(run.report) if plots is None else plots
    return _page(
        "report.html.jinja", run=run, report=run.report, plots=[*drawn, plot.plot_of_stages(run.report.timings)]
    )


def render(runs: Sequence[SavedReport]) -> str:
    if len(runs) == 1:
        return render_html(runs[0].values, runs[0].folder)
    return _page("side_by_side.html.jinja", runs=SideBySide.of(runs), plots=[plot.plot_of_runs(runs)])


def _page(template: str, **content: Any) -> str:
    script = source("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shell = {"style": source("style.css"), "script": script, "script_digest": digest}
    return environment(html=True).get_template(template).render(**content, **shell)
