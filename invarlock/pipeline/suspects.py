"""Blame: the modules most likely responsible for a rejection, from what each guard suspects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from invarlock.core.results import Action, EditedWeight, GuardResult, SuspectedModule

MOST = 10
RANK_OFFSET = 1
"""A small one: the first place of a guard shall weigh much more than its fifth."""


def blame(results: Iterable[GuardResult], weights: Sequence[EditedWeight] = ()) -> tuple[SuspectedModule, ...]:
    """The suspects of all guards as one list, best first.

    Causes that are no modules come first: guards list them in ``metrics["causes"]``, dicts with ``cause`` and
    ``evidence``. Where every weight is what it was, no module is blamed.

    :param weights: what the edit did to each.

    A guard lists its own in ``metrics["suspects"]``, best first: dicts with ``module`` and ``evidence``. What a guard
    that calls for abort or rollback suspects comes before what others do; among equals the lists are merged by
    reciprocal rank (Cormack et al. 2009, "Reciprocal Rank Fusion"), which needs no common scale of scores.
    """
    results = list(results)
    causes = [
        SuspectedModule(str(each["cause"]), 1.0, (f"{result.name}: {each.get('evidence', 'suspected')}",))
        for result in results
        for each in _listed(result, "causes", "cause")
    ]
    if weights and not any(weight.is_changed for weight in weights):
        return tuple(causes[:MOST])
    severity: dict[str, int] = {}
    score: dict[str, float] = {}
    evidence: dict[str, list[str]] = {}
    for result in results:
        decides = result.action.severity if not result.action.accepted else Action.CONTINUE.severity
        for rank, suspect in enumerate(_listed(result, "suspects", "module")):
            module = str(suspect["module"])
            severity[module] = max(severity.get(module, 0), decides)
            score[module] = score.get(module, 0.0) + 1 / (RANK_OFFSET + rank)
            evidence.setdefault(module, []).append(f"{result.name}: {suspect.get('evidence', 'suspected')}")
    order = sorted(score, key=lambda module: (-severity[module], -score[module]))
    modules = [SuspectedModule(module, round(score[module], 4), tuple(evidence[module])) for module in order]
    return tuple([*causes, *modules][:MOST])


def _listed(result: GuardResult, key: str, needed: str) -> list[Mapping[str, Any]]:
    listed = result.metrics.get(key)
    if not isinstance(listed, list):
        return []
    return [each for each in listed if isinstance(each, Mapping) and needed in each]
