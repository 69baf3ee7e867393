"""Changes of matrices by an edit, as guard ``spectral`` reports them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plugins_builtin.guards.figures import rounded

if TYPE_CHECKING:
    from plugins_builtin.guards.spectral.sketches import Size, Spectrum


@dataclass(frozen=True)
class Matrix:
    """A weight in two dimensions, or one expert of a fused weight."""

    name: str
    module: str
    family: str


@dataclass(frozen=True)
class Move:
    """Change of a matrix by an edit."""

    matrix: Matrix
    before: Size
    after: Size
    change: float
    sigma_change: float
    rows_replaced: int
    columns_replaced: int
    beyond: float
    """Change in units of its cap."""
    score: float

    @classmethod
    def none(cls, matrix: Matrix, spectrum: Spectrum | None) -> Move:
        """
        :param spectrum: None where it is of no interest: of equal matrices a few are shown.
        """
        from plugins_builtin.guards.spectral.sketches import Size

        size = spectrum.size if spectrum else Size(0.0, 0.0)
        return cls(matrix, size, size, 0.0, 0.0, 0, 0, 0.0, 0.0)

    @property
    def evidence(self) -> str:
        replaced = f", {self.replaced} replaced" if self.replaced else ""
        return (
            f"{self.matrix.name}: relative change {self.change:.3g}, spectral norm {self.before.sigma:.3g} -> "
            f"{self.after.sigma:.3g}, stable rank {self.before.stable_rank:.3g} -> {self.after.stable_rank:.3g}"
            f"{replaced}"
        )

    @property
    def replaced(self) -> str:
        return _counted(self.rows_replaced, self.columns_replaced)

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "module": self.matrix.name,
            "family": self.matrix.family,
            "relative_change": rounded(self.change),
            "rows_replaced": self.rows_replaced,
            "columns_replaced": self.columns_replaced,
            "sigma": [rounded(self.before.sigma), rounded(self.after.sigma)],
            "stable_rank": [rounded(self.before.stable_rank), rounded(self.after.stable_rank)],
            "frobenius": [rounded(self.before.frobenius), rounded(self.after.frobenius)],
        }


def replaced(moves: Sequence[Move]) -> list[str]:
    where = [move for move in moves if move.replaced]
    if not where:
        return []
    most = max(where, key=lambda move: move.rows_replaced + move.columns_replaced)
    counted = _counted(sum(move.rows_replaced for move in where), sum(move.columns_replaced for move in where))
    return [f"{counted} replaced in {len(where)} of {len(moves)} matrices, most of them in {most.matrix.name}"]


def _counted(rows: int, columns: int) -> str:
    """``2 rows and 1 column``; empty where there are none."""
    found = ((count, name) for count, name in ((rows, "row"), (columns, "column")) if count)
    return " and ".join(f"{count} {name}{'s' if count > 1 else ''}" for count, name in found)
