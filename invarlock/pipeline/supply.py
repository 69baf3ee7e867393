"""The windows of a run: preview ones, and final ones, of which the baseline writes more when they are needed."""

from __future__ import annotations

import torch

from invarlock.datasets.layout import Windows
from invarlock.datasets.window_order import followed_by, windows_between
from invarlock.pipeline.session import FIRST_WRITTEN, Baseline, WindowPair


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
    def made_yet(self) -> WindowPair:
        return self.preview, self._final

    def between(self, start: int, end: int, samples: Windows | None = None) -> Windows:
        """Some of the final windows.

        :param samples: of all of them, in place of the baseline's.
        """
        return windows_between(self._final if samples is None else samples, self.made, start, end)

    @property
    def windows(self) -> WindowPair:
        """All that there are by now."""
        return self.preview, self._final

    def write(self, model: torch.nn.Module, to: int) -> None:
        """Let the baseline write final windows until there are so many: each lot as many as there are."""
        while self.made < to:
            count = min(self.made, self.most - self.made)
            more = self._baseline.write_windows(model, count, lot=self._lots)
            self._final = followed_by(self._final, self.made, more, count)
            self.made, self._lots = self.made + count, self._lots + 1
