"""Sketches of matrices: a few numbers per row and per column that later tell how far a matrix has moved.

For a vector ω of random signs E ||Δ ω||² = ||Δ||_F² (Hutchinson 1990), so W Ω with a block Ω of k such vectors, k
numbers per row, tells the Frobenius norm of any later change Δ = W' - W without W itself. Exact differences would read
the baseline once more for every attempt, and where an adapter keeps its own snapshot there is nothing to read::

    ||Δ||_F ≈ sqrt(||D||_F² / k)    with D = W' Ω - W Ω

Its square has the variance 2 (||Δᵀ Δ||_F² - sum_i (Δᵀ Δ)_ii²) / k (Avron and Toledo 2011, section 4), so for k = 8 the
norm is right to 25 % (one standard deviation) where Δ has rank one, to 25 % / sqrt(r) where its stable rank is r, as
rounding's is high, and exactly where Δ is single entries, one a row. In the same way, since for two independent vectors
E (ω_1ᵀ Δᵀ Δ ω_2)² = ||Δᵀ Δ||_F², the entries of Dᵀ D beside its diagonal tell the Schatten 4-norm, which is not below
the spectral norm (and not much above it for anything like rounding)::

    ||Δ||_2 <= ||Δ||_4 ≈ (mean_{i != j} (Dᵀ D)_ij²)^(1/4)

By Weyl's inequality no singular value has moved further than that. Where it is within ``STILL``, none is computed anew.

The sketch of one row is right to 25 %, too, so that it misses a third of the rows that were zeroed. The norms of rows
and columns are therefore kept as they are: ``| ||w'|| - ||w|| |`` is never more than ``||w' - w||``, and is all of it
where w' is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

import torch
from torch import Tensor

from plugins_builtin.guards.figures import ratio
from plugins_builtin.guards.on_host import on_host

PROBES = 8
STILL = 0.02
"""A singular value that has moved by no more than this counts as where it was."""
EXACT_UP_TO = 32
"""With so few rows or columns a full decomposition costs no more."""
TAME = (1e-8, 1e8)
"""Frobenius norms whose fourth power float32 holds; other matrices are scaled first."""
TINY = 1e-30
SMALL = 0.25
"""A row or column with a norm below this share of the median one counts as of that size: all of it may be lost to
rounding. At 4 bits with a scale per row, 0.25 keeps the norms of all columns of SmolLM2 to 40 %, and 0.1 does not."""
FEW = 8
"""Rounding may make zeros of rows or columns of fewer numbers."""


@dataclass(frozen=True)
class Size:
    """Size of a matrix."""

    sigma: float
    """The largest singular value, to 1 %."""
    frobenius: float

    @property
    def stable_rank(self) -> float:
        """``||W||_F² / sigma²``, from 1 to the rank (Rudelson and Vershynin 2007); 0 for a matrix of zeros."""
        return (self.frobenius / self.sigma) ** 2 if self.sigma else 0.0


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Summary of a matrix (rows, columns): a few numbers per row and per column, and no weight. It is on the CPU."""

    size: Size
    norms: tuple[Tensor, Tensor]
    """Norms of the rows and of the columns of ``scale * W``."""
    sketch: Tensor
    """``scale * W Ω``, transposed: float32 (PROBES, rows)."""
    leading: Tensor
    """The right singular vectors of the two largest singular values, roughly: float32 (at most 2, columns)."""
    scale: float
    """A power of two, 1 for any usual matrix."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.sketch.shape[1], self.leading.shape[1]


@dataclass(frozen=True, eq=False)
class Change:
    """A matrix after an edit, against what was kept of it; its tensors are on the CPU."""

    after: Size
    """Its sigma is accurate to 1 %, or was left where it was and is accurate to 1 % + ``STILL``."""
    relative: float
    """About ``||W' - W||_F / ||W||_F``; infinite where W was zero and W' is not."""
    rows: Tensor
    """About ``||w' - w|| / max(||w||, median of ||w||)`` of each row, or how its norm changed if that is more: (rows,).
    A row of next to nothing, which any rounding changes as a whole, counts with the size of the others."""
    columns: Tensor
    """``| ||w'|| - ||w|| | / max(||w||, SMALL * median of ||w||)`` of each column: (columns,)."""


