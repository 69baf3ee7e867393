"""Differences that a server would notice, by what each calls for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Findings:
    """Differences between two sides, worst first."""

    rollback: list[str] = field(default_factory=list)
    """The edited model would not be served as it was measured, or does not end what it writes."""
    warn: list[str] = field(default_factory=list)
    """It may be meant; whoever ships the model has to know."""
    not_compared: list[str] = field(default_factory=list)

    @property
    def action(self) -> str:
        return "rollback" if self.rollback else "warn" if self.warn else "continue"

    @property
    def all(self) -> list[str]:
        return [*self.rollback, *self.warn]


@dataclass(frozen=True)
class Difference:
    """The first place where two texts or lists are not the same."""

    place: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} became {self.after}"


AROUND = 24
"""Characters or ids shown from the first difference on: enough to recognize it on one line."""


def first_difference(before: Sequence[object], after: Sequence[object]) -> Difference | None:
    """The first place at which two sequences differ, with a little of what follows; None if they are the same."""
    if before == after:
        return None
    pairs = enumerate(zip(before, after, strict=False))
    place = next((place for place, (one, other) in pairs if one != other), min(len(before), len(after)))
    shown = [repr(each[place : place + AROUND]) for each in (before, after)]
    return Difference(place, *shown)
