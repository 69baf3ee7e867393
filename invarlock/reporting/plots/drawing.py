"""Drawing with matplotlib: the same bytes for the same figures, in the colours of the page."""

from __future__ import annotations

import io
import logging
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from invarlock.evaluation.results import MetricResult
from invarlock.reporting.plots.data import Point, RunPoint, SpectrumChange, nats_per, rise_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "os^Dv"
SVG = "http://www.w3.org/2000/svg"
# What matplotlib draws with, and what the page's style sheet makes of it, by day and by night.
COLOURS = {
    "#000001": "var(--ink)",
    "#000002": "var(--line)",
    "#000003": "var(--bad)",
    "#000004": "var(--band)",
    "#000005": "var(--good)",
    **{f"#00001{place}": f"var(--plot-{place})" for place in range(5)},
}
INK, LINE, BAD, BAND, GOOD, *SERIES = COLOURS
MARGINS = {"left": 0.19, "right": 0.98, "bottom": 0.18, "top": 0.93, "hspace": 0.25}
"""Shares of a plot, with room for eight digits and a power of ten; to measure the labels takes as long as to draw."""


def errors(axes: Axes, points: Sequence[Point], suspected: Sequence[Point]) -> None:
    _scatter(axes, points)
    for point in suspected:
        axes.plot(point.place, point.value, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=BAD)
    axes.set_ylabel("relative error")
    axes.set_ylim(0, 1.1 * max(point.value for point in points) or 1)


def bits(axes: Axes, points: Sequence[Point]) -> None:
    _scatter(axes, points)
    axes.set_ylabel("bits")
    axes.set_ylim(0, max(8.0, *(point.value for point in points)) * 1.1)


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    _count_along(axes)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:g}" if place >= 0 else "")
    axes.set_xlabel("block, from input to output")
    for role in sorted({point.role for point in points}):
        places, values = zip(*((point.place, point.value) for point in points if point.role == role), strict=True)
        axes.plot(places, values, linestyle="none", marker=MARKERS[role], color=SERIES[role], markersize=5)


def _count_along(axes: Axes) -> None:
    """Whole numbers alone below the axes."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def rises(axes: Axes, points: Sequence[tuple[float, float]], metric: MetricResult | None) -> None:
    mean, limit = (rise_of(metric, metric.figure), rise_of(metric, metric.limit)) if metric else (None, None)
    ends = [end for value in (metric and metric.ci) or () if metric and (end := rise_of(metric, value)) is not None]
    if len(ends) == 2:
        axes.axhspan(*ends, color=BAND)
    if mean is not None:
        axes.axhline(mean, color=INK, linewidth=1)
    if limit is not None:
        axes.axhline(limit, color=BAD, linewidth=1.5, linestyle="--")
    axes.axhline(0, color=LINE, linewidth=0.8)
    axes.plot(*zip(*points, strict=True), linestyle="none", marker="o", color=SERIES[0], markersize=4)
    axes.set_ylabel(nats_per(metric))
    axes.set_xlabel("window")
    _count_along(axes)


def path(axes: Axes, looks: Sequence[tuple[float, ...]], limit: float | None, name: str) -> None:
    windows, figures, lows, highs = zip(*looks, strict=True)
    axes.fill_between(windows, lows, highs, color=BAND)
    axes.plot(windows, figures, color=INK, linewidth=1)
    if limit is not None:
        axes.axhline(limit, color=BAD, linewidth=1.5, linestyle="--")
    axes.set_ylabel(name)
    axes.set_xlabel("windows")
    _count_along(axes)


def spectrum(axes: Sequence[Axes], found: SpectrumChange) -> None:
    """Both sides above, the baseline's as rings around the edited ones, and their differences below."""
    above, below = axes
    for values, colour, marker, size in ((found.before, SERIES[0], "o", 8), (found.after, SERIES[1], "s", 3)):
        fill = "none" if marker == "o" else colour
        places = range(1, len(values) + 1)
        above.plot(places, values, color=colour, marker=marker, markersize=size, markerfacecolor=fill, linestyle="none")
    above.set_ylim(0, 1.1 * max([*found.before, *found.after], default=0) or 1)
    above.set_ylabel("singular value")
    below.bar(range(1, len(found.differences) + 1), found.differences, color=SERIES[1], width=0.6)
    below.axhline(0, color=LINE, linewidth=0.8)
    below.set_ylabel("difference")
    below.set_xlabel("place, the largest first")


def runs(axes: Axes, points: Sequence[RunPoint], limits: Sequence[float]) -> None:
    for point in points:
        colour = GOOD if point.accepted else BAD
        ends = [[max(0, point.ratio - point.low)], [max(0, point.high - point.ratio)]]
        axes.errorbar(
            point.bits, point.ratio, yerr=ends, color=colour, marker=MARKERS[point.shape], markersize=6, capsize=3
        )
    for limit in limits:
        axes.axhline(limit, color=BAD, linewidth=1.5, linestyle="--")
    axes.set_xlabel("bits per parameter")
    axes.set_ylabel("perplexity ratio")


def frontier(axes: Axes, points: Sequence[tuple[RunPoint, float]]) -> None:
    """Plans of a search, and the ratio that was predicted of each."""
    runs(axes, [point for point, _ in points], [limit for limit in {point.limit for point, _ in points} if limit])
    for point, ratio in points:
        axes.plot(point.bits, ratio, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
    axes.set_xlabel("bits per weight")


def drawn(key: str, title: str, draw: Callable[..., None], *figures: Any, heights: Sequence[int] = (1,)) -> str:
    """An SVG element: the same bytes for the same figures, and ids that no other plot of the page has.

    :param draw: called with the axes, of which there are several if there are several heights, and the figures.
    """
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
        figure = Figure(figsize=(5, 3.1), dpi=72)
        figure.subplots_adjust(**MARGINS)
        draw(figure.subplots(len(heights), sharex=True, height_ratios=heights), *figures)
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