@dataclass(frozen=True, eq=False)
class Sketched:
    """A matrix, what it is multiplied with to keep its squares in range, and its sketch."""

    matrix: Tensor
    scale: float
    sketch: Tensor
    norms: tuple[Tensor, Tensor]
    """Norms of the rows and of the columns of ``scale * matrix``."""
    frobenius: float
    """Frobenius norm of ``scale * matrix``."""

    @classmethod
    def of_each(cls, matrices: Sequence[Tensor]) -> list[Sketched | None]:
        """Sketches of matrices on one device; None for one that holds NaN or Inf."""
        return [
            sketched if TAME[0] <= sketched.frobenius <= TAME[1] else cls._scaled(sketched)
            for sketched in cls._at(matrices, 1.0)
        ]

    @classmethod
    def _scaled(cls, sketched: Sketched) -> Sketched | None:
        parts = torch.split(sketched.matrix, _rows_at_once(sketched.matrix))
        largest = float(torch.stack([rows.abs().max() for rows in parts]).max())
        if not math.isfinite(largest):
            return None
        return cls._at([sketched.matrix], 2.0 ** -math.frexp(largest)[1])[0] if largest else sketched

    @classmethod
    def _at(cls, matrices: Sequence[Tensor], scale: float) -> list[Sketched]:
        if not matrices:
            return []
        (rows, columns), device = matrices[0].shape, matrices[0].device
        sketches = torch.empty(len(matrices), rows, PROBES, device=device)
        row_norms = torch.empty(len(matrices), rows, device=device)
        squares = torch.zeros(len(matrices), columns, device=device)
        for place, matrix in enumerate(matrices):
            _sketch_into(sketches[place], row_norms[place], squares[place], matrix, scale)
        norms = zip(row_norms, squares.sqrt_(), strict=True)
        # All at once: each number by itself would wait for the device.
        sizes = torch.linalg.vector_norm(row_norms, dim=1).tolist()
        made = zip(matrices, sketches.mT, norms, sizes, strict=True)
        return [cls(matrix, scale, sketch, of_sides, size) for matrix, sketch, of_sides, size in made]

    def back(self, block: Tensor) -> Tensor:
        """``block W``."""
        parts = torch.split(block, _rows_at_once(self.matrix), dim=1)
        return reduce(torch.add, (_times(part, rows) for part, rows in zip(parts, self.blocks(), strict=True)))

    def gram(self, block: Tensor) -> Tensor:
        """``block Wᵀ W``."""
        # (W blockᵀ)ᵀ: BLAS takes longer for block Wᵀ, with few rows times a transposed matrix.
        return reduce(torch.add, (_times((rows @ block.T).T, rows) for rows in self.blocks()))

    def image(self, vector: Tensor) -> Tensor:
        """``W v``."""
        return torch.cat([rows @ vector for rows in self.blocks()])

    def size(self, sigma: float) -> Size:
        return Size(sigma / self.scale, self.frobenius / self.scale)

    @staticmethod
    def spectra(several: Sequence[Sketched], found: Sequence[tuple[float, Tensor]]) -> list[Spectrum]:
        """Summaries of matrices, on the CPU.

        :param found: the largest singular value of ``scale * W`` of each, and its leading right singular vectors.
        """
        kept = [(*entry.norms, entry.sketch, leading) for entry, (_, leading) in zip(several, found, strict=True)]
        numbers = iter(on_host([tensor for of_one in kept for tensor in of_one]))
        return [
            Spectrum(entry.size(sigma), (next(numbers), next(numbers)), next(numbers), next(numbers), entry.scale)
            for entry, (sigma, _) in zip(several, found, strict=True)
        ]

    def blocks(self) -> Iterator[Tensor]:
        return _blocks(self.matrix, self.scale)


