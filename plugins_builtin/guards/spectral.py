"""Spectral norms, stable ranks and sizes of the weights, each against its own baseline."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.core.api import Guard
from plugins_builtin.guards.figures import TOP, Suspect, not_finite, not_measured, quantile, rounded, suspects
from plugins_builtin.guards.options import by_family, families_in, family_of, number, refuse, whole

if TYPE_CHECKING:
    import torch

    from plugins_builtin.guards.singular import Change, Spectrum


FEW = 3
"""Matrices whose leading singular values are measured where nothing is wrong; else those of all that it names."""
MOST_VALUES = 32
AT_ONCE = 64
BYTES_AT_ONCE = 256 * 2**20
"""Larger matrices gain nothing from company, and streamed ones are read again for each product."""


class SpectralGuard(Guard):
    """Measures every matrix of weights before and after the edit: fused experts one by one, convolutions flattened.

    For each: the largest singular value sigma (the spectral norm), to 1 %; the Frobenius norm; the stable rank
    ||W||_F² / sigma²; the relative change ||W' - W||_F / ||W||_F; and the rows that were replaced. How, and how well,
    is said in ``plugins_builtin.guards.singular``. Of the baseline a few numbers a row and a column are kept, and no
    weight.

    It warns, and never more: weights alone do not tell harm. Permuted units, rotated heads and folded norms change them
    and no output. NaN or Inf that the baseline has not aborts.

    Options:

    ``scope`` (all)
        ``ffn``, ``attn``, or ``all``: these, embeddings, the head, routers and every other matrix.
    ``family_caps`` (0.2 for each of ffn, attn, embed, other)
        Largest relative change of a matrix, and of its sigma, up or down. Rounding a Gaussian row of some hundreds of
        weights to a scale of its own changes it by 0.008 at 8 bits, 0.13 at 4 and 0.27 at 3 (a step over sqrt(12)), and
        between 4 and 3 bits round-to-nearest stops being usable (Dettmers and Zettlemoyer 2023, "The case for 4-bit
        precision"): 0.2 lies between. 1 is a matrix set to zero, sqrt(2) one replaced by another of its size, 2 one
        negated. In InvarLock 0.3 it was kappa, a z-score.
    ``max_caps`` (0)
        So many matrices may lie beyond their cap without a warning. None: one broken matrix can break a model.
    ``deadband`` (0.1), ``sigma_quantile`` (0.95)
        A family as a whole has drifted when this quantile of |sigma' / sigma - 1| over its matrices is above
        ``deadband``. 0.1 is ten times the accuracy of sigma, and twice the most that rounding to 4 bits does to a
        matrix
        of SmolLM2; the quantile leaves single matrices to ``family_caps``.
    ``row_cap`` (0.9)
        A row that moved by more than this share of its own norm (or of the median row's, if that is larger) counts as
        replaced, and one is enough to warn: at 1 nothing of it need be left. It finds rows of an embedding that are too
        few to show in its norm.
    """

    name = "spectral"

    RETIRED: ClassVar[Mapping[str, str]] = {
        "contraction": "every matrix is held against its own baseline; use family_caps and deadband",
        "correction_enabled": "the guard never changes a model; there is nothing to enable",
        "degeneracy": "the stable rank of every matrix is always measured; there is nothing to set",
        "estimator": "the accuracy is stated (1 %), and the iterations follow from it; there is nothing to set",
        "ignore_preview_inflation": "weights do not depend on windows; there is nothing to ignore",
        "max_spectral_norm": "an absolute limit says nothing of an edit; family_caps limits the change of each matrix",
        "min_beta": "no weight is ever rescaled; family_caps limits the change of each matrix",
        "multiple_testing": "changes are measured, not tested; max_caps says how many may lie beyond their cap",
        "multipletesting": "changes are measured, not tested; max_caps says how many may lie beyond their cap",
    }

    def __init__(
        self,
        scope: str = "all",
        family_caps: Mapping[str, float] | None = None,
        max_caps: int = 0,
        deadband: float = 0.1,
        sigma_quantile: float = 0.95,
        row_cap: float = 0.9,
        **unknown: Any,
    ) -> None:
        refuse(unknown, self.RETIRED, ("scope", "family_caps", "max_caps", "deadband", "sigma_quantile", "row_cap"))
        self._families = families_in(scope)
        # Above 2, what negating a matrix comes to, a cap can only be a κ of InvarLock 0.3.
        self._caps = by_family("family_caps", family_caps or {}, 0.2, 0, 2)
        self._max_caps = whole("max_caps", max_caps, 0)
        self._deadband = number("deadband", deadband, 0)
        self._sigma_quantile = number("sigma_quantile", sigma_quantile, 0, 1)
        self._row_cap = number("row_cap", row_cap, 0)
        self._baseline: dict[str, Spectrum | None] | None = None

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        from plugins_builtin.guards.singular import spectra

        self._baseline = {}
        for alike in _alike(_matrices(model, self._families)):
            measured = spectra([matrix.values for matrix in alike])
            self._baseline |= {matrix.name: entry for matrix, entry in zip(alike, measured, strict=True)}
        finite = [entry for entry in self._baseline.values() if entry]
        return {
            "ready": True,
            "matrices": len(finite),
            "largest_sigma": rounded(max((entry.sigma for entry in finite), default=None)),
            "non_finite_in_baseline": [name for name, entry in self._baseline.items() if entry is None][:TOP],
        }

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        from plugins_builtin.guards.singular import changes

        if self._baseline is None:
            return {"passed": False, "action": "abort", "message": "not measured: prepare was not called"}
        before = {name: entry for name, entry in self._baseline.items() if entry}
        comparable = [
            matrix
            for matrix in _matrices(model, self._families)
            if matrix.name in before and before[matrix.name].shape == tuple(matrix.values.shape)
        ]
        moves: dict[str, _Move | None] = {}
        for alike in _alike(comparable):
            measured = changes([matrix.values for matrix in alike], [before[matrix.name] for matrix in alike])
            for matrix, change in zip(alike, measured, strict=True):
                moves[matrix.name] = self._move(matrix, before[matrix.name], change) if change else None
        if broken := [matrix.module for matrix in comparable if not moves[matrix.name]]:
            return not_finite("weights", list(dict.fromkeys(broken)), "its weights hold NaN or Inf")
        if not comparable:
            return not_measured(f"no weights in scope could be compared ({len(self._baseline)} in the baseline)")
        ranked = sorted((move for move in moves.values() if move), key=lambda move: -move.score)
        result = self._result(ranked, [name for name in self._baseline if name not in moves])
        result["metrics"]["spectra"] = _spectra(
            model, ranked[: TOP if result["warnings"] else FEW], context.get("baseline_weights") or {}
        )
        return result

    def _move(self, matrix: _Matrix, before: Spectrum, change: Change) -> _Move:
        rows = int((change.rows > self._row_cap).sum())
        sigma = change.after.sigma / before.sigma - 1 if before.sigma else math.inf if change.after.sigma else 0.0
        cap = max(self._caps[matrix.family], 1e-9)
        beyond = max(change.relative, abs(sigma)) / cap
        replaced = float(change.rows.max()) / max(self._row_cap, 1e-9) if rows else 0.0
        return _Move(matrix, before, change.after, change.relative, sigma, rows, beyond, max(beyond, replaced))

    def _result(self, moves: Sequence[_Move], unmeasured: Sequence[str]) -> dict[str, Any]:
        families: dict[str, list[_Move]] = defaultdict(list)
        for move in moves:
            families[move.matrix.family].append(move)
        warnings = [*self._beyond_caps(moves), *_replaced(moves), *self._drifts(families)]
        return {
            "passed": True,
            "action": "warn" if warnings else "continue",
            "message": "; ".join(warnings)
            or f"{len(moves)} matrices within their caps, most changed {moves[0].evidence}",
            "warnings": warnings,
            "metrics": {
                "measured": True,
                "matrices": len(moves),
                "not_measured": list(unmeasured[:TOP]),
                "families": {family: self._summary(family, of_family) for family, of_family in families.items()},
                "modules": [move.metrics for move in moves[:TOP]],
                "suspects": suspects(move.suspect for move in moves if move.score > 0),
            },
        }

    def _beyond_caps(self, moves: Sequence[_Move]) -> list[str]:
        beyond = [move for move in moves if move.beyond > 1]
        if len(beyond) <= self._max_caps:
            return []
        worst = max(beyond, key=lambda move: move.beyond)
        return [f"{len(beyond)} of {len(moves)} matrices beyond their cap, most of all {worst.evidence}"]

    def _drifts(self, families: Mapping[str, Sequence[_Move]]) -> list[str]:
        return [
            f"the spectral norms of {family} have drifted by {drift:.1%}"
            for family, moves in families.items()
            if (drift := self._drift(moves)) > self._deadband
        ]

    def _drift(self, moves: Sequence[_Move]) -> float:
        return quantile([abs(move.sigma_change) for move in moves], self._sigma_quantile)

    def _summary(self, family: str, moves: Sequence[_Move]) -> dict[str, Any]:
        """Figures of a family, each beside its limit: changes are relative, 1 is a matrix set to zero."""
        changes = [move.change for move in moves]
        return {
            "matrices": len(moves),
            "median_change": rounded(quantile(changes, 0.5)),
            "largest_change": rounded(max(changes)),
            "cap": self._caps[family],
            "sigma_drift": rounded(self._drift(moves)),
            "deadband": self._deadband,
            "beyond_cap": sum(move.beyond > 1 for move in moves),
        }


@dataclass(frozen=True)
class _Matrix:
    """A weight in two dimensions, or one expert of a fused weight."""

    name: str
    module: str
    family: str
    values: torch.Tensor


@dataclass(frozen=True)
class _Move:
    """What an edit did to a matrix."""

    matrix: _Matrix
    before: Spectrum
    after: Spectrum
    change: float
    sigma_change: float
    rows_replaced: int
    beyond: float
    """How many times its cap."""
    score: float

    @property
    def evidence(self) -> str:
        rows = f", {self.rows_replaced} rows replaced" if self.rows_replaced else ""
        return (
            f"{self.matrix.name}: relative change {self.change:.3g}, spectral norm {self.before.sigma:.3g} -> "
            f"{self.after.sigma:.3g}, stable rank {self.before.stable_rank:.3g} -> {self.after.stable_rank:.3g}{rows}"
        )

    @property
    def suspect(self) -> Suspect:
        return Suspect(self.matrix.module, self.score, self.evidence)

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "module": self.matrix.name,
            "family": self.matrix.family,
            "relative_change": rounded(self.change),
            "rows_replaced": self.rows_replaced,
            "sigma": [rounded(self.before.sigma), rounded(self.after.sigma)],
            "stable_rank": [rounded(self.before.stable_rank), rounded(self.after.stable_rank)],
            "frobenius": [rounded(self.before.frobenius), rounded(self.after.frobenius)],
        }


def _matrices(model: torch.nn.Module, families: Sequence[str]) -> Iterator[_Matrix]:
    """The weights in these families that are there to be read, as matrices."""
    from invarlock.quantization.selection import find_weights

    for target in find_weights(model):
        weight, family = target.parameter.detach(), family_of(target.role.value)
        if family not in families or weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        if target.layout.name == "CONV":
            yield _Matrix(target.name, target.name, family, weight.flatten(1))
        elif weight.ndim == 2:
            yield _Matrix(target.name, target.name, family, weight)
        else:
            experts = enumerate(weight.flatten(0, -3))
            yield from (_Matrix(f"{target.name}[{place}]", target.name, family, expert) for place, expert in experts)


def _spectra(
    model: torch.nn.Module, moves: Sequence[_Move], baseline: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """The leading singular values of matrices before and after; of those whose baseline can be read back."""
    from invarlock.quantization.selection import find_weights
    from plugins_builtin.guards.singular import leading_values

    names = {target.name: target.parameter_name for target in find_weights(model)}
    found = []
    for move in moves:
        matrix, old = move.matrix, baseline.get(names[move.matrix.module])
        if matrix.name != matrix.module or old is None or old.numel() != matrix.values.numel():
            continue
        before = leading_values(old.reshape(matrix.values.shape), MOST_VALUES)
        after = leading_values(matrix.values, MOST_VALUES)
        if before and after:
            found.append({"module": matrix.module, "before": [*map(rounded, before)], "after": [*map(rounded, after)]})
    return found


def _alike(matrices: Iterable[_Matrix]) -> Iterator[list[_Matrix]]:
    """Matrices of one shape, type and device together, some dozens at a time."""
    together: dict[Any, list[_Matrix]] = defaultdict(list)
    for matrix in matrices:
        group = together[matrix.values.shape, matrix.values.dtype, matrix.values.device]
        group.append(matrix)
        if len(group) == AT_ONCE or len(group) * matrix.values.nbytes >= BYTES_AT_ONCE:
            yield [*group]
            group.clear()
    yield from filter(None, together.values())


def _replaced(moves: Sequence[_Move]) -> list[str]:
    where = [move for move in moves if move.rows_replaced]
    if not where:
        return []
    most = max(where, key=lambda move: move.rows_replaced)
    rows = sum(move.rows_replaced for move in where)
    return [f"{rows} rows replaced in {len(where)} matrices, most of them in {most.matrix.name}"]
