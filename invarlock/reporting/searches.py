"""Wording of a search: its plans as a table, and each as a configuration takes it."""

from __future__ import annotations

import yaml

from invarlock.reporting.describing import action_word, shown, shown_bytes
from invarlock.reporting.report import SearchPoint, SearchSection

POINT_COLUMNS = ("bits", "size", "predicted", "measured", "interval", "verdict")


def search_line(search: SearchSection) -> str:
    """The target, and what the plans were chosen from and measured on."""
    plans = f"{len(search.points)} plans" if len(search.points) != 1 else "one plan"
    chosen = f"{search.target}, schemes chosen for {search.decisions} weights or sets of fused ones"
    several = "the same final windows" if len(search.points) > 1 else "final windows that no step of the search saw"
    return f"{chosen} by {sensitivities_line(search)}; {plans} judged on {several}"


def sensitivities_line(search: SearchSection) -> str:
    """The kind of sensitivities, and the reason where they are not by gradients."""
    by = f"{search.sensitivities} on the preview windows"
    return f"{by} (no gradients: {search.no_gradients}; {search.preview_passes} passes)" if search.no_gradients else by


def point_cells(point: SearchPoint) -> list[str]:
    """A row of the table."""
    interval = f"{shown(point.ci[0])} to {shown(point.ci[1])}" if point.ci else "not measured"
    figures = map(shown, (point.predicted, point.ratio))
    return [shown(point.bits_per_weight), shown_bytes(point.bytes), *figures, interval, action_word(point.action)]


def point_rows(search: SearchSection) -> list[list[str]]:
    return [point_cells(point) for point in search.points]


def plan_text(point: SearchPoint) -> str:
    """The plan, ready to paste into a configuration."""
    rules = yaml.safe_dump(point.plan, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)
    return "edit:\n  plan:\n" + "".join(f"    {line}\n" for line in rules.splitlines())
