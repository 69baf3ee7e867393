"""A report as tests that a continuous-integration system shows: one for each voice in the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from invarlock.reporting.describing import NOT_MEASURED
from invarlock.reporting.view import Finding, Guard, View


@dataclass(frozen=True)
class Case:
    """One test."""

    name: str
    outcome: Literal["passed", "failure", "error", "skipped"]
    action: str
    message: str
    detail: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Suite:
    """The tests of one report."""

    name: str
    cases: list[Case]

    @classmethod
    def of(cls, view: View) -> Suite:
        return cls(view.name, list(_cases(view)))

    def count(self, outcome: str) -> int:
        return sum(case.outcome == outcome for case in self.cases)


def _cases(view: View) -> Iterator[Case]:
    """The guards in their order, then the primary metric, the predictions and whatever else had a say."""
    strict = view.verdict.strict
    for guard in view.guards:
        yield _guard(guard, strict)
    others = {found.source: found for found in view.verdict.findings if not found.source.startswith("guard ")}
    for name in dict.fromkeys(["primary metric", "predictions", *others]):
        found = others.get(name)
        yield _other(found, strict) if found else Case(name, "skipped", "not measured", NOT_MEASURED)


def _guard(guard: Guard, strict: bool) -> Case:
    name, seconds = f"guard {guard.name}", guard.seconds if guard.seconds is not None and guard.seconds >= 0 else None
    if guard.passed is None:
        return Case(name, "skipped", guard.said, guard.message, seconds=seconds)
    if guard.error:
        return Case(name, "error", guard.action, guard.message, guard.error, seconds)
    return Case(name, _outcome(guard.action, strict), guard.action, guard.message, guard.message, seconds)


def _other(found: Finding, strict: bool) -> Case:
    outcome = "error" if found.failed else _outcome(found.action, strict)
    return Case(found.source, outcome, found.action, found.message, found.message)


def _outcome(action: str, strict: bool) -> Literal["passed", "failure"]:
    return "passed" if action == "continue" or (action == "warn" and not strict) else "failure"
