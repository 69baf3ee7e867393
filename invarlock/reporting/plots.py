"""Plots of a report as SVG, to stand in a page: colours are the page's, and no text of a model or a plugin is in them.

Names go into the tables below the plots, where they can be escaped, wrapped and read aloud.
"""

from __future__ import annotations

import io
import logging
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invarlock.reporting.describing import NOT_MEASURED, shown
from invarlock.reporting.view import Module, Spectrum, View, Windows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 600
"""In one plot; of more modules the most changed of each block and role are shown, and windows in groups."""
MOST_ROWS = 400
"""In the table below a plot."""
ROLES = ("attention", "ffn", "embedding", "head")
"""Each with a colour and a marker of its own; any other role shares the last ones."""
MARKERS = "os^Dv"
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


@dataclass(frozen=True)
class Legend:
    name: str
    style: str
    """``plot-0`` to ``plot-4``, ``bad`` or ``ink``: a class of the page's style sheet."""
    marker: str


@dataclass(frozen=True)
class Plot:
    """A plot, what it shows in words, and the figures that it is made of."""

    key: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    svg: str = ""
    """Empty where nothing was measured; then the caption says what is missing."""
    legend: Sequence[Legend] = ()
    left_out: int = 0
    """Rows that the table does not show."""


def plots_of(view: View) -> list[Plot]:
    """The plots of a report, those that could not be made for lack of data among them."""
    return [
        _errors(view.modules, [suspect.module for suspect in view.most_suspect]),
        _rises(view.windows),
        _bits(view.modules, view.bits_per_parameter),
        *_spectra(view.shown_spectra),
        _stages(view.stages),
    ]


# -- along the depth of the model --------------------------------------------------------------------------------------


def _errors(modules: Sequence[Module], suspects: Sequence[str]) -> Plot:
    title = "Relative error along the depth of the model"
    columns = ["weight", "role", "bits", "relative error", "SQNR, dB", "clipped, share of weights"]
    measured = [(module, error) for module in modules if (error := _finite(module.relative_error)) is not None]
    if not measured:
        return Plot("errors", title, f"The relative error of the weights: {NOT_MEASURED}.", columns, [])
    points = _thinned(measured, _places(modules))
    suspected = [(place, error) for module, place, error in points if module.name in suspects]

    def draw(axes: Axes) -> None:
        _scatter(axes, points)
        for place, error in suspected:
            axes.plot(place, error, marker="o", markersize=11, markerfacecolor="none", markeredgecolor=BAD)
        axes.set_ylabel("relative error")
        axes.set_xlabel("block, from input to output")
        axes.set_ylim(0, 1.1 * max(error for _, _, error in points) or 1)

    ranked = sorted(modules, key=lambda module: -(module.relative_error or 0))
    rows = [_module_row(module) for module in (ranked[:MOST_ROWS] if len(modules) > MOST_ROWS else modules)]
    legend = [*_roles(points), *([Legend("suspect", "bad", "○")] if suspected else [])]
    caption = _error_caption(measured, len(points))
    return Plot(
        "errors", title, caption, columns, rows, _drawn("errors", title, draw), legend, len(modules) - len(rows)
    )


def _error_caption(measured: Sequence[tuple[Module, float]], drawn: int) -> str:
    worst, most = max(measured, key=lambda entry: entry[1])
    caption = (
        "How far each weight has moved: the Frobenius norm of the change over that of the weight (0 is unchanged, 1 as "
        f"if set to zero). The largest is {shown(most)}, of {worst.name}. It has no limit of its own: what counts "
        "is what the model computes."
    )
    if drawn < len(measured):
        caption += f" Of {len(measured):,} weights the most changed of each block and role are drawn."
    return caption


