"""Sums over weights while they are rounded, and the figures that follow from them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from invarlock.core.results import EditedWeight


@dataclass
class Sums:
    """Sums over one weight, from which the figures of its rounding follow."""

    parameters: int
    device: str
    bits: int
    measure: bool
    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0
    non_finite_rows: int = 0
    of_device: list[Tensor] = field(default_factory=list)
    """The same four of each row, float64 (rows, 4) for each matrix that a kernel rounded, which may not have done so
    yet."""

    def effect(self, of_device: Sequence[Sequence[float]]) -> EditedWeight:
        """
        :param of_device: the four of each matrix that a kernel rounded.
        """
        host = (self.signal, self.noise, self.clipped, self.non_finite_rows)
        signal, noise, clipped, non_finite_rows = map(sum, zip(host, *of_device, strict=True))
        return EditedWeight(
            change="quantized",
            bits=self.bits,
            parameters=self.parameters,
            relative_error=math.sqrt(noise / (signal or 1)) if self.measure else None,
            sqnr_db=10 * math.log10(signal / noise) if noise else None,
            clipped_share=clipped / max(self.parameters, 1),
            non_finite_rows=int(non_finite_rows),
            device=self.device,
        )


def effects(several: Sequence[Sums]) -> list[EditedWeight]:
    """The effects on weights of one device, without names and roles, which a weight by itself has not.

    The device is waited for once: to start an operation for each weight takes as long as to round it.
    """
    totals = iter(_totals([rows for sums in several for rows in sums.of_device]))
    return [sums.effect([next(totals) for _ in sums.of_device]) for sums in several]


def _totals(of_rows: Sequence[Tensor]) -> list[list[float]]:
    """Sums over the rows of each tensor (rows, 4): of those with as many rows at once."""
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, rows in enumerate(of_rows):
        places[len(rows)].append(place)
    if not places:
        return []
    summed = torch.cat([torch.stack([of_rows[place] for place in alike]).sum(1) for alike in places.values()]).tolist()
    in_order = zip((place for alike in places.values() for place in alike), summed, strict=True)
    return [total for _, total in sorted(in_order)]
