"""JSON: one report as it is, several as the table that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from invarlock.reporting.comparing import SideBySide
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import to_json


def render(runs: Sequence[SavedReport]) -> str:
    return to_json(runs[0].values if len(runs) == 1 else asdict(SideBySide.of(runs)))
