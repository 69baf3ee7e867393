"""Places of samples, of which a window may hold several: sample i is of window i modulo the number of windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from invarlock.datasets.layout import Windows


def windows_between(samples: Windows, windows: int, start: int, end: int) -> Windows:
    """The samples of some of the windows, in their order.

    :param windows: number of windows of all samples.
    """
    if (start, end) == (0, windows):
        return samples
    return Windows.joined(*(samples[first + start : first + end] for first in range(0, len(samples), windows)))


def followed_by(samples: Windows, windows: int, more: Windows, count: int) -> Windows:
    """The samples of windows and of ``count`` more, in the order of all of them."""
    firsts = zip(range(0, len(samples), windows), range(0, len(more), count), strict=True)
    both = ((samples[first : first + windows], more[other : other + count]) for first, other in firsts)
    return Windows.joined(*(part for pair in both for part in pair))


def order_of(windows: Sequence[int], samples: Sequence[int]) -> NDArray[np.int64]:
    """Where the samples of parts that lie one after the other belong, in the order of all windows.

    :param windows: of each part, as ``samples``.
    """
    starts = np.concatenate([[0], np.cumsum(samples)])
    rounds = range(samples[0] // windows[0])
    return np.concatenate(
        [np.arange(count) + start + of * count for of in rounds for count, start in zip(windows, starts, strict=False)]
    )
