"""The windows of a run: preview ones, and final ones, of which the baseline writes more when they are needed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from invarlock.datasets.layout import Windows
from invarlock.datasets.window_order import followed_by, windows_between
from invarlock.pipeline.session import FIRST_WRITTEN, Baseline, WindowPair

MANY = 16
"""Documents from which on they are the units of the statistics: as many as it takes for a limit near a figure."""


class Supply:
    """Windows in their order, which does not depend on how many are needed in the end."""

    def __init__(self, baseline: Baseline, windows: WindowPair) -> None:
        self.preview, self._final = windows
        self._baseline = baseline
        self.most = self.made = baseline.dataset.final_n
        """Final windows that there can be, and that there are."""
        dataset = baseline.session.config.dataset
        if reference := baseline.session.reference:
            self.made = reference.measured.made
        elif dataset.is_generated and dataset.is_stepped:
            self.made = min(FIRST_WRITTEN, self.most)
        self._lots = 1

    @property
    def documents(self) -> NDArray[np.int64] | None:
        """Number of the document that each final window is of, where there are many, and some have several windows.

        Of few long ones each window stands for itself: windows are drawn from all of their text.
        """
        if self._final.documents is None:
            return None
        numbers: NDArray[np.int64] = self._final.documents.numpy()
        return numbers if MANY <= len(np.unique(numbers)) < len(numbers) else None

    @property
    def made_yet(self) -> WindowPair:
        return self.preview, self._final

    def between(self, start: int, end: int, samples: Windows | None = None) -> Windows:
        """Some of the final windows.

        :param samples: of all of them, in place of the baseline's.
        """
        return windows_between(self._final if samples is None else samples, self.made, start, end)

    def write(self, model: torch.nn.Module, to: int) -> None:
        """Let the baseline write final windows until there are so many: each lot as many as there are."""
        while self.made < to:
            count = min(self.made, self.most - self.made)
            more = self._baseline.write_windows(model, count, lot=self._lots)
            self._final = followed_by(self._final, self.made, more, count)
            self.made, self._lots = self.made + count, self._lots + 1
