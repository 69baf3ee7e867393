"""The steps of a search: the next plan to measure, from what the plans before it were measured to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from invarlock.search.candidates import Decision
from invarlock.search.frontier import Allocation, best_within, smallest_within

CLOSE = 0.15
"""Bits per weight between a rejected plan and an accepted one that are not worth another attempt: 3 % of 5."""
STRIDE = 0.5
"""Bits per weight by which a search goes up where the predictions do not help: half of what halves an error."""
FACTORS = (0.1, 10.0)
"""Of measured and predicted rise: beyond, the measurement is noise or something else than rounding rejects."""
RISES = (0.2, 0.005)
"""Nats per token between which a frontier is measured: ratios from 1.22, which no limit lets pass, to 1.005."""


@dataclass(frozen=True)
class Tried:
    """A plan that was judged."""

    allocation: Allocation
    upper: float | None
    """Of the measured rise, the interval's upper end; None where it was not measured."""
    accepted: bool

    @property
    def bits_per_weight(self) -> float:
        return self.allocation.bits_per_weight


def for_ratio(
    decisions: Sequence[Decision], limit: float, tried: Sequence[Tried], correction: float = 1.0
) -> Allocation | None:
    """The next plan on the way to the fewest bits that pass; None where no other one is worth an attempt.

    :param limit: of the ratio, which the interval's upper end is held against.
    :param correction: the factor between rises and their predictions, as far as it is known before a plan is judged.
    """
    low = max((each.bits_per_weight for each in tried if not each.accepted), default=-math.inf)
    high = min((each.bits_per_weight for each in tried if each.accepted), default=math.inf)
    if high - low <= CLOSE:
        return None
    widest = best_within(decisions, math.inf)
    found = smallest_within(decisions, math.log(limit) / _correction(tried, correction)) or widest
    if found is None or found.bits_per_weight > high - CLOSE:
        return None
    if found.bits_per_weight >= low + CLOSE:
        return found
    # Fewer bits than were rejected are predicted to pass: predictions do not help.
    found = best_within(decisions, (low + high) / 2 if high < math.inf else low + STRIDE)
    return found if found and low + CLOSE / 2 < found.bits_per_weight < high else None


def for_frontier(decisions: Sequence[Decision], points: int, tried: int) -> Allocation | None:
    """The next of so many plans whose predicted rises are at equal distances on a logarithmic scale."""
    if tried >= points:
        return None
    first, last = RISES
    wanted = first * (last / first) ** (tried / max(points - 1, 1))
    return smallest_within(decisions, wanted)


def corrected(upper: float, rise: float) -> float:
    """The factor between the upper end of a rise and its prediction, within reason."""
    low, high = FACTORS
    return min(max(upper / rise, low), high) if rise > 0 else 1.0


def _correction(tried: Sequence[Tried], before: float) -> float:
    """That of the plan that was judged last."""
    factors = [corrected(each.upper, each.allocation.rise) for each in tried if each.upper is not None]
    return factors[-1] if factors else before
