"""The preview windows as guards see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from invarlock.datasets.layout import Windows


@dataclass(frozen=True)
class Calibration:
    """Batches of ``input_ids`` and ``attention_mask``, and of images or sounds, to be read at will."""

    windows: Windows | None
    """Copies: nothing that a guard does to them reaches the windows that are measured."""
    batch_size: int = 8
    comparing: bool = False
    """The edited model is another checkpoint, and ``context["baseline_weights"]`` will have the baseline's weights."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.windows.batches(self.batch_size) if self.windows else ():
            given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.shown()}
            yield {name: tensor.clone() for name, tensor in given.items()}

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size) if self.windows else 0
