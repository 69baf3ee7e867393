"""Passes of models that make vectors of samples, and the distances between vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from invarlock.core.progress import Tally
from invarlock.datasets.layout import Windows
from invarlock.evaluation.passes import Batches, PassResult, Taps
from invarlock.models.facts import device_of, evaluating

VectorsOf = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
CountsOf = Callable[[Mapping[str, Tensor]], Tensor]
Vectors = Mapping[str, NDArray[np.float32]]


def measure_vectors(
    model: nn.Module,
    preview: Windows,
    final: Windows,
    vectors_of: VectorsOf,
    counts_of: CountsOf,
    *,
    taps: Taps = (),
    calls: int = 0,
    at_once: int | None = None,
    taps_off: Callable[[], object] = lambda: None,
    reference: None = None,
    vocabulary: int | None = None,
) -> PassResult:
    """Let samples pass through the model, as :func:`~invarlock.evaluation.passes.measure` does.

    :param vectors_of: the vectors that a model makes of a batch, by name.
    :param counts_of: how many of them each sample of a batch has.
    """

    def forward(model: nn.Module, batch: Windows) -> tuple[Mapping[str, Tensor], Tensor]:
        given = batch.trimmed().inputs(device_of(model))
        return vectors_of(model, given), counts_of(given)

    batches = Batches(model, Tally(len(preview) + len(final)), forward, at_once)
    with evaluating(model):
        batches.tap(preview, taps)
        taps_off()
        found = batches.run(final, lambda batch, output: _on_cpu(*output))
        for _ in range(calls - len(found)):
            forward(model, final[-1:])
    parts, counts = zip(*found, strict=True)
    vectors = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    return PassResult(np.zeros(len(final)), torch.cat(counts).numpy(), vectors=vectors)


def by_window(
    measured: PassResult, before: NDArray[np.float64], after: NDArray[np.float64], windows: int
) -> tuple[PassResult, PassResult]:
    """Differences from the baseline's vectors, summed over the samples of each window.

    :param before: of the baseline itself: zeros, but for what is not finite.
    :param windows: how many there are; sample i belongs to window i modulo that.
    """
    window = np.repeat(np.arange(len(measured.tokens)) % windows, measured.tokens)
    counts = np.bincount(window, minlength=windows).astype(np.int64)
    first, second = (
        PassResult(np.bincount(window, each, windows).astype(np.float64), counts) for each in (before, after)
    )
    return first, second


def cosine_distances(before: Vectors, after: Vectors) -> NDArray[np.float64]:
    """1 - cosine of each sample's vectors, of the part that moved most; NaN where they are not finite."""
    parts = [_cosine_distance(before[name], after[name]) for name in before]
    worst: NDArray[np.float64] = np.max(parts, axis=0)
    return worst


def _cosine_distance(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.float64]:
    same = np.array_equal(before, after) and np.isfinite(before).all()
    return np.zeros(len(before)) if same else 1 - (unit(before) * unit(after)).sum(axis=1)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors of length 1; one without a length stays as it is."""
    rows = vectors.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths == 0, 1, lengths)


def changed_neighbours(before: NDArray[np.float32], after: NDArray[np.float32]) -> float | None:
    """Share of the samples whose nearest neighbour among the others is another one; None for fewer than three."""
    if len(before) < 3:
        return None
    nearest = [_nearest(unit(vectors)) for vectors in (before, after)]
    return float((nearest[0] != nearest[1]).mean())


def changed_matches(before: Vectors, after: Vectors, one: str, other: str) -> float:
    """Share of the vectors of one kind whose best match among those of the other kind is another one."""
    best = [(unit(side[one]) @ unit(side[other]).T).argmax(axis=1) for side in (before, after)]
    return float((best[0] != best[1]).mean())


def changed_order(before: NDArray[np.float32], after: NDArray[np.float32]) -> float | None:
    """Share of the pairs of scores (samples, 1) that are in another order; None where there are none, or not finite.

    Scores that are equal before have no order.
    """
    first, second = (np.sign(scores - scores.T) for scores in (before, after))
    ordered = np.triu(first) != 0
    finite = np.isfinite(before).all() and np.isfinite(after).all()
    return float((first != second)[ordered].mean()) if finite and ordered.any() else None


def _nearest(rows: NDArray[np.float64]) -> NDArray[np.int64]:
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: NDArray[np.int64] = similarity.argmax(axis=1)
    return nearest


def _on_cpu(vectors: Mapping[str, Tensor], counts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return {name: rows.float().cpu() for name, rows in vectors.items()}, counts.cpu()
