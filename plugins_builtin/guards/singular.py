"""The largest singular value of a matrix, its Frobenius norm, and a sketch that shows later how far it has moved.

**Sketch.** For a vector ω of random signs E ||Δ ω||² = ||Δ||_F² (Hutchinson 1990), so W Ω with a block Ω of k such
vectors, k numbers a row, tells the Frobenius norm of any later change Δ = W' - W without W itself::

    ||Δ||_F ≈ sqrt(||W' Ω - W Ω||_F² / k)

Its square has the variance 2 (||Δᵀ Δ||_F² - sum_i (Δᵀ Δ)_ii²) / k (Avron and Toledo 2011, section 4), so for k = 8 the
norm is right to 25 % (one standard deviation) where Δ has rank one, to 25 % / sqrt(r) where its stable rank is r, as
rounding's is high, and exactly where Δ is single entries, one a row.

**Largest singular value.** Block Lanczos on A = Wᵀ W with full reorthogonalization (Golub and Underwood 1977; Musco and
Musco 2015, algorithm 2), begun with the sketch and with a few new directions a step. For a Ritz pair (θ, v) with the
residual r = ||A v - θ v|| and the next Ritz value θ₂, an eigenvalue of A is within min(r, r² / (θ - θ₂)) of θ (Parlett
1998, *The Symmetric Eigenvalue Problem*, sections 4.5 and 11.7, with θ₂ for the unknown λ₂). It goes on until that is
at most ``ACCURACY`` of sigma. The estimate is never above sigma. That it is not further below is not proven, for θ₂
may be low
and the eigenvalue may not be the largest; it was so for all 211 matrices of SmolLM2 and for matrices of noise, whose
spectrum has no gap, against exact singular values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch
from torch import Tensor

PROBES = 8
WIDTH = 4
"""Directions that a step adds; a product with 4 vectors costs less than twice one with a single vector."""
ACCURACY = 0.01
MOST_STEPS = 16
SLIGHT = 0.1
"""A change whose norm is below this share of sigma is not searched for directions of its own."""
EXACT_UP_TO = 32
"""With so few rows or columns a full decomposition costs no more."""
TAME = (1e-8, 1e8)
"""Frobenius norms whose fourth power float32 holds; other matrices are scaled first."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What is kept of a matrix (rows, columns): a few numbers a row and a column, and no weight."""

    sigma: float
    """The largest singular value, to ``ACCURACY``."""
    frobenius: float
    sketch: Tensor
    """``scale * W Ω``, transposed: float32 (PROBES, rows)."""
    leading: Tensor
    """The right singular vectors of the two largest singular values, roughly: float32 (at most 2, columns)."""
    scale: float
    """A power of two, 1 for any usual matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.sketch.shape[1], self.leading.shape[1]

    @property
    def stable_rank(self) -> float:
        """``||W||_F² / sigma²``, from 1 to the rank (Rudelson and Vershynin 2007); 0 for a matrix of zeros."""
        return (self.frobenius / self.sigma) ** 2 if self.sigma else 0.0


@dataclass(frozen=True, eq=False)
class Change:
    """A matrix after an edit, against what was kept of it."""

    after: Spectrum
    relative: float
    """About ``||W' - W||_F / ||W||_F``; infinite where W was zero and W' is not."""
    rows: Tensor
    """About ``||w' - w|| / max(||w||, median of ||w||)`` of each row: (rows,). A row of next to nothing, which any
    rounding changes as a whole, counts with the size of the others."""


class NonFiniteError(ValueError):
    """The matrix holds NaN or Inf."""


@torch.no_grad()
def spectrum(matrix: Tensor) -> Spectrum:
    """Measure a matrix, of any floating type, on its device.

    :raises NonFiniteError: it holds NaN or Inf.
    """
    products = _Products.of(matrix)
    probes, start, to_start = _probes(matrix.shape[1], matrix.device)
    sketch, frobenius = products.sketch(probes)
    if not _tame(frobenius):
        products = products.rescaled()
        sketch, frobenius = products.sketch(probes)
    if _is_small(matrix):
        sigma, leading = products.decomposed()
    else:
        sigma, leading = _largest(products, start, products.back(to_start @ sketch))
    return Spectrum(sigma / products.scale, frobenius / products.scale, sketch, leading, products.scale)


@torch.no_grad()
def change(matrix: Tensor, before: Spectrum) -> Change:
    """Measure a matrix again after an edit.

    The search for sigma starts from the leading vectors that it had and from where the change points, so that neither
    an     old direction nor a new one is missed.

    :raises NonFiniteError: it holds NaN or Inf.
    """
    products = _Products.of(matrix)
    probes, *_ = _probes(matrix.shape[1], matrix.device)
    sketch, frobenius = products.sketch(probes)
    if not _tame(frobenius):
        products = products.rescaled()
        sketch, frobenius = products.sketch(probes)
    unit = min(products.scale, before.scale)
    old = before.sketch.to(matrix.device) * (unit / before.scale)
    moved = sketch * (unit / products.scale) - old
    distance = float(moved.norm()) / math.sqrt(PROBES) / unit
    after = Spectrum(before.sigma, frobenius / products.scale, sketch, before.leading, products.scale)
    # Weyl: no singular value moves by more than the norm of the change.
    if distance > ACCURACY * before.sigma:
        if _is_small(matrix):
            sigma, leading = products.decomposed()
        else:
            start = before.leading.to(matrix.device)
            if distance > SLIGHT * before.sigma:
                start = torch.cat([start, products.back(_leading_rows(moved))])
            start = _orthonormal(start)
            sigma, leading = _largest(products, start, products.gram(start))
        after = replace(after, sigma=sigma / products.scale, leading=leading)
    sizes = old.norm(dim=0)
    rows = moved.norm(dim=0) / sizes.clamp(min=float(sizes.median())).clamp(min=torch.finfo(torch.float32).tiny)
    return Change(after, distance / before.frobenius if before.frobenius else math.inf if distance else 0.0, rows)


@dataclass(frozen=True)
class _Products:
    """Products with ``scale * W``, in float32, a few rows of W at a time: little memory, and in cache for both."""

    matrix: Tensor
    at_once: int
    scale: float = 1.0

    @classmethod
    def of(cls, matrix: Tensor) -> _Products:
        elements = 1 << (20 if matrix.device.type == "cpu" else 26)
        return cls(matrix, max(1, elements // max(1, matrix.shape[1])))

    def rescaled(self) -> _Products:
        """
        :raises NonFiniteError: the matrix holds NaN or Inf.
        """
        largest = float(torch.stack([rows.abs().max() for rows in torch.split(self.matrix, self.at_once)]).max())
        if not math.isfinite(largest):
            raise NonFiniteError
        return replace(self, scale=2.0 ** -math.frexp(largest)[1]) if largest else self

    def sketch(self, probes: Tensor) -> tuple[Tensor, float]:
        """``(W probesᵀ)ᵀ`` and the Frobenius norm."""
        parts, norms = zip(*((probes @ rows.T, torch.linalg.vector_norm(rows)) for rows in self._rows()), strict=True)
        return torch.cat(parts, dim=1), math.hypot(*torch.stack(norms).tolist())

    def back(self, block: Tensor) -> Tensor:
        """``block W``."""
        parts = zip(torch.split(block, self.at_once, dim=1), self._rows(), strict=True)
        return reduce(torch.add, (part @ rows for part, rows in parts))

    def gram(self, block: Tensor) -> Tensor:
        """``block Wᵀ W``."""
        return reduce(torch.add, ((block @ rows.T) @ rows for rows in self._rows()))

    def decomposed(self) -> tuple[float, Tensor]:
        _, values, vectors = torch.linalg.svd(torch.cat(list(self._rows())), full_matrices=False)
        return float(values[0]), vectors[:2]

    def _rows(self) -> Iterator[Tensor]:
        for rows in torch.split(self.matrix, self.at_once):
            yield rows.float() if self.scale == 1 else rows.float() * self.scale


def _largest(products: _Products, start: Tensor, image: Tensor) -> tuple[float, Tensor]:
    """The largest singular value and the right singular vectors of the two largest.

    :param start: orthonormal rows to begin with, at least two.
    :param image: ``start Wᵀ W``.
    """
    size, columns = start.shape
    basis, images = start.new_empty(2, min(columns, size + WIDTH * (MOST_STEPS - 1)), columns)
    basis[:size], images[:size] = start, image
    while True:
        known, their_images = basis[:size], images[:size]
        rotation = torch.linalg.eigh(known @ their_images.T)[1][:, -WIDTH:].T
        vectors, moved = rotation @ known, rotation @ their_images
        # Rayleigh quotients are never above the largest eigenvalue, even where the basis is not quite orthogonal.
        values = (vectors * moved).sum(dim=1) / (vectors * vectors).sum(dim=1)
        residuals = torch.addcmul(moved, values[:, None], vectors, value=-1)
        second, top, residual = torch.cat((values[-2:], residuals[-1:].norm(dim=1))).tolist()
        error = min(residual, residual**2 / max(top - second, 1e-30))
        if error <= 2 * ACCURACY * top or size + WIDTH > len(basis):
            return math.sqrt(max(top, 0.0)), vectors[-2:]
        # In exact arithmetic residuals are orthogonal to the basis.
        added = _orthonormal(residuals - (residuals @ known.T) @ known)
        size, old = size + len(added), size
        basis[old:size], images[old:size] = added, products.gram(added)


@lru_cache(maxsize=64)
def _probes(columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random signs Ωᵀ (PROBES, columns), the same in every process; orthonormal rows that span them; the one's matrix
    that makes the other."""
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (PROBES, columns), generator=generator).mul_(2).sub_(1).float()
    if columns <= EXACT_UP_TO:
        return signs.to(device), signs[:0], signs[:0]
    rotated, triangle = torch.linalg.qr(signs.T)
    return signs.to(device), rotated.T.contiguous().to(device), torch.linalg.inv(triangle).T.contiguous().to(device)


def _leading_rows(block: Tensor) -> Tensor:
    """The two directions among the rows of a block that hold most of it."""
    vectors: Tensor = torch.linalg.eigh(block @ block.T)[1]
    return vectors[:, -2:].T @ block


def _orthonormal(block: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(block.T)[0]
    return columns.T.contiguous()


def _is_small(matrix: Tensor) -> bool:
    return min(matrix.shape) <= EXACT_UP_TO


def _tame(frobenius: float) -> bool:
    return TAME[0] <= frobenius <= TAME[1]