@dataclass(frozen=True, eq=False)
class Moved:
    """Matrices of one shape after an edit, and what was kept of each; all are worked on together."""

    now: Sequence[Sketched]
    before: Sequence[Spectrum]

    @cached_property
    def differences(self) -> Tensor:
        """Differences of the sketches: (matrices, PROBES, rows)."""
        return self._now([entry.sketch for entry in self.now]) - self._before([entry.sketch for entry in self.before])

    @cached_property
    def searched(self) -> list[int]:
        """Places of matrices whose sigma may have moved so far that it has to be found anew."""
        sizes = zip(self.before, self._sizes, strict=True)
        return [place for place, (old, (_, bound)) in enumerate(sizes) if bound > STILL * old.size.sigma]

    def changes(self, sigmas: Mapping[int, float]) -> list[Change]:
        """
        :param sigmas: of the matrices at places where it was found anew, of ``scale * matrix``.
        """
        old = _lengths(self._before([entry.sketch for entry in self.before]))
        turned = _lengths(self.differences) / torch.maximum(old, _medians(old).clamp(min=TINY))
        rows = torch.maximum(turned, self._norm_changes(0)).cpu()
        columns = self._norm_changes(1).cpu()
        found = []
        for place, (now, before) in enumerate(zip(self.now, self.before, strict=True)):
            sigma = sigmas.get(place, before.size.sigma * now.scale)
            relative = ratio(self._sizes[place][0], before.size.frobenius)
            found.append(Change(now.size(sigma), relative, rows[place], columns[place]))
        return found

    @cached_property
    def _sizes(self) -> list[tuple[float, float]]:
        """About ``||W' - W||_F`` of each, and its Schatten 4-norm, never more than the first."""
        products = self.differences @ self.differences.mT
        squares = products.diagonal(dim1=-2, dim2=-1)
        fourth = (products.square().sum((-2, -1)) - squares.square().sum(-1)).clamp(min=0)
        found = []
        for unit, total, schatten in zip(self._units, *torch.stack([squares.sum(-1), fourth]).tolist(), strict=True):
            distance = math.sqrt(total / PROBES)
            bound = min(distance, (schatten / (PROBES * (PROBES - 1))) ** 0.25)
            found.append((distance / unit, bound / unit))
        return found

    def _norm_changes(self, side: int) -> Tensor:
        """Relative changes of row or column norms, 0 where they are too short to tell damage from rounding."""
        old = self._before([entry.norms[side] for entry in self.before])
        moved = (self._now([entry.norms[side] for entry in self.now]) - old).abs()
        long_enough = self.before[0].shape[1 - side] >= FEW
        return moved / torch.maximum(old, (SMALL * _medians(old)).clamp(min=TINY)) * long_enough

    @cached_property
    def _units(self) -> list[float]:
        """Scale of each pair, so that both sides stay in range."""
        return [min(now.scale, before.scale) for now, before in zip(self.now, self.before, strict=True)]

    def _now(self, numbers: Sequence[Tensor]) -> Tensor:
        return self._scaled(numbers, [entry.scale for entry in self.now])

    def _before(self, numbers: Sequence[Tensor]) -> Tensor:
        return self._scaled(numbers, [entry.scale for entry in self.before])

    def _scaled(self, numbers: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        """Numbers of each matrix that were scaled, in its unit, and where the matrices are."""
        stacked = torch.stack([*numbers]).to(self.now[0].sketch.device)
        factors = [unit / scale for unit, scale in zip(self._units, scales, strict=True)]
        return stacked * torch.tensor(factors, device=stacked.device).view(-1, *[1] * (stacked.ndim - 1))


@dataclass(frozen=True, eq=False)
class Probes:
    """Random signs Ωᵀ (PROBES, columns), the same in every process, and orthonormal rows that span them."""

    signs: Tensor
    basis: Tensor
    to_basis: Tensor
    """``basis = to_basis @ signs``."""


@lru_cache(maxsize=64)
def probes(columns: int, device: torch.device) -> Probes:
    generator = torch.Generator().manual_seed(columns)
    signs = torch.randint(0, 2, (PROBES, columns), generator=generator).mul_(2).sub_(1).float()
    if columns <= EXACT_UP_TO:
        return Probes(signs.to(device), signs[:0], signs[:0])
    rotated, triangle = torch.linalg.qr(signs.T)
    to_basis = torch.linalg.inv(triangle).T.contiguous()
    return Probes(signs.to(device), rotated.T.contiguous().to(device), to_basis.to(device))


def _sketch_into(sketch: Tensor, row_norms: Tensor, squares: Tensor, matrix: Tensor, scale: float) -> None:
    """Put ``scale * W Ω`` (rows, PROBES) and the norms of rows where they belong, and add up the squares of columns."""
    drawn = probes(matrix.shape[1], matrix.device).signs.T
    at_once = _rows_at_once(matrix)
    places = zip(torch.split(sketch, at_once), torch.split(row_norms, at_once), strict=True)
    for (of_sketch, of_norms), rows in zip(places, _blocks(matrix, scale), strict=True):
        torch.mm(rows, drawn, out=of_sketch)
        torch.linalg.vector_norm(rows, dim=1, out=of_norms)
        squares += rows.square().sum(dim=0)


def _blocks(matrix: Tensor, scale: float) -> Iterator[Tensor]:
    """``scale`` times a matrix, in float32, a few rows at a time, each valid until the next: in cache for several
    products, and in the same memory, because fresh memory costs as much as a product."""
    parts = torch.split(matrix, _rows_at_once(matrix))
    if matrix.dtype == torch.float32 and scale == 1:
        yield from parts
        return
    memory = torch.empty(parts[0].shape, device=matrix.device)
    for rows in parts:
        block = memory[: len(rows)].copy_(rows)
        yield block if scale == 1 else block.mul_(scale)


def _rows_at_once(matrix: Tensor) -> int:
    return max(1, (1 << (21 if matrix.device.type == "cpu" else 26)) // max(1, matrix.shape[1]))


def _times(block: Tensor, rows: Tensor) -> Tensor:
    """``block @ rows``; as a sum over quarters on a CPU, whose BLAS gives a block of few rows to a single core."""
    if len(rows) % 4 or rows.device.type != "cpu":
        return block @ rows
    quarters = block.view(len(block), 4, -1).movedim(1, 0)
    return torch.bmm(quarters, rows.view(4, -1, rows.shape[1])).sum(dim=0)


def _lengths(columns: Tensor) -> Tensor:
    """The norms of the columns of matrices; ``norm(dim=-2)`` would take ten times as long."""
    return columns.square().sum(dim=-2).sqrt()


def _medians(rows: Tensor) -> Tensor:
    return rows.median(dim=-1, keepdim=True).values
