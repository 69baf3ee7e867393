"""The range that a matrix is clipped to before it is rounded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from invarlock.quantization.floats import Clip


def clip_bounds(matrix: Tensor, ratio: float) -> Clip | None:
    """The quantiles ratio/2 and 1 - ratio/2 over the finite rows, linearly interpolated; None without such rows.

    On the host, with numpy: ``torch.quantile`` takes neither 16-bit dtypes nor more than 2^24 numbers.
    """
    finite = finite_rows(matrix)
    if not finite.any():
        return None
    rows = matrix if finite.all() else matrix[finite]
    numbers = rows.to(device="cpu", dtype=torch.float32, copy=True).numpy().ravel(order="K")
    # As float64: numpy would otherwise look for the place in the order in float32, too coarse for millions of numbers.
    places = np.array([ratio / 2, 1 - ratio / 2], dtype=np.float64)
    low, high = np.quantile(numbers, places, overwrite_input=True).astype(np.float32).tolist()
    return low, high


def finite_rows(rows: Tensor) -> Tensor:
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()
