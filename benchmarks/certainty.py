"""Error rates of a verdict that stops as soon as it is certain, and the number of windows that it takes.

    python benchmarks/certainty.py runs/int8 runs/int6 runs/int5 runs/int4

The rises of the loss are those of the windows in each run's ``report.json``. They are drawn with replacement, so that
their mean is the truth, and shifted, so that this truth is a multiple of the limit's logarithm. Looks are those of a
run, after 4 to 256 windows; the first one at which the confidence sequence excludes the limit decides. The last two
columns are of the interval for a fixed number of windows, looked at as often.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from invarlock.evaluation.confidence_sequence import mean_bounds, sequence_level
from invarlock.evaluation.statistics import mean_per_token, standard_error
from invarlock.pipeline.stepping import FIRST, GROWTH, STEP, looks
from invarlock.reporting.reading import SavedReport

LEVEL = 0.95
LOOKS = looks(256, first=FIRST, growth=GROWTH, least=STEP)
EFFECTS = (0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 4.0)
"""True rises, in logarithms of the limit."""

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]
Bounds = Callable[[Numbers, Counts], tuple[Numbers, Numbers]]


@dataclass(frozen=True)
class Outcome:
    """Shares of the simulated runs, and the median of their windows; one that is inconclusive took all."""

    accepted: float
    inconclusive: float
    rejected: float
    windows: float


def sequence(differences: Numbers, tokens: Counts) -> tuple[Numbers, Numbers]:
    return mean_bounds(differences, tokens, level=sequence_level(LEVEL))


def student(differences: Numbers, tokens: Counts) -> tuple[Numbers, Numbers]:
    """The interval of a fixed number of windows."""
    mean = mean_per_token(differences, tokens)
    width = stats.t.ppf((1 + LEVEL) / 2, differences.shape[-1] - 1) * standard_error(differences, tokens)
    return mean - width, mean + width


def simulate(rises: Numbers, tokens: Counts, limit: float, runs: int, bounds: Bounds, seed: int = 0) -> Outcome:
    """
    :param rises: of the loss, nats per token of each window; their mean is the truth.
    :param limit: of the mean rise, in nats per token.
    """
    drawn = np.random.default_rng(seed).integers(len(rises), size=(runs, LOOKS[-1]))
    endings, windows = np.zeros(runs), np.full(runs, LOOKS[-1])
    for look in LOOKS:
        (going,) = np.nonzero(endings == 0)
        places = drawn[going, :look]
        low, high = bounds(rises[places] * tokens[places], tokens[places])
        endings[going] = np.where(low > limit, 1, np.where(high <= limit, -1, 0))
        windows[going] = look
    accepted, inconclusive, rejected = (float((endings == ending).mean()) for ending in (-1, 0, 1))
    return Outcome(accepted, inconclusive, rejected, float(np.median(windows)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the sequential verdict from windows that were measured.")
    parser.add_argument("reports", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its report.json")
    parser.add_argument("--runs", type=int, default=10_000, help="simulated for each effect (10000)")
    parser.add_argument("--limit", type=float, default=1.1, help="of the ratio (1.1)")
    args = parser.parse_args()
    limit = math.log(args.limit)
    print(
        "| windows of | spread | effect | accepted | inconclusive | rejected | median windows | t: accepted"
        " | t: rejected |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for run in map(SavedReport.read, args.reports):
        measured = run.report.metrics.windows
        if measured is None:
            parser.error(f"{run.name}: its outputs were not measured")
        tokens = np.array(measured.tokens)
        differences = np.array(measured.edited, dtype=float) - np.array(measured.baseline, dtype=float)
        residuals = differences / tokens - mean_per_token(differences, tokens)
        for effect in EFFECTS:
            rises = residuals + effect * limit
            found = simulate(rises, tokens, limit, args.runs, sequence)
            fixed = simulate(rises, tokens, limit, args.runs, student)
            print(
                f"| {run.name} | {residuals.std(ddof=1) / limit:.2f} | {effect:g} | {found.accepted:.2%} | "
                f"{found.inconclusive:.2%} | {found.rejected:.2%} | {found.windows:g} | {fixed.accepted:.2%} | "
                f"{fixed.rejected:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
