"""Largest singular values of matrices of one shape, before and after an edit.

Block Lanczos on A = Wᵀ W with full reorthogonalization (Golub and Underwood 1977; Musco and Musco 2015, algorithm 2),
begun with the sketch and with a few new directions per step. For a Ritz pair (θ, v) with the residual r = ||A v - θ v||
and the next Ritz value θ₂, an eigenvalue of A is within min(r, r² / (θ - θ₂)) of θ (Parlett 1998, *The Symmetric
Eigenvalue Problem*, sections 4.5 and 11.7, with θ₂ for the unknown λ₂). It goes on until that is at most ``ACCURACY``
of sigma. The estimate is never above sigma. That it is not further below is not proven, for θ₂ may be low and the
eigenvalue may not be the largest; it was so for all 211 matrices of SmolLM2 and for matrices of noise, whose spectrum
has no gap, against exact singular values.

Matrices of one shape are worked on together: only the products with them are made one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plugins_builtin.guards.spectral.sketches import (
    EXACT_UP_TO,
    PROBES,
    TINY,
    Change,
    Moved,
    Sketched,
    Spectrum,
    probes,
)

WIDTH = 4
"""Directions that a step adds; a product with 4 vectors costs less than twice a product with one."""
ACCURACY = 0.01
MOST_STEPS = 16
GRAM_UP_TO = 128
SUBSPACE_STEPS = 3


@torch.no_grad()
def spectra(matrices: Sequence[Tensor]) -> list[Spectrum | None]:
    """Measure matrices of one shape and device, of any floating type; None for one that holds NaN or Inf.

    Each is gone through several times, and so had better be in memory.
    """
    sketched = [Sketched.of(matrix) for matrix in matrices]
    finite = [entry for entry in sketched if entry]
    sigmas = _cold(finite) if finite else []
    found = (entry.spectrum(*sigma) for entry, sigma in zip(finite, sigmas, strict=True))
    return [next(found) if entry else None for entry in sketched]


@torch.no_grad()
def changes(matrices: Sequence[Tensor], before: Sequence[Spectrum]) -> list[Change | None]:
    """Measure matrices of one shape again after an edit; None for one that holds NaN or Inf.

    The search for sigma starts from the leading vectors that a matrix had and from where its change points, so that
    neither an old direction nor a new one is missed.
    """
    sketched = [Sketched.of(matrix) for matrix in matrices]
    moved = [Moved.of(entry, old) for entry, old in zip(sketched, before, strict=True) if entry]
    searched = [move for move in moved if move.is_searched]
    sigmas = iter(_warm(searched) if searched else [])
    found = (move.change(next(sigmas)[0] if move.is_searched else None) for move in moved)
    return [next(found) if entry else None for entry in sketched]


@torch.no_grad()
def leading_values(matrix: Tensor, count: int) -> list[float] | None:
    """About the ``count`` largest singular values, the largest first, by randomized subspace iteration (Halko et al.
    2011), the same in every process and thread; where the spectrum is flat the last ones are a tenth too low. Of a
    small matrix they come, exactly, from the product with its transpose.

    :returns: None for a matrix that holds NaN or Inf.
    """
    sketched = Sketched.of(matrix)
    if sketched is None:
        return None
    if min(matrix.shape) <= GRAM_UP_TO:
        wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
        squares: list[float] = torch.linalg.eigvalsh(wide @ wide.T).flip(0)[:count].clamp(min=0).tolist()
        return [math.sqrt(square) for square in squares]
    generator = torch.Generator().manual_seed(matrix.shape[1])
    rows = torch.randn(count + PROBES, matrix.shape[1], generator=generator).to(matrix.device)
    for _ in range(SUBSPACE_STEPS):
        rows = _orthonormal(sketched.gram(_orthonormal(rows)))
    images = torch.cat([block @ rows.T for block in sketched.blocks()])
    values: list[float] = torch.linalg.svdvals(images).tolist()
    return [value / sketched.scale for value in values[:count]]


def _cold(matrices: Sequence[Sketched]) -> list[tuple[float, Tensor]]:
    """The largest singular value of ``scale * W``, and the two leading right singular vectors, of each."""
    if _is_small(matrices[0]):
        return _decomposed(matrices)
    start = probes(matrices[0].matrix.shape[1], matrices[0].matrix.device)
    images = torch.stack([matrix.back(start.to_basis @ matrix.sketch) for matrix in matrices])
    return _largest(matrices, start.basis.expand(len(matrices), -1, -1), images)


def _warm(moved: Sequence[Moved]) -> list[tuple[float, Tensor]]:
    """The same as ``_cold``, begun with the old leading directions and those of the change."""
    matrices = [move.now for move in moved]
    if _is_small(matrices[0]):
        return _decomposed(matrices)
    differences = torch.stack([move.difference for move in moved])
    most = torch.linalg.eigh(differences @ differences.mT)[1][..., -2:].mT @ differences
    pointed = torch.stack([matrix.back(block) for matrix, block in zip(matrices, most, strict=True)])
    leading = torch.stack([move.before.leading.to(pointed.device) for move in moved])
    # A change can be larger than any vector by far.
    start = _orthonormal(torch.cat([leading, torch.nn.functional.normalize(pointed, dim=-1)], dim=1))
    images = torch.stack([matrix.gram(block) for matrix, block in zip(matrices, start, strict=True)])
    return _largest(matrices, start, images)


def _decomposed(matrices: Sequence[Sketched]) -> list[tuple[float, Tensor]]:
    stack = torch.stack([matrix.matrix.float() * matrix.scale for matrix in matrices])
    _, values, vectors = torch.linalg.svd(stack, full_matrices=False)
    return list(zip(values[:, 0].tolist(), vectors[:, :2], strict=True))


def _largest(matrices: Sequence[Sketched], basis: Tensor, images: Tensor) -> list[tuple[float, Tensor]]:
    """
    :param basis: for each matrix orthonormal rows to begin with, at least two: (matrices, rows, columns).
    :param images: ``basis Wᵀ W``.
    """
    found: dict[int, tuple[float, Tensor]] = {}
    left = list(range(len(matrices)))
    for step in range(MOST_STEPS):
        rotation = torch.linalg.eigh(basis @ images.mT)[1][..., -WIDTH:].mT
        vectors, moved = rotation @ basis, rotation @ images
        # Rayleigh quotients are never above the largest eigenvalue, even where the basis is not quite orthogonal.
        values = (vectors * moved).sum(dim=-1) / (vectors * vectors).sum(dim=-1)
        residuals = torch.addcmul(moved, values.unsqueeze(-1), vectors, value=-1)
        top, size = values[:, -1], residuals[:, -1].norm(dim=-1)
        error = torch.minimum(size, size**2 / (top - values[:, -2]).clamp(min=TINY))
        full = step == MOST_STEPS - 1 or basis.shape[1] + WIDTH > basis.shape[2]
        sure = [full or close for close in (error <= 2 * ACCURACY * top).tolist()]
        for place, value in enumerate(top.tolist()):
            if sure[place]:
                found[left[place]] = math.sqrt(max(value, 0.0)), vectors[place, -2:].clone()
        open_ = [place for place, done in enumerate(sure) if not done]
        if not open_:
            break
        left = [left[place] for place in open_]
        basis, images, residuals = basis[open_], images[open_], residuals[open_]
        # In exact arithmetic residuals are orthogonal to the basis.
        added = _orthonormal(residuals - (residuals @ basis.mT) @ basis)
        grown = torch.stack([matrices[place].gram(block) for place, block in zip(left, added, strict=True)])
        basis, images = torch.cat([basis, added], dim=1), torch.cat([images, grown], dim=1)
    return [found[place] for place in range(len(matrices))]


def _orthonormal(blocks: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(blocks.mT)[0]
    return columns.mT.contiguous()


def _is_small(sketched: Sketched) -> bool:
    return min(sketched.matrix.shape) <= EXACT_UP_TO
