"""What guards say, ordered by severity, and the fold from many results to one verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from invarlock.core.errors import ExitCode


class Action(StrEnum):
    """What is to be done with an edit, from harmless to grave."""

    CONTINUE = "continue"
    WARN = "warn"
    ROLLBACK = "rollback"
    ABORT = "abort"

    @property
    def severity(self) -> int:
        return list(Action).index(self)

    @property
    def accepted(self) -> bool:
        return self.severity <= Action.WARN.severity


@dataclass(frozen=True)
class GuardResult:
    """What one guard said of one attempt.

    ``passed`` is None when nothing was measured; that never counts as passed. ``error`` says how the guard itself
    failed; its action is then always ``abort``.
    """

    name: str
    passed: bool | None
    action: Action
    message: str = ""
    warnings: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @classmethod
    def from_plugin(cls, name: str, returned: object) -> GuardResult:
        """Read what ``validate`` returned; what it lacks makes it an error of that guard, which counts as abort."""
        if not isinstance(returned, Mapping):
            return cls.failed(name, f"validate returned {type(returned).__name__}, not a dict with 'passed'")
        if not isinstance(returned.get("passed"), bool):
            return cls.failed(name, "the result of validate lacks 'passed' (True or False)")
        passed = returned["passed"]
        if not passed and returned.get("action") is None:
            return cls.failed(name, "the result of validate has passed=False but lacks 'action'")
        said = returned.get("action") or "none"
        try:
            action = Action.CONTINUE if said == "none" else Action(said)
        except ValueError:
            return cls.failed(name, f"unknown action {said!r}; known are {', '.join(Action)}")
        metrics = returned.get("metrics") or {}
        if not isinstance(metrics, Mapping):
            return cls.failed(name, f"'metrics' is a {type(metrics).__name__}, not a dict")
        warnings = returned.get("warnings") or ()
        if isinstance(warnings, str):
            warnings = (warnings,)
        return cls(
            name=name,
            passed=passed,
            action=action,
            message=str(returned.get("message") or ""),
            warnings=tuple(map(str, warnings)),
            metrics=plain(metrics),
        )

    @classmethod
    def merged(cls, by_rank: Sequence[GuardResult]) -> GuardResult:
        """One result of what a guard said in each process: the worst action wins.

        Every process sees all weights and the same activations, so that they agree, and sums and maxima are over all,
        unless one of them is damaged or the guard is not deterministic. Then the metrics say which rank each is of.
        """
        worst = max(by_rank, key=lambda result: (result.action.severity, result.error is not None))
        if all(result == worst for result in by_rank):
            return worst
        metrics = {**worst.metrics, **{f"rank {rank}": result.metrics for rank, result in enumerate(by_rank)}}
        return replace(worst, message=f"rank {by_rank.index(worst)}: {worst.message}", metrics=metrics)

    @classmethod
    def failed(cls, name: str, message: str, trace: str | None = None) -> GuardResult:
        """The result of a guard that itself failed, with its traceback if there is one."""
        return cls(name, passed=False, action=Action.ABORT, message=message, error=trace or message)


@dataclass(frozen=True)
class Finding:
    """One voice in the verdict: a guard's, or the primary metric's."""

    source: str
    action: Action
    message: str
    failed: bool = False
    """Whether the source itself failed, so that its word cannot be relied on."""

    @classmethod
    def of_guard(cls, result: GuardResult) -> Finding:
        return cls(f"guard {result.name}", result.action, result.message, failed=result.error is not None)


@dataclass(frozen=True)
class Verdict:
    """The most severe action over all findings, and the first finding that called for it."""

    action: Action
    decided_by: str
    findings: tuple[Finding, ...]
    exit_code: ExitCode

    @property
    def accepted(self) -> bool:
        return self.action.accepted

    @property
    def reasons(self) -> tuple[str, ...]:
        """What objected, the most severe first."""
        return tuple(
            f"{finding.source}: {finding.action}: {finding.message}"
            for finding in sorted(self.findings, key=lambda finding: -finding.action.severity)
            if finding.action is not Action.CONTINUE
        )


def fold(findings: Sequence[Finding], *, strict: bool = False) -> Verdict:
    """Fold findings into one verdict: the most severe action wins, the first to call for it decided.

    :param strict: a warning, though accepted, ends the process with ``ExitCode.REJECTED``.
    """
    worst = max((finding.action for finding in findings), key=lambda action: action.severity, default=Action.CONTINUE)
    deciding = [finding for finding in findings if finding.action is worst]
    decided_by = deciding[0].source if worst is not Action.CONTINUE else "nothing objected"
    if any(finding.failed for finding in findings):
        exit_code = ExitCode.FAILED
    elif not worst.accepted or (strict and worst is Action.WARN):
        exit_code = ExitCode.REJECTED
    else:
        exit_code = ExitCode.ACCEPTED
    return Verdict(worst, decided_by, tuple(findings), exit_code)


def plain(value: Any) -> Any:
    """Bring what a plugin returned to what JSON can hold.

    Tensors and arrays become numbers or lists. JSON has no NaN and no infinity: they become the strings ``"nan"``,
    ``"inf"`` and ``"-inf"``, so that a reader can tell them from what was not measured (``null``).
    """
    if isinstance(value, str):
        # A lone surrogate, as in a path that is not UTF-8, could not be written.
        return str(value).encode("utf-8", "replace").decode()
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {plain(str(key)): plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return repr(value)
