"""Shares of the changed weights in the rise of the loss, as tables and lines show them."""

from __future__ import annotations

from invarlock.reporting.describing import shown
from invarlock.reporting.report import ModuleRise, Report

MOST = 10
"""As many as suspects; report.json has them all."""
MOST_IN_A_LINE = 3
NATS = "nats per token"


def contributions(report: Report) -> list[list[str]]:
    """The weights that contribute most: share, predicted rise and, if any was put back, measured rise and control."""
    found = report.attribution
    if found is None:
        return []
    figures = [
        [each.module, shown(each.share, "%", 3), shown(each.predicted), shown(each.measured), shown(each.noise)]
        for each in found.modules[:MOST]
    ]
    return [row[: len(contribution_columns(report))] for row in figures]


def contribution_columns(report: Report) -> list[str]:
    """Headings of these figures."""
    columns = ["weight", "share", "predicted"]
    return [*columns, "put back alone", "random change of the same norm"] if put_back(report) else columns


def put_back(report: Report) -> list[ModuleRise]:
    """The weights whose part was measured."""
    return [each for each in report.attribution.modules if each.measured is not None] if report.attribution else []


def contributions_line(report: Report) -> str:
    """The whole of the rise; empty where no weight was changed."""
    found = report.attribution
    if found is None:
        return ""
    parts = []
    if found.rise is not None:
        parts.append(f"the loss rises by {shown(found.rise, NATS)} on the final windows")
    if found.not_predicted:
        parts.append(f"their shares are not measured: {found.not_predicted}")
    else:
        parts.append(f"a rise of {shown(found.predicted, NATS)} is predicted")
    if found.additivity is not None:
        parts.append(f"put back one by one, weights give {shown(found.additivity)} times what they do together")
    return "; ".join(parts)


def shares_line(report: Report) -> str:
    """The largest shares; empty where there are none."""
    first = [each for each in report.attribution.modules if each.share is not None] if report.attribution else []
    if not first or report.attribution is None:
        return ""
    largest = ", ".join(f"{each.module} {shown(each.share, '%', 3)}" for each in first[:MOST_IN_A_LINE])
    return f"{largest} of the predicted rise, {shown(report.attribution.predicted, NATS)}"
