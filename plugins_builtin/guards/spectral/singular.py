"""Largest singular values of matrices of one shape, before and after an edit.

Block Lanczos on A = Wᵀ W with full reorthogonalization (Golub and Underwood 1977; Musco and Musco 2015, algorithm 2),
begun with the sketch and with a few new directions per step. For a Ritz pair (θ, v) with the residual r = ||A v - θ v||
and the next Ritz value θ₂, an eigenvalue of A is within min(r, r² / (θ - θ₂)) of θ (Parlett 1998, *The Symmetric
Eigenvalue Problem*, sections 4.5 and 11.7, with θ₂ for the unknown λ₂). It goes on until that is at most ``ACCURACY``
of sigma. The estimate is never above sigma. That it is not further below is not proven, for θ₂ may be low and the
eigenvalue may not be the largest; it was so for all 211 matrices of SmolLM2 and for matrices of noise, whose spectrum
has no gap, against exact singular values.

Before the basis grows wider than ``WIDEST`` it is replaced by its leading Ritz vectors, a thick restart (Wu and Simon
2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems").

Matrices of one shape are worked on together: on a CPU only the products with them are made one by one. On a GPU, where
a product of a matrix with a few vectors takes as long as with many, Wᵀ W is made once, in bfloat16: it only guides the
search, and sigma is ||W v|| in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
WIDEST = 32
"""Of wider bases a GPU decomposes the products one after the other, in milliseconds each."""
KEPT = 16
"""Ritz vectors that a restart keeps."""
GRAM_COLUMNS = 8192
"""Most columns of a matrix whose Gram matrix is made: it has 256 MiB."""
RIDGE = 1e-6
"""Added to the squares of unit vectors: above the rounding of float32 that makes dependent ones look independent."""
GRAM_UP_TO = 128
SUBSPACE_STEPS = 3


@torch.no_grad()
def spectra(matrices: Sequence[Tensor]) -> list[Spectrum | None]:
    """Measure matrices of one shape and device, of any floating type; None for one that holds NaN or Inf.

    Each is gone through several times, and so had better be in memory.
    """
    sketched = Sketched.of_each(matrices)
    finite = [entry for entry in sketched if entry]
    found = iter(Sketched.spectra(finite, _cold(finite) if finite else []))
    return [next(found) if entry else None for entry in sketched]


@torch.no_grad()
def changes(matrices: Sequence[Tensor], before: Sequence[Spectrum]) -> list[Change | None]:
    """Measure matrices of one shape again after an edit; None for one that holds NaN or Inf.

    The search for sigma starts from the leading vectors that a matrix had and from where its change points, so that
    neither an old direction nor a new one is missed.
    """
    sketched = Sketched.of_each(matrices)
    finite = [(entry, old) for entry, old in zip(sketched, before, strict=True) if entry]
    if not finite:
        return [None for _ in sketched]
    moved = Moved(*zip(*finite, strict=True))
    sigmas = (sigma for sigma, _ in _warm(moved))
    found = iter(moved.changes(dict(zip(moved.searched, sigmas, strict=True))))
    return [next(found) if entry else None for entry in sketched]


@torch.no_grad()
def leading_values(matrix: Tensor, count: int) -> list[float] | None:
    """About the ``count`` largest singular values, the largest first, by randomized subspace iteration (Halko et al.
    2011), the same in every process and thread; where the spectrum is flat the last ones are a tenth too low. Of a
    small matrix they come, exactly, from the product with its transpose.

    :returns: None for a matrix that holds NaN or Inf.
    """
    (sketched,) = Sketched.of_each([matrix])
    if sketched is None:
        return None
    if min(matrix.shape) <= GRAM_UP_TO:
        # On the CPU: not every device has double precision.
        wide = matrix.cpu().double() if matrix.shape[0] <= matrix.shape[1] else matrix.cpu().double().T
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
    start, products = probes(matrices[0].matrix.shape[1], matrices[0].matrix.device), _Products.of(matrices)
    basis = start.basis.expand(len(matrices), -1, -1)
    if products.grams is not None:
        return _largest(products, basis, products.images(basis))
    # The sketch is one of the two products already.
    images = torch.stack([matrix.back(start.to_basis @ matrix.sketch) for matrix in matrices])
    return _largest(products, basis, images)


def _warm(moved: Moved) -> list[tuple[float, Tensor]]:
    """The same of those that are searched, begun with their old leading directions and those of the change."""
    matrices = [moved.now[place] for place in moved.searched]
    if not matrices or _is_small(matrices[0]):
        return _decomposed(matrices)
    differences = moved.differences[moved.searched]
    most = torch.linalg.eigh(differences @ differences.mT)[1][..., -2:].mT @ differences
    pointed = torch.stack([matrix.back(block) for matrix, block in zip(matrices, most, strict=True)])
    leading = torch.stack([moved.before[place].leading for place in moved.searched]).to(pointed.device)
    # A change can be larger than any vector by far.
    start = _orthonormal(torch.cat([leading, torch.nn.functional.normalize(pointed, dim=-1)], dim=1))
    products = _Products.of(matrices)
    return _largest(products, start, products.images(start))


def _decomposed(matrices: Sequence[Sketched]) -> list[tuple[float, Tensor]]:
    if not matrices:
        return []
    stack = torch.stack([matrix.matrix.float() * matrix.scale for matrix in matrices])
    _, values, vectors = torch.linalg.svd(stack, full_matrices=False)
    return list(zip(values[:, 0].tolist(), vectors[:, :2], strict=True))


@dataclass(frozen=True, eq=False)
class _Products:
    """Products of blocks of rows with ``Wᵀ W``, a block for each matrix."""

    matrices: Sequence[Sketched]
    grams: Tensor | None
    """``Wᵀ W``, float32 (matrices, columns, columns), rounded to bfloat16; None where products are made by W."""

    @classmethod
    def of(cls, matrices: Sequence[Sketched]) -> _Products:
        first = matrices[0].matrix
        if not first.is_cuda or first.shape[1] > GRAM_COLUMNS:
            return cls(matrices, None)
        grams = torch.empty(len(matrices), first.shape[1], first.shape[1], device=first.device)
        for gram, entry in zip(grams, matrices, strict=True):
            half = (entry.matrix if entry.scale == 1 else entry.matrix * entry.scale).bfloat16()
            gram.copy_(half.T @ half)
        return cls(matrices, grams)

    def images(self, blocks: Tensor) -> Tensor:
        """``blocks Wᵀ W``, (matrices, rows, columns)."""
        if self.grams is not None:
            return blocks @ self.grams
        return torch.stack([matrix.gram(block) for matrix, block in zip(self.matrices, blocks, strict=True)])

    def among(self, places: Sequence[int]) -> _Products:
        """Products with some of the matrices."""
        return _Products([self.matrices[place] for place in places], self.grams)

    def sigmas(self, places: Sequence[int], squares: Sequence[float], vectors: Tensor) -> list[float]:
        """Singular values that vectors stand for: exact, whatever guided the search for them.

        :param places: of the matrices.
        :param squares: Rayleigh quotients of the vectors.
        :param vectors: one for each of the matrices, (places, columns).
        """
        if self.grams is None:
            return [math.sqrt(max(square, 0.0)) for square in squares]
        images = torch.stack(
            [self.matrices[place].image(vector) for place, vector in zip(places, vectors, strict=True)]
        )
        stretched: list[float] = (images.norm(dim=-1) / vectors.norm(dim=-1)).tolist()
        return stretched


def _largest(products: _Products, basis: Tensor, images: Tensor) -> list[tuple[float, Tensor]]:
    """
    :param basis: for each matrix orthonormal rows to begin with, at least two: (matrices, rows, columns).
    :param images: ``basis Wᵀ W``.
    """
    found: dict[int, tuple[float, Tensor]] = {}
    left = list(range(len(basis)))
    for step in range(MOST_STEPS):
        ritz = torch.linalg.eigh(basis @ images.mT)[1].mT
        vectors, moved = ritz[:, -WIDTH:] @ basis, ritz[:, -WIDTH:] @ images
        # Rayleigh quotients are never above the largest eigenvalue, even where the basis is not quite orthogonal.
        values = (vectors * moved).sum(dim=-1) / (vectors * vectors).sum(dim=-1)
        residuals = torch.addcmul(moved, values.unsqueeze(-1), vectors, value=-1)
        top, size = values[:, -1], residuals[:, -1].norm(dim=-1)
        error = torch.minimum(size, size**2 / (top - values[:, -2]).clamp(min=TINY))
        full = step == MOST_STEPS - 1 or basis.shape[1] + WIDTH > basis.shape[2]
        sure = [full or close for close in (error <= 2 * ACCURACY * top).tolist()]
        if new := [place for place, done in enumerate(sure) if done and left[place] not in found]:
            leading = vectors[new, -2:]
            sigmas = products.sigmas(new, top[new].tolist(), leading[:, -1])
            found |= {left[place]: (sigma, pair) for place, sigma, pair in zip(new, sigmas, leading, strict=True)}
        open_ = [place for place, done in enumerate(sure) if not done]
        if not open_:
            break
        if products.grams is None:
            # Not on a GPU, which has to copy the Gram matrices of the others.
            left, products = [left[place] for place in open_], products.among(open_)
            basis, images, residuals, ritz = (each[open_] for each in (basis, images, residuals, ritz))
        if basis.shape[1] + WIDTH > WIDEST:
            basis, images = ritz[:, -KEPT:] @ basis, ritz[:, -KEPT:] @ images
        # In exact arithmetic residuals are orthogonal to the basis.
        added = _orthonormal(residuals - (residuals @ basis.mT) @ basis)
        basis, images = torch.cat([basis, added], dim=1), torch.cat([images, products.images(added)], dim=1)
    return [found[place] for place in range(len(found))]


def _orthonormal(blocks: Tensor) -> Tensor:
    """Orthonormal rows that span those of each block, (blocks, rows, columns) or (rows, columns)."""
    columns: Tensor
    if not blocks.is_cuda or blocks.ndim < 3:
        columns = torch.linalg.qr(blocks.mT)[0]
        return columns.mT.contiguous()
    # By the Cholesky factor of their products: a GPU makes QR of tall matrices one after the other. Twice, because the
    # condition of these is squared (Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm").
    blocks = torch.nn.functional.normalize(blocks, dim=-1)
    ridge = RIDGE * torch.eye(blocks.shape[1], device=blocks.device)
    for _ in range(2):
        factor, _info = torch.linalg.cholesky_ex(blocks @ blocks.mT + ridge)
        blocks = torch.linalg.solve_triangular(factor, blocks, upper=False)
    return blocks


def _is_small(sketched: Sketched) -> bool:
    return min(sketched.matrix.shape) <= EXACT_UP_TO
