"""Parts of a guard's result: rounded numbers, suspects, and the results for what could not be measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOP = 10
"""Largest number of modules that a result names, to keep reports readable."""
HIGHEST = 1e9
"""Stands for every higher score, infinite ones too, which JSON has no number for."""


@dataclass(frozen=True)
class Suspect:
    """A module that may be to blame for what an edit did."""

    module: str
    score: float
    evidence: str


def suspects(found: Iterable[Suspect]) -> list[dict[str, Any]]:
    """The modules that are most to blame, best first, each with its strongest evidence."""
    ranked: dict[str, Suspect] = {}
    for suspect in sorted(found, key=lambda suspect: -suspect.score):
        ranked.setdefault(suspect.module, suspect)
    return [
        {"module": suspect.module, "score": rounded(min(suspect.score, HIGHEST)), "evidence": suspect.evidence}
        for suspect in list(ranked.values())[:TOP]
    ]


def not_measured(why: str) -> dict[str, Any]:
    """The result of a guard that could not measure: no objection, and no pass either."""
    return {
        "passed": False,
        "action": "continue",
        "message": f"not measured: {why}",
        "warnings": [],
        "metrics": {"measured": False, "modules": None, "suspects": []},
    }


def measured(
    message: str, warnings: Sequence[str], metrics: Mapping[str, Any], unmeasured: Sequence[str]
) -> dict[str, Any]:
    """The result of a guard that warns at most; ``unmeasured`` are names of what could not be compared."""
    return {
        "passed": True,
        "action": "warn" if warnings else "continue",
        "message": message,
        "warnings": warnings,
        "metrics": {"measured": True, "not_measured": unmeasured[:TOP], **metrics},
    }


def not_finite(what: str, found: Iterable[str], evidence: str, before: Sequence[Suspect] = ()) -> dict[str, Any]:
    """The abort for NaN or Inf that the baseline has not.

    :param found: modules that hold it, in the order in which the model computes; empty if they are not known.
    :param before: stronger suspects.
    """
    modules = list(dict.fromkeys(found))
    some = ", ".join(modules[:3]) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")
    return {
        "passed": False,
        "action": "abort",
        "message": f"NaN or Inf in the {what} of {some}" if some else f"NaN or Inf in {what} at the output head",
        "warnings": [],
        "metrics": {
            "measured": True,
            "non_finite": modules[:TOP],
            # The first in order is the likeliest source of the others.
            "suspects": suspects(
                [*before, *(Suspect(name, 1 / rank, evidence) for rank, name in enumerate(modules, start=1))]
            ),
        },
    }


def first_few(findings: Sequence[str]) -> str:
    """Findings in one line, the first three in full."""
    rest = len(findings) - 3
    return "; ".join(findings[:3]) + (f"; and {rest} more" if rest > 0 else "")


def rounded(value: float | None) -> float | None:
    """Four significant digits; None for what was not measured or is not a finite number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")


def ratio(value: float, of: float) -> float:
    """Their quotient; infinite where all that there is was nothing before, and 0 where it still is nothing."""
    return value / of if of else math.inf if value else 0.0
