"""The frontier: for each number of bits the plan with the least predicted rise of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import Scheme
from invarlock.search.allocation import allocate
from invarlock.search.candidates import Choice, Decision


@dataclass(frozen=True)
class Allocation:
    """One choice for each decision."""

    decisions: Sequence[Decision]
    places: Sequence[int]
    """Of the choice of each decision among its choices."""

    @property
    def choices(self) -> list[Choice]:
        return [decision.choices[place] for decision, place in zip(self.decisions, self.places, strict=True)]

    @property
    def bits_per_weight(self) -> float:
        """Scales included."""
        return self.bits / sum(decision.weights for decision in self.decisions)

    @property
    def bits(self) -> int:
        return sum(choice.bits for choice in self.choices)

    @property
    def rise(self) -> float:
        """Predicted, of the loss, in nats per token."""
        return sum(choice.rise for choice in self.choices)

    @property
    def rules(self) -> Rules:
        """The plan as rules, one for each scheme; wider ones last."""
        names: dict[Scheme, list[str]] = {}
        for decision, choice in zip(self.decisions, self.choices, strict=True):
            names.setdefault(choice.scheme, []).extend(decision.names)
        ordered = sorted(names, key=lambda scheme: (scheme.bitwidth, -(scheme.group_size or 0)))
        return Rules(tuple(_rule(scheme, names[scheme]) for scheme in ordered))


def best_within(decisions: Sequence[Decision], bits_per_weight: float) -> Allocation | None:
    """The least predicted rise with at most so many bits, or None where no schemes have so few."""
    budget = bits_per_weight * sum(decision.weights for decision in decisions)
    return _chosen(decisions, allocate(_rises(decisions), _bits(decisions), budget))


def smallest_within(decisions: Sequence[Decision], rise: float) -> Allocation | None:
    """The fewest bits with at most such a predicted rise, or None where no schemes have so small a one."""
    return _chosen(decisions, allocate(_bits(decisions), _rises(decisions), rise))


def smallest(decisions: Sequence[Decision]) -> float:
    """The fewest bits per weight that there are."""
    least = sum(min(choice.bits for choice in decision.choices) for decision in decisions)
    return least / sum(decision.weights for decision in decisions)


def _chosen(decisions: Sequence[Decision], chosen: Sequence[int] | None) -> Allocation | None:
    return None if chosen is None else Allocation(decisions, chosen)


def _rises(decisions: Sequence[Decision]) -> list[list[float]]:
    return [[choice.rise for choice in decision.choices] for decision in decisions]


def _bits(decisions: Sequence[Decision]) -> list[list[float]]:
    return [[float(choice.bits) for choice in decision.choices] for decision in decisions]


def _rule(scheme: Scheme, names: Sequence[str]) -> Rule:
    return Rule(match=tuple(names), **{entry.name: getattr(scheme, entry.name) for entry in fields(Scheme)})
