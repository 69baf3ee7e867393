"""A look at what both passes measured so far: whether every limit that rejects is kept or broken for certain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from invarlock.evaluation.divergence import REJECTING, limits_of, prediction_bounds
from invarlock.evaluation.metric import Stopping, limit_of, sequence
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.results import Bounds, Look, Statistic
from invarlock.evaluation.statistics import exp, mean_per_token
from invarlock.evaluation.task import Judging, LanguageTask, Task, VectorTask

LEAST_UNTOUCHED = 32
"""Windows without which an edit that leaves the loss of some exactly as it was is not accepted: it touches few tokens,
as one row of an embedding does, and the spread of a few windows does not show the harm to those that it touches."""


@dataclass(frozen=True)
class Looked:
    """One look: the figure and its bounds, and whether they decide."""

    look: Look | None
    """None where a loss is not finite, or no window is scored."""
    decided: bool
    limit: float = math.nan

    def windows_needed(self, most: int) -> int:
        """About so many windows decide, as the primary metric stands: an interval narrows by the root of their number.

        :param most: that there are.
        """
        if self.look is None:
            return most
        figure, low, high = (float(value) for value in (self.look.figure, self.look.low, self.look.high))
        distance, reach = abs(self.limit - figure), (high - low) / 2
        # Also where the interval is infinite yet.
        return math.ceil(self.look.windows * (reach / distance) ** 2) if reach < distance * math.sqrt(most) else most


def can_step(task: Task) -> bool:
    """True for a primary metric that a confidence sequence bounds.

    A share of samples is not: where none differs in the first windows, they have no spread, and the sequence no width.
    """
    return isinstance(task, LanguageTask | VectorTask) and task.metric.statistic != "share"


def look_at(
    task: Task, baseline: PassResult, edited: PassResult, judging: Judging, stopping: Stopping, *, changed: bool
) -> Looked:
    """Look at the limits.

    :param baseline: over the windows so far, as ``edited``; ``judging`` is of so many windows.
    :param changed: whether the edit changed a weight.
    """
    if isinstance(task, VectorTask):
        before, after = task.by_window(baseline, edited, judging.windows)
    else:
        before, after = baseline, edited
    differences, sizes = after.losses - before.losses, before.sizes
    if not np.isfinite(differences).all():
        return Looked(None, decided=True)
    look = look_of(before, after, stopping, task.metric.statistic)
    if look is None:
        return Looked(None, decided=False)
    own = task.metric.limit if judging.limit is None else judging.limit
    limit = limit_of(before, judging.ratio) if own is None or task.metric.statistic == "ratio" else own
    sides = [Bounds(look.low, look.high, limit).side, *_sides_of_predictions(baseline, edited, judging, stopping)]
    untouched = changed and len(sizes) < LEAST_UNTOUCHED and bool((differences[sizes > 0] == 0).any())
    decided = 1 in sides or (all(side == -1 for side in sides) and not untouched)
    return Looked(look, decided, limit)


def look_of(baseline: PassResult, edited: PassResult, stopping: Stopping, statistic: Statistic) -> Look | None:
    """The primary metric, from the losses of each window; None where no window is scored."""
    interval = sequence(baseline, edited, stopping, statistic=statistic)
    if interval is None:
        return None
    mean = float(mean_per_token(edited.losses - baseline.losses, baseline.sizes))
    return Look(len(baseline.tokens), exp(mean) if statistic == "ratio" else mean, *interval)


def _sides_of_predictions(
    baseline: PassResult, edited: PassResult, judging: Judging, stopping: Stopping
) -> Iterator[int]:
    """Where the limits of the predictions lie that reject, if predictions are compared at all."""
    changes = edited.changes
    if changes is None or judging.improving or baseline.bytes is not None:
        return
    if not np.isfinite(changes.kl).all():
        yield 1
        return
    # Flips only warn: their limit is of no matter here, and takes long.
    limits = limits_of(judging.ratio, changes.margin_before, flips=1.0)
    bounds = prediction_bounds(baseline, edited, limits, stopping)
    yield from (bounds[name].side for name in REJECTING)
