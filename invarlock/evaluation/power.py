"""Power of an interval over windows: the difference that so many detect, and how many detect a difference."""

from __future__ import annotations

import math
from bisect import bisect_left

from scipy.special import stdtrit

from invarlock.evaluation.confidence_sequence import errors_reached

POWER = 0.8
"""Share of runs that find a difference which is there: the usual choice (Cohen 1988, "Statistical Power Analysis for
the Behavioral Sciences", section 2.4)."""
MOST_WINDOWS = 100_000
"""Nobody measures more; a ratio that these do not tell from the limit is, to all intents, at the limit."""


def detectable(error: float, windows: int, *, level: float, sequence: bool = False) -> float:
    """The smallest difference that an interval of a level excludes in ``POWER`` of runs: (t_level + t_power) errors.

    A confidence sequence (``sequence``) reaches further than t_level errors.

    The sum of quantiles stands for a non-central t: with 4 windows it has a power of 0.78, with 2 one of 0.73.

    :param error: standard error of the mean over so many windows, at least two.
    """
    of_level = errors_reached(windows, level) if sequence else stdtrit(windows - 1, (1 + level) / 2)
    return float((of_level + stdtrit(windows - 1, POWER)) * error)


def windows_to_detect(
    difference: float, error: float, windows: int, *, level: float, sequence: bool = False
) -> int | None:
    """The number of windows, more than ``windows``, that detect a difference at the spread seen in ``windows`` of them.

    :returns: None where even ``MOST_WINDOWS`` do not.
    """
    spread = error * math.sqrt(windows)

    def enough(count: int) -> bool:
        return detectable(spread / math.sqrt(count), count, level=level, sequence=sequence) <= abs(difference)

    counts = range(windows + 1, MOST_WINDOWS + 1)
    place = bisect_left(counts, True, key=enough)
    return counts[place] if place < len(counts) else None
