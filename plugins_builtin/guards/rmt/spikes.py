"""Eigenvalues of activations beyond the noise edge, before and after an edit.

The columns of an (n tokens, d features) matrix are standardized, and C = Zᵀ Z / (n - 1) is its correlation matrix. Were
the features independent noise, its eigenvalues would lie below (1 + sqrt(d / n))² (Marchenko and Pastur 1967) but for
fluctuations, which at the edge follow the Tracy-Widom law (Johnstone 2001, theorem 1.1; Bao, Pan and Zhou 2012 for
correlation matrices)::

    mu = (sqrt(m - 1) + sqrt(d))²             with m = n - 1 degrees of freedom, all divided by m
    s  = (sqrt(m - 1) + sqrt(d)) (1 / sqrt(m - 1) + 1 / sqrt(d))^(1/3)
    edge = (mu + margin * s) / m

Eigenvalues beyond the edge are spikes: directions in which the features vary together (Baik, Ben Arous and Péché 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALLEST_DEVIATION = 1e-3
"""Features that vary by less than this share of the others' root mean square are taken to vary by that much."""


def edge(tokens: int, features: int, margin: float) -> float:
    """The edge of noise for a correlation matrix.

    :param margin: the Tracy-Widom quantile to allow for: 0.98 is exceeded by 5 % of noise matrices, 2.02 by 1 %.
    """
    freedom = tokens - 1
    root, width = math.sqrt(freedom - 1), math.sqrt(features)
    centre = (root + width) ** 2
    scale = (root + width) * math.cbrt(1 / root + 1 / width)
    return (centre + margin * scale) / freedom


@dataclass(frozen=True)
class Spectra:
    """The spikes of one place before and after an edit, of the same tokens."""

    edge: float
    counts: tuple[int, int]
    energies: tuple[float, float]
    """The sum of the eigenvalues beyond the edge over the baseline's sum of all."""
    lost: int
    gained: int
    """Numbers of eigenvalues that fell below the edge, and that rose above it, by more than the deadband."""
    energy_ratio: float
    """The sum of the leading eigenvalues after over before, of as many as the side with more spikes has. Unlike the sum
    of those beyond the edge it does not jump when one crosses it (Ky Fan norms are Lipschitz)."""
    turned: float
    """The share of the baseline's energy beyond the edge in directions that as many leading edited ones do not span:
    ``1 - sum_i w_i ||P' v_i||² / sum_i w_i`` with ``w_i = max(0, lambda_i - edge)``, from 0 to 1; sin² of the angle for
    a single direction. A direction right at the edge, which may change places with noise, has no weight."""


@torch.no_grad()
def compare(before: Tensor, after: Tensor, *, margin: float, deadband: float) -> Spectra:
    """Compare the spectra of two matrices (tokens, features), both standardized with the first one's figures.

    :param deadband: a spike is lost or gained only if it was, or is, beyond the edge by this share of it.
    """
    before, after = before.float(), after.float()
    centre = before.mean(dim=0)
    deviation = ((before - centre).square().sum(dim=0) / (len(before) - 1)).sqrt()
    floor = SMALLEST_DEVIATION * float(deviation.square().mean().sqrt())
    deviation = deviation.clamp(min=max(floor, 1e-30))
    old = _Eigen.of((before - centre) / deviation)
    new = old if torch.equal(before, after) else _Eigen.of((after - centre) / deviation)
    limit = edge(len(before), before.shape[1], margin)
    counts = old.beyond(limit), new.beyond(limit)
    most, total = max(*counts, 1), float(old.values.sum()) or 1.0
    weights = (old.values[:most] - limit).clamp(min=0)
    spanned = (new.directions(most) @ old.directions(most).T).square().sum(dim=0)
    return Spectra(
        edge=limit,
        counts=counts,
        energies=(float(old.values[: counts[0]].sum()) / total, float(new.values[: counts[1]].sum()) / total),
        lost=old.above(new, limit, deadband),
        gained=new.above(old, limit, deadband),
        energy_ratio=float(new.values[:most].sum()) / (float(old.values[:most].sum()) or 1.0),
        turned=max(0.0, 1 - float((spanned * weights).sum() / weights.sum())) if counts[0] and new is not old else 0.0,
    )


@dataclass(frozen=True, eq=False)
class _Eigen:
    """Eigenvalues, largest first, and eigenvectors of a correlation matrix, or of the smaller Gram matrix in its
    place, which has the same eigenvalues."""

    rows: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Eigen:
        tokens, features = rows.shape
        values, vectors = torch.linalg.eigh((rows @ rows.T if tokens < features else rows.T @ rows) / (tokens - 1))
        return cls(rows, values.flip(0), vectors.flip(1))

    def beyond(self, limit: float) -> int:
        return int((self.values > limit).sum())

    def above(self, other: _Eigen, limit: float, deadband: float) -> int:
        """Number of eigenvalues clearly beyond the limit whose counterparts of the same rank are not."""
        return int(((self.values > limit * (1 + deadband)) & (other.values <= limit)).sum())

    def directions(self, most: int) -> Tensor:
        """The leading eigenvectors as unit rows: (most, features)."""
        tokens, features = self.rows.shape
        leading = self.vectors[:, :most].T
        return nn.functional.normalize(leading @ self.rows, dim=1) if tokens < features else leading