def _bits(modules: Sequence[Module], mean: float | None) -> Plot:
    title, columns = "Bits per weight", ["bits", "weights", "parameters"]
    known = [(module, float(module.bits)) for module in modules if module.bits is not None and 0 < module.bits < 1000]
    summary = f"Over all parameters {shown(mean, 'bits')} a parameter, scales not counted."
    if not known:
        return Plot("bits", title, f"The bits of the weights: {NOT_MEASURED}.", columns, [])
    points = _thinned(known, _places(modules))

    def draw(axes: Axes) -> None:
        _scatter(axes, points)
        axes.set_ylabel("bits")
        axes.set_xlabel("block, from input to output")
        axes.set_ylim(0, max(8.0, *(bits for _, _, bits in points)) * 1.1)

    counted: dict[float, list[Module]] = {}
    for module, bits in known:
        counted.setdefault(bits, []).append(module)
    rows = [
        [f"{bits:g}", f"{len(of_it):,}", f"{sum(module.parameters or 0 for module in of_it):,}"]
        for bits, of_it in sorted(counted.items())
    ]
    caption = f"The bits that each weight was rounded to. {summary}"
    return Plot("bits", title, caption, columns, rows, _drawn("bits", title, draw), _roles(points))


Point = tuple[Module, float, float]
"""A module, its place along the depth, and its value."""


def _places(modules: Sequence[Module]) -> dict[str, float]:
    """Of each module by name: the number of its block, in the order of the model, and how far in it the module is."""
    blocks: dict[str, list[str]] = {}
    for module in modules:
        blocks.setdefault(module.block, []).append(module.name)
    return {
        name: number + place / len(names)
        for number, names in enumerate(blocks.values())
        for place, name in enumerate(names)
    }


def _thinned(values: Sequence[tuple[Module, float]], places: Mapping[str, float]) -> list[Point]:
    points = [(module, places[module.name], value) for module, value in values]
    if len(points) <= MOST_POINTS:
        return points
    largest: dict[tuple[int, int], Point] = {}
    for point in sorted(points, key=lambda point: point[2]):
        largest[int(point[1]), _role(point[0])] = point
    kept = sorted(largest.values(), key=lambda point: point[1])
    return sorted(kept, key=lambda point: -point[2])[:MOST_POINTS]


def _role(module: Module) -> int:
    return ROLES.index(module.role) if module.role in ROLES else len(ROLES)


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for role in sorted({_role(module) for module, _, _ in points}):
        of_it = [(place, value) for module, place, value in points if _role(module) == role]
        axes.plot(*zip(*of_it, strict=True), linestyle="none", marker=MARKERS[role], color=SERIES[role], markersize=5)


def _roles(points: Sequence[Point]) -> list[Legend]:
    names = (*ROLES, "other")
    shapes = ("●", "■", "▲", "◆", "▼")
    return [Legend(names[role], f"plot-{role}", shapes[role]) for role in sorted({_role(entry[0]) for entry in points})]


def _module_row(module: Module) -> list[str]:
    figures = (module.relative_error, module.sqnr_db, module.clipped_share)
    bits = str(module.bits) if module.bits is not None else "none"
    return [module.name, module.role, bits, *(shown(figure) for figure in figures)]


# -- the loss, window by window ----------------------------------------------------------------------------------------


def _rises(windows: Windows | None) -> Plot:
    title, columns = "Rise of the loss, window by window", ["window", "scored tokens", "rise, nats a token"]
    finite = [(place, rise) for place, rise in enumerate(windows.rises, start=1) if rise is not None] if windows else []
    if windows is None or not finite:
        return Plot("windows", title, f"The loss of the windows: {NOT_MEASURED}.", columns, [])
    mean, limit = _log(windows.ratio), _log(windows.limit)
    ends = [end for ratio in windows.interval or () if (end := _log(ratio)) is not None]
    points = _grouped(finite)

    def draw(axes: Axes) -> None:
        if len(ends) == 2:
            axes.axhspan(*ends, color=BAND)
        if mean is not None:
            axes.axhline(mean, color=INK, linewidth=1)
        if limit is not None:
            axes.axhline(limit, color=BAD, linewidth=1.5, linestyle="--")
        axes.axhline(0, color=LINE, linewidth=0.8)
        axes.plot(*zip(*points, strict=True), linestyle="none", marker="o", color=SERIES[0], markersize=4)
        axes.set_ylabel("nats a token")
        axes.set_xlabel("window")

    level = shown(windows.interval_level, "%")
    span = " to ".join(shown(end) for end in ends) or NOT_MEASURED
    caption = (
        f"Edited minus baseline loss of {len(windows.rises):,} windows. The mean is {shown(mean, 'nats a token')}, "
        f"its {level} interval {span}; the upper end may be {shown(limit)} at most, the logarithm of the limit "
        f"{shown(windows.limit)} on the ratio of the perplexities."
    )
    if missing := len(windows.rises) - len(finite):
        caption += f" {missing:,} windows whose loss is not a finite number are not drawn."
    if len(points) < len(finite):
        caption += f" Each point is the mean of up to {-(-len(finite) // MOST_POINTS)} windows."
    rows = [
        [str(place), f"{windows.tokens[place - 1]:,}", shown(windows.rises[place - 1])]
        for place in range(1, len(windows.rises) + 1)
    ]
    legend = [
        Legend("a window", "plot-0", "●"),
        Legend("mean", "ink", "—"),
        Legend("interval", "band", "■"),
        Legend("limit", "bad", "╌"),
    ]
    return Plot(
        "windows",
        title,
        caption,
        columns,
        rows[:MOST_ROWS],
        _drawn("windows", title, draw),
        legend,
        len(rows[MOST_ROWS:]),
    )


