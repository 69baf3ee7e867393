"""The plots of one report, each from data, a drawing and a caption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

from invarlock.core.results import EditedWeight
from invarlock.evaluation.results import MetricResult
from invarlock.reporting import searches
from invarlock.reporting.describing import NOT_MEASURED, bits_per_parameter, most_suspect, shown
from invarlock.reporting.plots import bars, captions, data, drawing
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import MetricsSection, Report, SearchSection, WindowsSection

MOST_ROWS = 400
"""In the table below a plot."""
MOST_STAGES = 20
"""Bars of one plot."""
SHAPES = ("●", "■", "▲", "◆", "▼")
"""Of ``drawing.MARKERS``."""


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
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    svg: str = ""
    """Empty where there is nothing to see; then the caption says why."""
    legend: Sequence[Legend] = ()
    left_out: int = 0
    """Rows that the table does not show."""


def plots_of(report: Report) -> list[Plot]:
    """The plots of an edit, those among them that have nothing to show."""
    return [
        *([_frontier(report.search, report.metrics.primary)] if report.search else []),
        _errors(report.edit.modules, [suspect.module for suspect in most_suspect(report.verdict)]),
        _rises(report.metrics.windows, report.metrics.primary),
        *_path(report.metrics),
        _bits(report.edit.modules, bits_per_parameter(report)),
        *_spectra(data.spectra(report.guards, report.verdict)),
    ]


def _frontier(search: SearchSection, metric: MetricResult | None) -> Plot:
    title = "Plans that were searched"
    limit = metric.limit if metric and not metric.is_distance else None
    points = data.search_points(search, limit)
    if not points:
        return Plot("frontier", title, captions.missing("The ratio of the plans"))
    return Plot(
        "frontier",
        title,
        f"{captions.FRONTIER} Sensitivities: {searches.sensitivities_line(search)}.",
        searches.POINT_COLUMNS,
        searches.point_rows(search),
        drawing.drawn("frontier", title, drawing.frontier, points),
        [
            Legend("accepted", "good", "●"),
            Legend("rejected", "bad", "■"),
            Legend("predicted", "ink", "○"),
            *([Legend("limit", "bad", "╌")] if limit is not None else []),
        ],
    )


def _errors(weights: Sequence[EditedWeight], suspects: Sequence[str]) -> Plot:
    title = "Relative error along the depth of the model"
    errors = {each.name: float(each.relative_error or 0) for each in weights if data.finite(each.relative_error)}
    measured = data.points(weights, errors)
    if not measured:
        return Plot("errors", title, captions.missing("The relative error of the weights"))
    if not any(point.value for point in measured):
        return Plot("errors", title, captions.unchanged("The weights"))
    points = data.thinned(measured)
    suspected = [point for point in points if point.weight.name in suspects]
    rows = sorted(weights, key=lambda each: -(each.relative_error or 0)) if len(weights) > MOST_ROWS else weights
    return Plot(
        "errors",
        title,
        captions.errors(measured, len(points)),
        ["weight", "role", "bits", "relative error", "SQNR, dB", "clipped, share of weights"],
        [_error_row(weight) for weight in rows[:MOST_ROWS]],
        drawing.drawn("errors", title, drawing.errors, points, suspected),
        [*_roles(points), *([Legend("suspect", "bad", "○")] if suspected else [])],
        len(rows[MOST_ROWS:]),
    )


def _error_row(weight: EditedWeight) -> list[str]:
    figures = (weight.relative_error, weight.sqnr_db, weight.clipped_share)
    bits = str(weight.bits) if weight.bits is not None else "none"
    return [weight.name, weight.role, bits, *map(shown, figures)]


def _bits(weights: Sequence[EditedWeight], mean: float | None) -> Plot:
    title = "Bits per weight"
    known = [each for each in weights if each.bits is not None and 0 < each.bits < 1000]
    if not known:
        return Plot("bits", title, captions.missing("The bits of the weights"))
    if len({each.bits for each in known}) == 1:
        return Plot("bits", title, captions.equal_bits(known[0].bits or 0, len(known), mean))
    points = data.thinned(data.points(weights, {each.name: float(each.bits or 0) for each in known}))
    counted: dict[int | None, list[int]] = defaultdict(list)
    for each in known:
        counted[each.bits].append(each.parameters or 0)
    return Plot(
        "bits",
        title,
        captions.bits(mean),
        ["bits", "weights", "parameters"],
        [[str(bits), f"{len(of_it):,}", f"{sum(of_it):,}"] for bits, of_it in sorted(counted.items())],
        drawing.drawn("bits", title, drawing.bits, points),
        _roles(points),
    )


def _roles(points: Sequence[data.Point]) -> list[Legend]:
    names = (*data.ROLES, "other")
    return [Legend(names[role], f"plot-{role}", SHAPES[role]) for role in sorted({point.role for point in points})]


def _counted(windows: WindowsSection | None, of_samples: bool) -> str:
    if of_samples:
        return "samples"
    return "bytes of text" if windows and windows.bytes else "scored tokens"


def _rises(windows: WindowsSection | None, metric: MetricResult | None) -> Plot:
    of_samples = metric is not None and metric.is_distance
    title = f"{metric.name.capitalize() if metric and of_samples else 'Rise of the loss'}, window by window"
    rises = list(enumerate(data.rises(windows), start=1))
    finite = [(place, rise) for place, (_, rise) in rises if rise is not None]
    if not finite:
        return Plot("windows", title, captions.missing("The loss of the windows"))
    if len(finite) == len(rises) and not any(rise for _, rise in finite):
        return Plot("windows", title, captions.unchanged("The loss of each window"))
    points = data.grouped(finite)
    return Plot(
        "windows",
        title,
        captions.rises(len(rises), len(finite), len(points), metric),
        [
            "window",
            _counted(windows, of_samples),
            data.nats_per(metric) if of_samples else f"rise, {data.nats_per(metric)}",
        ],
        [[str(place), f"{size:,}", shown(rise)] for place, (size, rise) in rises[:MOST_ROWS]],
        drawing.drawn("windows", title, drawing.rises, points, metric),
        [
            Legend("a window", "plot-0", "●"),
            Legend("mean", "ink", "—"),
            Legend("interval", "band", "■"),
            Legend("limit", "bad", "╌"),
        ],
        len(rises[MOST_ROWS:]),
    )


def _path(metrics: MetricsSection) -> list[Plot]:
    """The looks on the way to the verdict; none of a verdict that the first one gave."""
    metric, path = metrics.primary, data.path(metrics.path)
    if metric is None or len(path) < 2:
        return []
    name = metric.name if metric.is_distance else "ratio"
    title = f"{name.capitalize()} and its interval, look by look"
    limit = metric.limit if data.finite(metric.limit) else None
    return [
        Plot(
            "path",
            title,
            captions.path(metric, name, len(metrics.path)),
            ["windows", name, "low", "high"],
            [
                [f"{look.windows:,}", *map(shown, (look.figure, look.low, look.high))]
                for look in metrics.path[:MOST_ROWS]
            ],
            drawing.drawn("path", title, drawing.path, path, limit, name),
            [Legend(name, "ink", "—"), Legend("interval", "band", "■"), Legend("limit", "bad", "╌")],
            len(metrics.path[MOST_ROWS:]),
        )
    ]


def _spectra(spectra: Sequence[data.SpectrumChange]) -> list[Plot]:
    measured = [each for each in spectra if each.before and each.after]
    changed = [each for each in measured if any(each.differences)]
    if changed:
        return [_spectrum(f"spectrum-{place}", each) for place, each in enumerate(changed, start=1)]
    title, what = "Singular values", "The leading singular values"
    return [Plot("spectrum", title, captions.unchanged(what) if measured else captions.missing(what))]


def _spectrum(key: str, spectrum: data.SpectrumChange) -> Plot:
    title = f"Singular values of {spectrum.module}"
    before, after = ([shown(value) for value in values] for values in (spectrum.before, spectrum.after))
    pairs = zip_longest(before, after, fillvalue=NOT_MEASURED)
    rows = [[str(place), *pair] for place, pair in enumerate(islice(pairs, MOST_ROWS), start=1)]
    legend = [Legend("baseline", "plot-0", "○"), Legend("edited", "plot-1", "■")]
    svg = drawing.drawn(key, title, drawing.spectrum, spectrum, heights=(2, 1))
    return Plot(key, title, captions.SPECTRUM, ["place", "baseline", "edited"], rows, svg, legend)


def plot_of_stages(timings: Mapping[str, float]) -> Plot:
    title = "Time per stage"
    timed = [(name, seconds) for name, seconds in timings.items() if seconds is not None and 0 <= seconds < 1e9]
    if not timed:
        return Plot("stages", title, captions.missing("The time of the stages"))
    rows = [[name, shown(seconds, "s")] for name, seconds in timed[:MOST_ROWS]]
    caption = captions.stages(sum(seconds for _, seconds in timed))
    svg = bars.drawn("stages", title, timed[:MOST_STAGES])
    return Plot("stages", title, caption, ["stage", "seconds"], rows, svg)


def plot_of_runs(runs: Sequence[SavedReport]) -> Plot:
    """Several runs: bits against the ratio with its interval."""
    title = "Bits per parameter and perplexity ratio"
    points = data.run_points([(run.name, run.report) for run in runs])
    if not points:
        return Plot("runs", title, captions.missing("Bits and perplexity ratio of the runs"))
    limits = sorted({point.limit for point in points if point.limit is not None})
    return Plot(
        "runs",
        title,
        captions.RUNS,
        ["run", "bits per parameter", "ratio", "interval"],
        [
            [each.name, *map(shown, (each.bits, each.ratio)), f"{shown(each.low)} to {shown(each.high)}"]
            for each in points
        ],
        drawing.drawn("runs", title, drawing.runs, points, limits),
        [
            *(Legend(each.name, "good" if each.accepted else "bad", SHAPES[each.shape]) for each in points),
            *([Legend("limit", "bad", "╌")] if limits else []),
        ],
    )
