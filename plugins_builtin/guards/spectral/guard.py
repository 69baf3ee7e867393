"""Spectral norms, stable ranks and relative changes of the weights, each against its own baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import TYPE_CHECKING, Any, ClassVar

from invarlock.api import Guard, each
from plugins_builtin.guards.figures import TOP, Suspect, measured, not_finite, not_measured, ratio, rounded, suspects
from plugins_builtin.guards.options import by_family, families_in, family_of, number, refuse, whole
from plugins_builtin.guards.spectral.moves import Matrix, Move, replaced

if TYPE_CHECKING:
    import torch

    from plugins_builtin.guards.spectral.sketches import Change, Size, Spectrum


FEW = 3
"""Matrices whose leading singular values are reported where there is no warning; with one, all named ones are."""
MOST_VALUES = 32
MOST_NUMBERS = 2**26
"""Largest matrix whose leading singular values are reported; a larger one takes seconds."""
AT_ONCE = 64
CPU_BYTES_AT_ONCE, GPU_BYTES_AT_ONCE = 2**25, 2**30
"""A CPU gains nothing from batches of larger matrices, and a GPU waits for Python with smaller ones. A whole batch is
in memory at once where a model is streamed, and on a GPU the Gram matrices of its columns are."""


class SpectralGuard(Guard):
    """Measures every matrix of weights before and after the edit: fused experts one by one, convolutions flattened.

    For each: the largest singular value sigma (the spectral norm), to 1 %; the Frobenius norm; the stable rank
    ||W||_F² / sigma²; the relative change ||W' - W||_F / ||W||_F; and the rows and columns that were replaced. The
    methods and their accuracy are described in ``singular`` and ``sketches`` beside this module. Of the baseline, a few
    numbers per row and per column are kept, and no weight.

    It never does more than warn: weights alone do not show harm. Permuted units, rotated heads and folded norms change
    them and no output. NaN or Inf that the baseline has not aborts.

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
        Number of matrices that may exceed their cap without a warning. 0: one broken matrix can break a model.
    ``deadband`` (0.1), ``sigma_quantile`` (0.95)
        A family as a whole has drifted when this quantile of |sigma' / sigma - 1| over its matrices is above
        ``deadband``. 0.1 is ten times the accuracy of sigma, and twice the most that rounding to 4 bits does to a
        matrix of SmolLM2; the quantile leaves single matrices to ``family_caps``.
    ``row_cap`` (0.9)
        A row that moved by more than this share of its own norm (or of the median row's, if that is larger) counts as
        replaced, and one is enough to warn: at 1 nothing of it need be left. So does a row or a column whose norm
        changed by this share of itself (or of a quarter of the median one, if that is larger); this is measured
        exactly, so that no zeroed row or column of at least 8 numbers and of any usual size is missed. It finds rows of
        an embedding that are too few to show in its norm.
    """

    name = "spectral"
    shares_work = True

    RETIRED: ClassVar[Mapping[str, str]] = {
        "contraction": "every matrix is compared with its own baseline; use family_caps and deadband",
        "correction_enabled": "the guard never changes a model; there is nothing to enable",
        "degeneracy": "the stable rank of every matrix is always measured; there is nothing to set",
        "estimator": "sigma is always computed to 1 %; there is nothing to set",
        "ignore_preview_inflation": "weights do not depend on windows; there is nothing to ignore",
        "max_spectral_norm": "an absolute limit is blind to the edit; family_caps limits the change of each matrix",
        "min_beta": "no weight is ever rescaled; family_caps limits the change of each matrix",
        "multiple_testing": "changes are measured, not tested; max_caps sets how many may exceed their cap",
        "multipletesting": "changes are measured, not tested; max_caps sets how many may exceed their cap",
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
        refuse(type(self), unknown, self.RETIRED)
        self._families = families_in(scope)
        # Above 2, what negating a matrix comes to, a cap can only be a κ of InvarLock 0.3.
        self._caps = by_family("family_caps", family_caps or {}, 0.2, 0, 2)
        self._max_caps = whole("max_caps", max_caps, 0)
        self._deadband = number("deadband", deadband, 0)
        self._sigma_quantile = number("sigma_quantile", sigma_quantile, 0, 1)
        self._row_cap = number("row_cap", row_cap, 0)
        self._stored: list[_Weight] | None = None
        """Of the baseline, without their numbers."""
        self._spectra: dict[str, Spectrum | None] = {}
        """Of its matrices that were measured."""

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        weights = list(_weights(model, self._families))
        self._stored = [weight.emptied() for weight in weights]
        if getattr(calib, "comparing", False):
            # Most weights may be equal: the others are measured once these are known.
            return {"ready": True, "matrices": sum(len(weight.matrices()) for weight in weights)}
        self._measure(weights)
        finite = [entry for entry in self._spectra.values() if entry]
        return {
            "ready": True,
            "matrices": len(finite),
            "largest_sigma": rounded(max((entry.size.sigma for entry in finite), default=None)),
            "non_finite_in_baseline": [name for name, entry in self._spectra.items() if entry is None][:TOP],
        }

    def _measure(self, weights: Iterable[_Weight]) -> None:
        for of_batch in each(_spectra, _alike(weights)):
            self._spectra |= of_batch

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        if self._stored is None:
            return {"passed": False, "action": "abort", "message": "not measured: prepare was not called"}
        baseline = context.get("baseline_weights") or {}
        # Without a copy of each: they are only read.
        baseline = getattr(baseline, "lent", baseline)
        weights = list(_weights(model, self._families, {weight.module: weight.shape[0] for weight in self._stored}))
        same = _unchanged(context)
        changed = [weight for weight in weights if weight.module not in same]
        unchanged = [weight for weight in weights if weight.module in same and weight.is_finite]
        # Those that are shown are measured for it: small ones.
        unchanged.sort(key=lambda weight: weight.parameter.numel())
        still = [one for weight in unchanged for one in weight.matrices()]
        self._measure_late({*(weight.module for weight in changed), *(one.module for one in still[:TOP])}, baseline)
        before = {name: entry for name, entry in self._spectra.items() if entry}
        before |= _shared_spectra(weights, before, baseline)
        found = each(lambda alike: self._moves(alike, before), _alike(changed))
        moves = {matrix.name: (matrix, move) for of_batch in found for matrix, move in of_batch}
        moves |= {one.name: (one, Move.none(one, before.get(one.name))) for one in still}
        if broken := [matrix.module for matrix, move in moves.values() if not move]:
            return not_finite("weights", broken, "its weights hold NaN or Inf")
        names = [matrix.name for weight in self._stored for matrix in weight.matrices()]
        if not moves:
            return not_measured(f"no weight in scope could be compared ({len(names)} in the baseline)")
        ranked = sorted((move for _, move in moves.values() if move), key=lambda move: -move.score)
        result = self._result(ranked, [name for name in names if name not in moves])
        shown = [move for move in ranked[: TOP if result["warnings"] else FEW] if move.score > 0]
        result["metrics"]["spectra"] = _leading_values(shown, weights, baseline)
        return result

    def _measure_late(self, modules: Collection[str], baseline: Mapping[str, torch.Tensor]) -> None:
        """Measure these weights of the baseline that have not been measured, where they can be read back."""
        self._measure(
            replace(weight, parameter=baseline[weight.parameter_name])
            for weight in self._stored or ()
            if weight.module in modules and weight.parameter_name in baseline
            if any(matrix.name not in self._spectra for matrix in weight.matrices())
        )

    def _moves(self, alike: _Alike, before: Mapping[str, Spectrum]) -> list[tuple[Matrix, Move | None]]:
        """Changes of the matrices that the baseline has, too; None for one that holds NaN or Inf."""
        from plugins_builtin.guards.spectral.singular import changes

        matrices, numbers = {}, []
        for matrix, values in alike.read():
            if matrix.name in before and before[matrix.name].shape == values.shape:
                matrices[matrix] = before[matrix.name]
                numbers.append(values)
        found = changes(numbers, list(matrices.values()))
        return [
            (matrix, self._move(matrix, old.size, change) if change else None)
            for (matrix, old), change in zip(matrices.items(), found, strict=True)
        ]

    def _move(self, matrix: Matrix, before: Size, change: Change) -> Move:
        lines = change.rows, change.columns
        rows, columns = (int((line > self._row_cap).sum()) for line in lines)
        sigma = ratio(change.after.sigma - before.sigma, before.sigma)
        cap = max(self._caps[matrix.family], 1e-9)
        beyond = max(change.relative, abs(sigma)) / cap
        replaced = max(float(line.max()) for line in lines) / max(self._row_cap, 1e-9) if rows or columns else 0.0
        return Move(matrix, before, change.after, change.relative, sigma, rows, columns, beyond, max(beyond, replaced))

    def _result(self, moves: Sequence[Move], unmeasured: Sequence[str]) -> dict[str, Any]:
        families: dict[str, list[Move]] = defaultdict(list)
        for move in moves:
            families[move.matrix.family].append(move)
        warnings = [*self._beyond_caps(moves), *replaced(moves), *self._drifts(families)]
        message = "; ".join(warnings)
        message = message or f"{len(moves)} matrices within their caps; largest change: {moves[0].evidence}"
        blamed = (Suspect(move.matrix.module, move.score, move.evidence) for move in moves if move.score > 0)
        metrics = {
            "matrices": len(moves),
            "families": {family: self._summary(family, of_family) for family, of_family in families.items()},
            "modules": [move.metrics for move in moves[:TOP]],
            "suspects": suspects(blamed),
        }
        return measured(message, warnings, metrics, unmeasured)

    def _beyond_caps(self, moves: Sequence[Move]) -> list[str]:
        beyond = [move for move in moves if move.beyond > 1]
        if len(beyond) <= self._max_caps:
            return []
        worst = max(beyond, key=lambda move: move.beyond)
        return [f"{len(beyond)} of {len(moves)} matrices exceed their cap, most of all {worst.evidence}"]

    def _drifts(self, families: Mapping[str, Sequence[Move]]) -> list[str]:
        return [
            f"the spectral norms of {family} have drifted by {drift:.1%}"
            for family, moves in families.items()
            if (drift := self._drift(moves)) > self._deadband
        ]

    def _drift(self, moves: Sequence[Move]) -> float:
        changes = sorted(abs(move.sigma_change) for move in moves)
        # The largest for a quantile of 1, and for less, of more than one matrix, never the largest.
        return changes[int(self._sigma_quantile * (len(changes) - 1))]

    def _summary(self, family: str, moves: Sequence[Move]) -> dict[str, Any]:
        """Figures of a family, each beside its limit; a relative change of 1 is a matrix set to zero."""
        changes = [move.change for move in moves]
        return {
            "matrices": len(moves),
            "median_change": rounded(median_low(changes)),
            "largest_change": rounded(max(changes)),
            "cap": self._caps[family],
            "sigma_drift": rounded(self._drift(moves)),
            "deadband": self._deadband,
            "beyond_cap": sum(move.beyond > 1 for move in moves),
        }


@dataclass(frozen=True, eq=False)
class _Weight:
    """A weight as a stack of matrices: one, or one for each expert of a fused weight."""

    module: str
    family: str
    parameter_name: str
    parameter: torch.Tensor
    shape: tuple[int, int]
    rows: int
    """Number of its rows to look at: those of tokens that the baseline has, too, or all."""

    def matrices(self) -> list[Matrix]:
        """One, or each expert of a fused weight."""
        count = self.parameter.numel() // (self.shape[0] * self.shape[1])
        names = [self.module] if count == 1 else [f"{self.module}[{place}]" for place in range(count)]
        return [Matrix(name, self.module, self.family) for name in names]

    def emptied(self) -> _Weight:
        import torch

        shape, dtype = self.parameter.shape, self.parameter.dtype
        return replace(self, parameter=torch.empty(shape, dtype=dtype, device="meta"))

    @property
    def is_finite(self) -> bool:
        from plugins_builtin.guards.activations import are_finite

        values = self.read()
        return bool(are_finite(values if values.itemsize > 1 else values.float()))

    def read(self) -> torch.Tensor:
        """(matrices, ``rows``, columns); a streamed weight is read once for it."""
        # A view, because every operation on a streamed weight itself would read it again.
        return self.parameter.detach().view(self.parameter.shape).reshape(-1, *self.shape)[:, : self.rows]


@dataclass(frozen=True, eq=False)
class _Alike:
    """Weights whose matrices have one shape, type and device."""

    weights: Sequence[_Weight]

    @property
    def device(self) -> torch.device:
        return self.weights[0].parameter.device

    @property
    def nbytes(self) -> int:
        return sum(weight.parameter.nbytes for weight in self.weights)

    def read(self) -> Iterator[tuple[Matrix, torch.Tensor]]:
        for weight in self.weights:
            yield from zip(weight.matrices(), weight.read(), strict=True)


def _weights(
    model: torch.nn.Module, families: Sequence[str], rows_before: Mapping[str, int] | None = None
) -> Iterator[_Weight]:
    """The weights in these families that are there to be read.

    :param rows_before: of the baseline's matrices, by name: of an embedding and of a head no more are looked at.
    """
    from invarlock.api import find_weights

    for target in find_weights(model):
        weight, family = target.parameter, family_of(target.role.value)
        if family not in families or weight.is_meta or not weight.is_floating_point() or not weight.numel():
            continue
        flat = target.layout.name == "CONV"
        shape = (len(weight), weight.numel() // len(weight)) if flat else (weight.shape[-2], weight.shape[-1])
        known = (rows_before or {}).get(target.name, shape[0]) if family == "embed" else shape[0]
        yield _Weight(target.name, family, target.parameter_name, weight, shape, min(known, shape[0]))


def _unchanged(context: Mapping[str, Any]) -> frozenset[str]:
    """Names of weights all of whose numbers a comparison has found equal already."""
    weights = context.get("edit", {}).get("modules", [])
    return frozenset(weight["name"] for weight in weights if weight.get("change") == "unchanged")


def _alike(weights: Iterable[_Weight]) -> Iterator[_Alike]:
    """Batches of weights whose matrices have one shape, type and device."""
    together: dict[Any, list[_Weight]] = defaultdict(list)
    for weight in weights:
        group = together[weight.shape, weight.rows, weight.parameter.dtype, weight.parameter.device]
        group.append(weight)
        nbytes, most = weight.parameter.nbytes, CPU_BYTES_AT_ONCE
        if weight.parameter.is_cuda:
            nbytes, most = max(nbytes, 4 * weight.shape[1] ** 2), GPU_BYTES_AT_ONCE
        if len(group) == AT_ONCE or len(group) * nbytes >= most:
            yield _Alike([*group])
            group.clear()
    yield from (_Alike(group) for group in together.values() if group)


def _spectra(alike: _Alike) -> list[tuple[str, Spectrum | None]]:
    from plugins_builtin.guards.spectral.singular import spectra

    matrices, numbers = zip(*alike.read(), strict=True)
    return [(matrix.name, spectrum) for matrix, spectrum in zip(matrices, spectra(numbers), strict=True)]


def _shared_spectra(
    weights: Iterable[_Weight], before: Mapping[str, Spectrum], baseline: Mapping[str, torch.Tensor]
) -> dict[str, Spectrum]:
    """Spectra of the baseline's rows that are left, of each matrix that has lost some and can be read back."""
    from plugins_builtin.guards.spectral.singular import spectra

    found = {
        weight.module: spectra([baseline[weight.parameter_name][: weight.rows]])[0]
        for weight in weights
        if weight.family == "embed" and weight.parameter_name in baseline and weight.module in before
        if weight.rows < before[weight.module].shape[0]
    }
    return {name: spectrum for name, spectrum in found.items() if spectrum}


def _leading_values(
    moves: Sequence[Move], weights: Sequence[_Weight], baseline: Mapping[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """The leading singular values of matrices before and after; of those whose baseline can be read back."""
    from plugins_builtin.guards.spectral.singular import leading_values

    def values(alike: _Alike) -> dict[str, Any] | None:
        (weight,) = alike.weights
        old = baseline.get(weight.parameter_name)
        if old is None or old.shape[1:] != weight.parameter.shape[1:]:
            return None
        old, new = old.flatten(1)[: weight.rows], weight.read()[0]
        if old.shape != new.shape:
            return None
        before, after = (leading_values(numbers, MOST_VALUES) for numbers in (old, new))
        if not before or not after:
            return None
        return {"module": weight.module, "before": [*map(rounded, before)], "after": [*map(rounded, after)]}

    whole = {weight.module: weight for weight in weights if weight.parameter.numel() <= MOST_NUMBERS}
    # Experts have names of their own.
    shown = [_Alike([whole[move.matrix.name]]) for move in moves if move.matrix.name in whole]
    return [found for found in each(values, shown) if found]
