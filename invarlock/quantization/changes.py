"""Names for the change of one tensor, in the field's words: pruned, cast, transposed, low-rank and others.

Most tests look at a few rows first, and at all of them only where these pass: what is none of the named changes costs
little more than a look at the tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from invarlock.models.precision import for_float64
from invarlock.quantization.differences import are_equal, differing_rows, is_cast, relative_error
from invarlock.quantization.grids import infer_grid, some_rows
from invarlock.quantization.layout import WeightLayout

UNCHANGED, CHANGED = "unchanged", "changed"
NOT_FINITE, ZERO, TRANSPOSED, OFF_BY_ONE = "not finite", "all zero", "transposed", "off by one"

FEW = 0.5
"""Share of the rows that an edit of single rows changes at most; what changes more is an edit of the tensor."""
SCATTERED = 0.05
"""Share of the values of the rows that differ, up to which single values were changed: outliers and flipped bits."""
LOST = 0.5
"""Cosine between a row and what became of it, below which it points elsewhere. Rounding to 2 bits leaves 0.9, and
unrelated rows of 100 numbers are within 0.3 of 0."""
TOLERANCE = 2
"""Roundings of the coarser data type that a product or a sum may be off by."""
SPREAD = 0.05
"""Standard deviation of the logarithms of the columns' scales, above which they count as scaled. Smoothing moves tens
of percents; a fine-tune moves whole columns by far less."""
EXACT, ROUGH = 0.01, 0.15
"""Share of a matrix that scales of its columns may leave unexplained: what rounding to 16 bits leaves, and what
quantization to 4 bits afterwards does."""
MOST_RANK = 128
"""Of adapters; few are trained with more."""
LOW_RANK_SHARE = 0.25
"""Of the smaller side of a matrix: a difference of a higher rank is not low."""
NOISE = 0.3
"""Share of a difference that may be the rounding of the sum; beyond it no rank can be read off."""


@dataclass(frozen=True)
class TensorChange:
    """The change of one tensor."""

    text: str
    """Its kind; after a colon, figures of this one tensor."""
    bits: int | None = None
    """Of the grid that the tensor lies on, and did not before."""
    rows: tuple[int, ...] = ()
    """The rows that differ, where few do."""


@torch.no_grad()
def change_of(old: Tensor, new: Tensor, layout: WeightLayout = WeightLayout.OUT_IN) -> TensorChange:
    """The change from one tensor to another on the same device, of any data types.

    :param layout: of tensors with two axes or more; their rows are outputs, or the tokens of an embedding.
    """
    if old.shape != new.shape:
        return TensorChange(_resized(old, new))
    if are_equal(old, new):
        return TensorChange(UNCHANGED)
    if not new.is_floating_point() or not old.is_floating_point():
        return TensorChange(CHANGED)
    old, new = _with_arithmetic(old), _with_arithmetic(new)
    return _of_all_values(old, new) or _of_rows(old, new, layout)


def lost_rows(old: Tensor, new: Tensor) -> Tensor:
    """Indices of the rows of a matrix that became zero, not finite, or point elsewhere; rows of zeros had nothing."""
    before, after = old.float(), new.float()
    kept = torch.cosine_similarity(before, after, dim=1) >= LOST
    return (~kept & (before != 0).any(1)).nonzero().flatten()


def column_scales(old: Tensor, new: Tensor, unexplained: float = ROUGH) -> Tensor | None:
    """The factors by which the columns of a matrix were scaled, float32; None where that explains too little of it.

    :param unexplained: share of the matrix, in the Frobenius norm, that may be left over.
    """
    if len(old) < 2:
        return None
    before, after = old.float(), new.float()
    squares = before.square().sum(0)
    scales = torch.where(squares > 0, (before * after).sum(0) / squares.clamp(min=1e-30), 1.0)
    if (scales <= 0).any() or scales.log().std() < SPREAD:
        return None
    rest = torch.linalg.vector_norm(after - before * scales)
    return scales if rest <= unexplained * torch.linalg.vector_norm(after) else None


def _with_arithmetic(tensor: Tensor) -> Tensor:
    """Types of 8 bits have next to none."""
    return tensor.float() if tensor.itemsize < 2 else tensor


def _resized(old: Tensor, new: Tensor) -> str:
    """Rows that came or went, as in a vocabulary; otherwise both shapes."""
    if not old.ndim == new.ndim == 2 or old.shape[1] != new.shape[1]:
        return f"resized: {tuple(old.shape)} became {tuple(new.shape)}"
    shared = min(len(old), len(new))
    others = UNCHANGED if are_equal(old[:shared], new[:shared]) else CHANGED
    return f"{abs(len(new) - len(old)):,} rows {'added' if len(new) > len(old) else 'removed'}, the others {others}"


def _of_all_values(old: Tensor, new: Tensor) -> TensorChange | None:
    """A change that does not depend on rows."""
    low, high = torch.aminmax(new)
    if not (low.isfinite() & high.isfinite()):
        spoiled = int((~new.isfinite() & old.isfinite()).sum())
        return TensorChange(f"{NOT_FINITE}: {spoiled:,} more values are NaN or Inf" if spoiled else CHANGED)
    if low == high == 0:
        return TensorChange(ZERO)
    if old.ndim == 1 and (step := _step(old, new)):
        return TensorChange(f"{OFF_BY_ONE}: {step} every value")
    if low == high and new.numel() > 1:
        return TensorChange(f"constant: {float(low):.4g}")
    if old.ndim > 1 and _transposed(old, new):
        return TensorChange(TRANSPOSED)
    text = _cast(old, new)
    return TensorChange(text) if text else None


def _cast(old: Tensor, new: Tensor) -> str | None:
    for dtype in (torch.bfloat16, torch.float16):
        if dtype != old.dtype and is_cast(old, new, dtype):
            return f"{_name(dtype)} of {_name(old.dtype)}"
    return None


def _step(old: Tensor, new: Tensor) -> str | None:
    """1 added to every value or subtracted, up to the rounding of the larger one."""
    before, after = old.float(), new.float()
    near = _eps(old, new) * torch.maximum(before.abs(), after.abs()).clamp(min=1)
    for step, text in ((1, "1 added to"), (-1, "1 subtracted from")):
        if ((after - before - step).abs() <= near).all():
            return text
    return None


def _transposed(old: Tensor, new: Tensor) -> bool:
    """Also a matrix of unequal sides whose numbers were read in the other order, and each of several matrices."""
    if not torch.equal(old[..., :, 0].flatten()[:2].float(), new[..., 0, :].flatten()[:2].float()):
        return False
    return torch.equal(old.mT.reshape(new.shape).float(), new.float())


def _of_rows(old: Tensor, new: Tensor, layout: WeightLayout) -> TensorChange:
    before, after = _rows(old, layout), _rows(new, layout)
    differing = differing_rows(before, after)
    some = len(differing) < len(before)
    few = len(differing) <= FEW * len(before)
    count = f"{len(differing):,} of {len(before):,}"
    rows = tuple(differing.tolist()) if few else ()
    pair = (before[differing], after[differing]) if some else (before, after)
    if text := _first((_zeroed, _negated, _scaled), *pair):
        return TensorChange(f"rows {text}: {count}" if some else text, rows=rows)
    if _first((_pruned,), *pair):
        return TensorChange(_zeros(after))
    if few:
        return TensorChange(_scattered(*pair, after.numel()) or f"rows {_turned(*pair)}: {count}", rows=rows)
    if old.ndim > 1 and (text := _permuted(before, after) or _of_columns(before, after) or _rescaled(before, after)):
        return TensorChange(text)
    return _of_matrix(old, new, layout)


def _scattered(before: Tensor, after: Tensor, of: int) -> str | None:
    values = int((before != after).sum())
    return f"values changed: {values:,} of {of:,}" if values <= SCATTERED * before.numel() else None


def _turned(before: Tensor, after: Tensor) -> str:
    return "replaced" if len(lost_rows(before, after)) > len(before) / 2 else CHANGED


def _of_columns(before: Tensor, after: Tensor) -> str | None:
    if (some_rows(before) != some_rows(after)).any(0).all():
        return None
    differing = (before != after).any(0).nonzero().flatten()
    if len(differing) == before.shape[1]:
        return None
    text = _first((_negated, _scaled), before.mT[differing], after.mT[differing])
    return f"columns {text}: {len(differing):,} of {before.shape[1]:,}" if text else None


def _of_matrix(old: Tensor, new: Tensor, layout: WeightLayout) -> TensorChange:
    grid = infer_grid(new, layout) if new.ndim > 1 else None
    if grid is not None and infer_grid(old, layout) != grid:
        return TensorChange(str(grid), grid.bits)
    if rank := _low_rank(old, new):
        return TensorChange(rank)
    return TensorChange(f"{_zeros(new)}, the others changed" if _has_new_zeros(old, new) else CHANGED)


def _has_new_zeros(old: Tensor, new: Tensor) -> bool:
    """More of them than the few that rounding to the data type makes."""
    least = 0.01 * new.numel()
    return new.numel() - int(new.count_nonzero()) > least and int(((new == 0) & (old != 0)).sum()) > least


def _rows(tensor: Tensor, layout: WeightLayout) -> Tensor:
    """As (rows, columns); a vector is one row."""
    return layout.matrices(tensor).flatten(0, -2) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _first(tests: tuple[Callable[[Tensor, Tensor], str | None], ...], before: Tensor, after: Tensor) -> str | None:
    """The first test that holds for all rows, after it has held for a few."""
    few = some_rows(before), some_rows(after)
    return next((text for test in tests if test(*few) and (text := test(before, after))), None)


def _zeroed(before: Tensor, after: Tensor) -> str | None:
    return None if after.any() else "zeroed"


def _negated(before: Tensor, after: Tensor) -> str | None:
    return "negated" if torch.equal(-before.float(), after.float()) else None


def _scaled(before: Tensor, after: Tensor) -> str | None:
    """All by one factor, which is told from rounding."""
    old, new, eps = before.float(), after.float(), _eps(before, after)
    factor = float((old * new).sum() / old.square().sum().clamp(min=1e-30))
    if abs(factor - 1) <= 2 * TOLERANCE * eps or ((new - factor * old).abs() > TOLERANCE * eps * new.abs()).any():
        return None
    return f"scaled by {factor:.3g}"


def _pruned(before: Tensor, after: Tensor) -> str | None:
    return "pruned" if ((after == before) | (after == 0)).all() else None


def _zeros(rows: Tensor) -> str:
    """The share of zeros, and whether they lie in the pattern that hardware makes use of."""
    zero = rows == 0
    share = float(zero.float().mean())
    # Nobody prunes a thousandth.
    if share < 1e-3:
        return f"values zeroed: {int(zero.sum()):,} of {zero.numel():,}"
    fours = zero.reshape(len(zero), -1, 4).sum(2) if rows.shape[1] % 4 == 0 else torch.zeros(1)
    return f"{100 * share:.2g} % zeros{', 2 of each 4' if (fours == 2).float().mean() > 0.99 else ''}"


def _permuted(before: Tensor, after: Tensor) -> str | None:
    if _reordered(before, after):
        return "rows permuted"
    return "columns permuted" if _reordered(before.mT, after.mT) else None


def _reordered(before: Tensor, after: Tensor) -> bool:
    """True if rows are the same ones in another order."""
    # Nearly every other change shows in the first column alone.
    if not torch.equal(before[:, 0].float().sort().values, after[:, 0].float().sort().values):
        return False
    return torch.equal(_hashes(before).sort().values, _hashes(after).sort().values)


def _hashes(rows: Tensor) -> Tensor:
    """A 64-bit number for each row; sums of whole numbers, because their order must not matter."""
    seed = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=seed).to(rows.device)
    return (rows.float().view(torch.int32).long() * factors).sum(1)


def _rescaled(before: Tensor, after: Tensor) -> str | None:
    for name, old, new in (("columns", before, after), ("rows", before.mT, after.mT)):
        if column_scales(some_rows(old), some_rows(new), EXACT) is not None:
            scales = column_scales(old, new, EXACT)
            if scales is not None:
                return f"{name} scaled: by {float(scales.min()):.2g} to {float(scales.max()):.2g}"
    return None


def _low_rank(old: Tensor, new: Tensor) -> str | None:
    """A difference of low rank, up to the rounding of the sum."""
    most = min(MOST_RANK, int(LOW_RANK_SHARE * min(old.shape)))
    if old.ndim != 2 or most < 1:
        return None
    # A part has the rank of the whole, or a little less under the rounding; where it has none, neither has the whole.
    part = [some_rows(some_rows(matrix, 2 * most).mT, 2 * most) for matrix in (old, new)]
    if (rank := _rank(part[0], part[1], most)) is None or (rank := _rank(old, new, min(2 * rank, most))) is None:
        return None
    return f"LoRA-like, rank {rank}: {100 * (relative_error(old, new) or 0):.2g} % of the norm"


def _rank(old: Tensor, new: Tensor, most: int) -> int | None:
    """The rank of the difference of two matrices, if it is at most ``most``."""
    squares = _squares(new.float() - old.float(), most)
    left = squares.flip(0).cumsum(0).flip(0).sqrt()
    total, left = left[0], left[1 : most + 1]
    # A rounding is off by half a step at most, and by half of that in the root mean square.
    rounding = _eps(old, new) / 2 * float(torch.linalg.vector_norm(new.float()))
    explained = (left <= (1e-3 * total).clamp(min=rounding)) & (left <= NOISE * total)
    return int(explained.nonzero()[0]) + 1 if explained.any() else None


def _squares(difference: Tensor, most: int) -> Tensor:
    """Squares of the singular values of a matrix, largest first; of a large one the leading ones, and the sum of the
    others, by a randomized range finder (Halko et al. 2011)."""
    if max(difference.shape) <= 2 * most:
        return _all_squares(difference)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(difference.shape[1], min(most + 8, *difference.shape), generator=generator)
    basis = torch.linalg.qr(difference @ probe.to(difference.device))[0]
    found = basis.mT @ difference
    rest = for_float64(torch.linalg.vector_norm(difference.addmm_(basis, found, alpha=-1))).double().square()
    return torch.cat([_all_squares(found), rest[None]])


def _all_squares(matrix: Tensor) -> Tensor:
    wide = for_float64(matrix).double()
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.mT)
    return squares.flip(0).clamp(min=0)


def _eps(old: Tensor, new: Tensor) -> float:
    return max(torch.finfo(old.dtype).eps, torch.finfo(new.dtype).eps)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
