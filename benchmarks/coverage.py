"""How often the true ratio lies above the upper end of its interval: ``python benchmarks/coverage.py``.

Of a 95 % interval that is 2.5 % where all is well. Windows are drawn from known distributions of the rise of the loss
per token, whose mean is the logarithm of the true ratio: normal; lognormal; and the difference of two lognormal losses,
of which the edited one is the baseline's times a lognormal factor. The logarithms vary by 0.25, which makes rises more
skewed (0.8 and 0.9) than those of any edit of the demo model were found to be (-0.3 to 0.5). Windows have 128 scored
tokens, or unequal numbers from 20 to 255; the rise of a window of few tokens varies more.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from invarlock.evaluation.statistics import mean_per_token, ratio_interval

WINDOWS = (2, 3, 4, 6, 8, 12, 16, 32, 64)
LEVEL, REPS = 0.95, 1000
SPREAD = 0.25
EVEN = 128

Numbers = NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int], Numbers]
Upper = Callable[[Numbers, NDArray[np.int64]], float]


def _rises_of_losses(rng: np.random.Generator, windows: int) -> Numbers:
    baseline = rng.lognormal(1, SPREAD, windows)
    return baseline * rng.lognormal(0, SPREAD, windows) - baseline


LOGNORMAL_MEAN = math.exp(SPREAD**2 / 2)
RISES: dict[str, tuple[Sampler, float]] = {
    "normal": (lambda rng, windows: rng.normal(0.02, 0.02, windows), 0.02),
    "lognormal": (lambda rng, windows: rng.lognormal(0, SPREAD, windows), LOGNORMAL_MEAN),
    "of lognormal losses": (_rises_of_losses, math.e * LOGNORMAL_MEAN * (LOGNORMAL_MEAN - 1)),
}
TOKENS: dict[str, Callable[[np.random.Generator, int], NDArray[np.int64]]] = {
    "equal": lambda rng, windows: np.full(windows, EVEN),
    "unequal": lambda rng, windows: rng.integers(20, 256, windows),
}


def upper_end(differences: Numbers, tokens: NDArray[np.int64]) -> float:
    """Of the interval that decides, as a logarithm."""
    interval = ratio_interval(differences, tokens, level=LEVEL, reps=REPS, seed=0)
    assert interval is not None
    return math.log(interval[1])


def bca(differences: Numbers, tokens: NDArray[np.int64]) -> float:
    """Of the bias-corrected and accelerated bootstrap, for comparison."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        draw = stats.bootstrap((differences, tokens), mean_per_token, paired=True, vectorized=True, n_resamples=REPS)
    return float(draw.confidence_interval.high)


def share_above(rises: str, tokens: str, windows: int, samples: int, upper: Upper = upper_end, seed: int = 0) -> float:
    """The share of samples of so many windows in which the true ratio is above the upper end."""
    rng = np.random.default_rng(seed)
    sample, truth = RISES[rises]
    above = 0
    for _ in range(samples):
        counts = TOKENS[tokens](rng, windows)
        noise = (sample(rng, windows) - truth) * np.sqrt(EVEN / counts)
        above += truth > upper(counts * (truth + noise), counts)
    return above / samples


def main() -> None:
    parser = argparse.ArgumentParser(description="Print how often the true ratio lies above the upper end.")
    parser.add_argument("--samples", type=int, default=4000, help="of each number of windows (4000)")
    parser.add_argument("--bca", action="store_true", help="of the BCa bootstrap instead, for comparison")
    args = parser.parse_args()
    print("| rises | tokens |" + "".join(f" {windows} |" for windows in WINDOWS))
    print("|---|---|" + "---|" * len(WINDOWS))
    for rises in RISES:
        for tokens in TOKENS:
            upper = bca if args.bca else upper_end
            shares = [share_above(rises, tokens, windows, args.samples, upper) for windows in WINDOWS]
            print(f"| {rises} | {tokens} |" + "".join(f" {share:.1%} |" for share in shares), flush=True)


if __name__ == "__main__":
    main()
