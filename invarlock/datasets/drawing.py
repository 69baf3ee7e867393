"""The samples of each window, drawn from a dataset of records."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from invarlock.core.errors import UsageError
from invarlock.core.records import Record
from invarlock.datasets.windows import Dataset


def drawn(samples: Sequence[Record], dataset: Dataset, *, most: int = 1) -> list[Record]:
    """The samples of the preview windows, then those of the final ones, in an order that the seed draws.

    :param most: of one window; so many are taken as there are for all windows alike.
    :raises UsageError: there are fewer than windows.
    """
    windows = dataset.preview_n + dataset.final_n
    if len(samples) < windows:
        raise UsageError(
            f"dataset.path: there are {len(samples)} samples, and {windows} windows are asked for: give more, or lower "
            f"dataset.preview_n ({dataset.preview_n}) or dataset.final_n ({dataset.final_n})"
        )
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(dataset.seed)).tolist()
    return [samples[row] for row in order[: windows * min(most, len(samples) // windows)]]
