"""Allocation: one choice for each decision, so that the sum of their costs is least and their sizes fit a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

EXACT = 2_000
"""Decisions up to which the optimum takes about two seconds; that for 10,000 of 14 choices takes over a minute."""
SECONDS = 10
"""After which the best allocation that was found so far is taken: what is left to gain then is far below a percent."""
GAP = 1e-4
"""Relative distance to the optimum that is close enough."""
HALVINGS = 100

Costs = Sequence[Sequence[float]]
"""Of each choice of each decision."""
Matrix = NDArray[np.float64]


def allocate(costs: Costs, sizes: Costs, budget: float) -> list[int] | None:
    """The choices with the least sum of costs whose sizes add up to at most a budget; None if no choices do.

    Up to 2,000 decisions by integer programming, beyond that by a Lagrange multiplier, whose answer is the optimum but
    for one decision (Everett 1963, "Generalized Lagrange Multiplier Method").
    """
    matrices = _matrix(costs), _matrix(sizes)
    if matrices[1].min(axis=1).sum() > budget:
        return None
    found = _exact(*matrices, budget) if len(costs) <= EXACT else None
    return found if found is not None else _by_multiplier(*matrices, budget)


def _exact(costs: Matrix, sizes: Matrix, budget: float) -> list[int] | None:
    """By integer programming; None where the solver gives up."""
    decision, choice = np.nonzero(np.isfinite(costs))
    places = np.arange(len(decision))
    once = csr_array((np.ones(len(places)), (decision, places)), shape=(len(costs), len(places)))
    # Of about 1: the solver's tolerances are absolute, and budgets are of billions of bits.
    within = csr_array((sizes[decision, choice] / budget).reshape(1, -1))
    weighed = costs[decision, choice]
    solved = milp(
        weighed / max(weighed.max(), 1e-300),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(within, -np.inf, 1)],
        integrality=np.ones(len(places), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if solved.x is None:
        return None
    taken = np.zeros_like(costs)
    taken[decision, choice] = solved.x
    chosen = taken.argmax(axis=1)
    return [*map(int, chosen)] if _sum(sizes, chosen) <= budget else None


def _by_multiplier(costs: Matrix, sizes: Matrix, budget: float) -> list[int]:
    """By bisection on the price of a unit of size, and what that leaves of the budget spent on single decisions."""
    low, high = -100.0, 100.0
    best = sizes.argmin(axis=1)
    for _ in range(HALVINGS):
        price = math.exp((low + high) / 2)
        chosen = (costs + price * np.where(np.isfinite(sizes), sizes, 0)).argmin(axis=1)
        if _sum(sizes, chosen) <= budget:
            best, high = chosen, (low + high) / 2
        else:
            low = (low + high) / 2
    return [*map(int, _topped_up(costs, sizes, best, budget))]


def _topped_up(costs: Matrix, sizes: Matrix, chosen: NDArray[np.int64], budget: float) -> NDArray[np.int64]:
    """Choices of lower cost for as long as one of them still fits, the best one for its size first."""
    chosen, rows = chosen.copy(), np.arange(len(costs))
    while True:
        gain = costs[rows, chosen][:, None] - costs
        more = sizes - sizes[rows, chosen][:, None]
        fits = (gain > 0) & (more <= budget - _sum(sizes, chosen))
        if not fits.any():
            return chosen
        worth = np.where(fits, gain / np.maximum(more, 1e-9), -np.inf)
        decision, choice = np.unravel_index(worth.argmax(), worth.shape)
        chosen[decision] = choice


def _matrix(rows: Costs) -> Matrix:
    """Rows of unequal length, filled up with infinity."""
    matrix = np.full((len(rows), max(map(len, rows))), np.inf)
    for row, values in zip(matrix, rows, strict=True):
        row[: len(values)] = values
    return matrix


def _sum(values: Matrix, chosen: NDArray[np.int64]) -> float:
    return float(values[np.arange(len(values)), chosen].sum())
