"""Drawing with matplotlib: the same bytes for the same figures, in the colours of the page."""

from __future__ import annotations

import io
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from invarlock.evaluation.results import MetricResult
from invarlock.reporting.plots.data import Point, SpectrumChange, log

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes], None]

MARKERS = "os^Dv"
MOST_STAGES = 20
"""Bars that a plot has the height for."""
SVG = "http://www.w3.org/2000/svg"
# What matplotlib draws with, and what the page's style sheet makes of it, by day and by night.
COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--line)",
    "#000003": "var(--bad)",
    "#000004": "var(--band)",
    **{f"#00001{place}": f"var(--plot-{place})" for place in range(5)},
}
INK, LINE, BAD, BAND, *SERIES = COLOURS


def errors(points: Sequence[Point], suspected: Sequence[Point]) -> Draw:
    def draw(axes: Axes) -> None:
        _scatter(axes, points)
        for point in suspected:
            axes.plot(point.place, point.value, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=BAD)
        axes.set_ylabel("relative error")
        axes.set_ylim(0, 1.1 * max(point.value for point in points) or 1)

    return draw


def bits(points: Sequence[Point]) -> Draw:
    def draw(axes: Axes) -> None:
        _scatter(axes, points)
        axes.set_ylabel("bits")
        axes.set_ylim(0, max(8.0, *(point.value for point in points)) * 1.1)

    return draw


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("block, from input to output")
    for role in sorted({point.role for point in points}):
        places, values = zip(*((point.place, point.value) for point in points if point.role == role), strict=True)
        axes.plot(places, values, linestyle="none", marker=MARKERS[role], color=SERIES[role], markersize=5)


def rises(points: Sequence[tuple[float, float]], metric: MetricResult | None) -> Draw:
    mean, limit = (log(metric.ratio), log(metric.limit)) if metric else (None, None)
    ends = [end for ratio in (metric.ci if metric else None) or () if (end := log(ratio)) is not None]

    def draw(axes: Axes) -> None:
        if len(ends) == 2:
            axes.axhspan(*ends, color=BAND)
        if mean is not None:
            axes.axhline(mean, color=INK, linewidth=1)
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1.5, linestyle="--")
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.plot(*zip(*points, strict=True), linestyle="none", marker="o", color=SERIES[0], markersize=4)
        axes.set_ylabel("nats per token")
        axes.set_xlabel("window")

    return draw


def spectrum(found: SpectrumChange) -> Draw:
    def draw(axes: Axes) -> None:
        for values, colour, marker in ((found.before, SERIES[0], "o"), (found.after, SERIES[1], "s")):
            axes.plot(range(1, len(values) + 1), values, color=colour, marker=marker, markersize=3.5, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("singular value")
        axes.set_xlabel("place, the largest first")

    return draw


def stages(timed: Sequence[tuple[str, float]]) -> Draw:
    names, seconds = zip(*timed[:MOST_STAGES], strict=True)

    def draw(axes: Axes) -> None:
        axes.barh(range(len(names)), seconds, color=SERIES[0])
        axes.set_yticks(range(len(names)), [_label(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")

    return draw


def _label(name: str) -> str:
    """A name that any font can draw."""
    return re.sub(r"[^ -~]", "?", name)[:24]


def drawn(key: str, title: str, draw: Callable[[Any], None]) -> str:
    """An SVG element: the same bytes for the same figures, and ids that no other plot of the page has."""
    # Only here: matplotlib takes longer to import than any other rendering takes in all.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": 10,
        "axes.edgecolor": LINE, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": LINE, "grid.alpha": 0.4,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True,
    }  # fmt: skip
    with mpl.rc_context():
        # Not what a matplotlibrc of the user says: a page looks the same everywhere, and needs no TeX.
        mpl.rcdefaults()
        mpl.rcParams.update(style)
        figure = Figure(figsize=(5, 3.1), dpi=72, layout="constrained")
        draw(figure.subplots())
        drawing = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawing, format="svg", transparent=True, metadata=nothing)
    return _for_a_page(drawing.getvalue(), key, title)


def _for_a_page(drawing: bytes, key: str, title: str) -> str:
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(drawing)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-label": title, "aria-describedby": f"{key}-caption"}
    for element in root.iter():
        # Ids that nothing refers to would be there once for each plot.
        if not element.tag.endswith(("path", "clipPath")):
            element.attrib.pop("id", None)
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"font-family: [^;]*sans-serif", "font-family: inherit", text)
    return re.sub("|".join(COLOURS), lambda match: COLOURS[match[0]], text)
