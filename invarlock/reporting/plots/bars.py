"""A plot of bars with a number beside each. Every page has one, and importing matplotlib takes longer than a page."""

from __future__ import annotations

from collections.abc import Sequence

from invarlock.reporting.describing import shown
from invarlock.reporting.templating import environment

WIDTH, ROW = 360, 14
LABELS, NUMBERS = 120, 60
"""Room for names on the left, and for the numbers on the right."""
MOST_LETTERS = 24


def drawn(key: str, title: str, timed: Sequence[tuple[str, float]]) -> str:
    """An SVG element with a bar for each name and its seconds.

    :param timed: at least one.
    """
    unit = (WIDTH - LABELS - NUMBERS) / (max(seconds for _, seconds in timed) or 1)
    rows = [
        (name[:MOST_LETTERS], round(unit * seconds, 2), shown(seconds, "s"), place * ROW)
        for place, (name, seconds) in enumerate(timed)
    ]
    size = {"width": WIDTH, "height": len(rows) * ROW, "labels": LABELS, "row": ROW}
    return environment(html=True).get_template("bars.svg.jinja").render(key=key, title=title, rows=rows, **size)