def _grouped(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[0][0], sum(rise for _, rise in group) / len(group)) for group in groups]


def _log(ratio: float | None) -> float | None:
    return math.log(ratio) if ratio is not None and 0 < ratio < math.inf else None


# -- spectra and time --------------------------------------------------------------------------------------------------


def _spectra(spectra: Sequence[Spectrum]) -> list[Plot]:
    title, columns = "Singular values of the suspects", ["place", "baseline", "edited"]
    drawable = [(spectrum, _positive(spectrum.before), _positive(spectrum.after)) for spectrum in spectra]
    plots = [
        _spectrum(f"spectrum-{place}", columns, spectrum, before, after)
        for place, (spectrum, before, after) in enumerate(drawable, start=1)
        if before and after
    ]
    return plots or [Plot("spectrum", title, f"The spectra of the suspects: {NOT_MEASURED}.", columns, [])]


def _spectrum(
    key: str, columns: list[str], spectrum: Spectrum, before: Sequence[float], after: Sequence[float]
) -> Plot:
    title = f"Singular values of {spectrum.module}"

    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(before) + 1), before, color=SERIES[0], marker="o", markersize=3.5, linewidth=1)
        axes.plot(range(1, len(after) + 1), after, color=SERIES[1], marker="s", markersize=3.5, linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("singular value")
        axes.set_xlabel("place, the largest first")

    rows = [
        [str(number), *(shown(values[number - 1] if number <= len(values) else None) for values in (before, after))]
        for number in range(1, min(MOST_ROWS, max(len(before), len(after))) + 1)
    ]
    caption = "The leading singular values, in units of the weight, before and after the edit. There is no limit."
    legend = [Legend("baseline", "plot-0", "●"), Legend("edited", "plot-1", "■")]
    return Plot(key, title, caption, columns, rows, _drawn(key, title, draw), legend)


def _positive(values: Sequence[float]) -> list[float]:
    return [value for value in values[:MOST_POINTS] if 1e-300 < value < 1e300]


def _stages(stages: Sequence[tuple[str, float]]) -> Plot:
    title, columns = "Time per stage", ["stage", "seconds"]
    timed = [(name, seconds) for name, seconds in stages[:MOST_ROWS] if 0 <= seconds < 1e9]
    if not timed:
        return Plot("stages", title, f"The time of the stages: {NOT_MEASURED}.", columns, [])

    def draw(axes: Axes) -> None:
        shown_ones = timed[:20]
        axes.barh(range(len(shown_ones)), [seconds for _, seconds in shown_ones], color=SERIES[0])
        axes.set_yticks(range(len(shown_ones)), [_label(name) for name, _ in shown_ones])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")

    total = sum(seconds for _, seconds in timed)
    caption = f"In the order of the run; {shown(total, 's')} in all. There is no limit."
    return Plot(
        "stages",
        title,
        caption,
        columns,
        [[name, shown(seconds, "s")] for name, seconds in timed],
        _drawn("stages", title, draw),
    )


def _label(name: str) -> str:
    """A name that any font can draw."""
    return re.sub(r"[^ -~]", "?", name)[:24]


def _finite(value: float | None) -> float | None:
    """A number that can be drawn, or None."""
    return value if value is not None and abs(value) < 1e300 else None


# -- drawing -----------------------------------------------------------------------------------------------------------


def _drawn(key: str, title: str, draw: Callable[[Any], None]) -> str:
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
