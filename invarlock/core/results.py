"""Results of edits and guards, and the fold from many results, ordered by severity, to one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal, cast

from invarlock.core.errors import ExitCode, as_raised, contained, nearest
from invarlock.core.plain import (
    MESSAGE,
    METRICS,
    WARNINGS,
    Limits,
    Reader,
    Unreadable,
    as_text,
    kind_name,
    plain,
    shortened,
)


class Action(StrEnum):
    """Treatment of an edit, from harmless to grave."""

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


@dataclass(frozen=True, kw_only=True)
class EditedWeight:
    """The effect of an edit on one weight. Rows with NaN or Inf, left as they were, are in no figure but their own."""

    name: str = ""
    """The path of the module, or of the parameter if it is not the ``weight`` of its module."""
    role: str = ""
    change: str
    """``quantized``; of a comparison ``unchanged``, ``changed``, or in the field's words, as ``a grid of ...`` (an
    inferred scheme), ``bfloat16 of float32`` or ``LoRA-like, rank 16: 2.1 % of the norm``."""
    bits: int | None = None
    parameters: int
    """Number of weights in it."""
    relative_error: float | None = None
    """``||w - q|| / ||w||`` in the Frobenius norm, 0 for a weight of zeros; None if not measured or not finite."""
    sqnr_db: float | None = None
    """``10 log10(||w||^2 / ||w - q||^2)``; None if it was not measured or there is no error."""
    clipped_share: float | None = None
    """Share of the parameters that ``clamp_ratio`` changed."""
    non_finite_rows: int | None = None
    """Output channels with NaN or Inf."""
    device: str

    @property
    def is_changed(self) -> bool:
        return self.change != "unchanged"

    @property
    def kind(self) -> str:
        """The change without the figures of this one weight, which stand after a colon."""
        return self.change.partition(":")[0]


@dataclass(frozen=True)
class GuardResult:
    """Judgement of one guard on one attempt.

    ``passed`` is None when nothing was measured, which a guard reports with ``metrics["measured"]`` False; that never
    counts as passed. ``error`` tells how the guard itself failed; its action is then always ``abort``.
    """

    name: str
    passed: bool | None
    action: Action
    message: str = ""
    warnings: tuple[str, ...] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    # Added for the report.
    origin: Literal["builtin", "plugin", "local"] = "local"
    version: str | None = None
    prepare: Mapping[str, Any] = field(default_factory=dict)
    """As ``prepare`` returned it."""
    seconds: float = field(default=0.0, compare=False)

    @classmethod
    def from_plugin(cls, name: str, returned: object) -> GuardResult:
        """Read what ``validate`` returned, whatever it is.

        What it lacks, what contradicts itself and what is no data makes it an error of that guard, which counts as
        abort. What is too long is cut, and a warning says so.
        """
        try:
            with contained():
                return cls._read(name, _dict_of("validate", "passed", returned))
        except Exception as error:
            return cls.failed(name, _reason("validate", error))

    @classmethod
    def _read(cls, name: str, returned: Mapping[Any, Any]) -> GuardResult:
        if "passed" not in returned:
            raise Unreadable("the result of validate lacks 'passed' (True or False)")
        passed = _flag("passed", returned["passed"])
        action = _action(returned.get("action"), passed)
        metrics, cut_metrics = _part(returned, "metrics", METRICS, dict)
        warnings, cut_warnings = _part(returned, "warnings", WARNINGS, list)
        message, cut_message = Reader.strict("message", returned.get("message"), MESSAGE)
        measured = not (action is Action.CONTINUE and metrics.get("measured") is False)
        if measured and (wrong := contradiction(passed, action)):
            raise Unreadable(wrong)
        return cls(
            name=name,
            passed=passed if measured else None,
            action=action,
            message=as_text(message),
            warnings=(
                *map(as_text, warnings),
                *(f"cut: {cut}" for cut in (*cut_metrics, *cut_warnings, *cut_message)),
            ),
            metrics=metrics,
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
        message = plain(message, MESSAGE)
        return cls(name, passed=False, action=Action.ABORT, message=message, error=shortened(trace or message))


@dataclass(frozen=True)
class PrepareResult:
    """Result of a guard's ``prepare``, or how it failed."""

    returned: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    error: str | None = None
    """The traceback, or the message where there is none."""

    @classmethod
    def from_plugin(cls, returned: object) -> PrepareResult:
        """Read what ``prepare`` returned, whatever it is; None counts as ready."""
        if returned is None:
            return cls()
        try:
            with contained():
                given = _dict_of("prepare", "ready", returned)
                _flag("ready", given.get("ready", True))
                made, cut = Reader.strict("prepare", given, METRICS)
        except Exception as error:
            return cls.failed(_reason("prepare", error))
        return cls({**made, "cut": cut[0]} if cut else made)

    @classmethod
    def failed(cls, message: str, trace: str | None = None) -> PrepareResult:
        message = plain(message, MESSAGE)
        return cls(message=message, error=shortened(trace or message))

    @property
    def ready(self) -> bool:
        return self.error is None and self.returned.get("ready", True) is True


GUARD = "guard "
"""Before a guard's name in the source of its finding."""


@dataclass(frozen=True)
class Finding:
    """One voice in the verdict: a guard's, or the primary metric's."""

    source: str
    action: Action
    message: str
    failed: bool = False
    """True where the source itself failed, so that its word cannot be relied on."""
    inconclusive: bool = False
    """True where it objects because what was measured does not tell on which side of its limit the edit is."""

    @classmethod
    def of_guard(cls, result: GuardResult) -> Finding:
        return cls(f"{GUARD}{result.name}", result.action, result.message, failed=result.error is not None)

    @property
    def is_of_guard(self) -> bool:
        return self.source.startswith(GUARD)

    @property
    def objects(self) -> bool:
        return self.action is not Action.CONTINUE


@dataclass(frozen=True)
class SuspectedModule:
    """A module that is likely responsible for a rejection."""

    module: str
    score: float
    """Reciprocal rank over all guards that suspect it."""
    evidence: tuple[str, ...]
    """Each begins with the name of the guard; at least one."""


Ending = Literal["accepted", "rejected", "inconclusive"]


@dataclass(frozen=True)
class Verdict:
    """The most severe action over all findings, and the first finding that called for it."""

    action: Action
    accepted: bool
    decided_by: str
    strict: bool
    """True where a warning, though accepted, ends the process with exit code 1."""
    findings: tuple[Finding, ...]
    """The folded findings: gaps in coverage that the edit touches, guards, outputs, others."""
    reasons: tuple[str, ...]
    """Findings that object, the most severe first."""
    exit_code: int
    ending: Ending | None = None
    """``inconclusive``: not accepted, and nothing that called for the action was certain. None in reports of earlier
    builds, which did not tell."""
    # Added for the report.
    rests_on: str = ""
    """The measured evidence: windows of the dataset, windows that the baseline wrote, or weights alone."""
    suspects: tuple[SuspectedModule, ...] = ()
    """Of a rejection: the modules most likely responsible, best first."""


def fold(findings: Sequence[Finding], *, strict: bool = False) -> Verdict:
    """Fold findings into one verdict: the most severe action wins, the first to call for it decided.

    Among those that call for it, one that is certain goes before any that is inconclusive.

    :param strict: a warning, though accepted, ends the process with ``ExitCode.REJECTED``.
    """
    worst = max((finding.action for finding in findings), key=lambda action: action.severity, default=Action.CONTINUE)
    deciding = [finding for finding in findings if finding.action is worst]
    deciding.sort(key=lambda finding: finding.inconclusive)
    decided_by = deciding[0].source if worst is not Action.CONTINUE else "nothing objected"
    if any(finding.failed for finding in findings):
        exit_code = ExitCode.FAILED
    elif not worst.accepted or (strict and worst is Action.WARN):
        exit_code = ExitCode.REJECTED
    else:
        exit_code = ExitCode.ACCEPTED
    objecting = [finding for finding in findings if finding.objects]
    reasons = [
        f"{finding.source}: {finding.action}: {finding.message}"
        for finding in sorted(objecting, key=lambda finding: -finding.action.severity)
    ]
    ending = _ending(worst, deciding)
    return Verdict(worst, worst.accepted, decided_by, strict, tuple(findings), tuple(reasons), exit_code, ending)


def _ending(worst: Action, deciding: Sequence[Finding]) -> Ending:
    if worst.accepted:
        return "accepted"
    return "inconclusive" if all(finding.inconclusive for finding in deciding) else "rejected"


def contradiction(passed: bool | None, action: Action) -> str | None:
    """The contradiction between a judgement and an action, or None; ``passed`` is None where it measured nothing."""
    if passed is None:
        return None if action is Action.CONTINUE else f"nothing was measured, and 'action' is {action.value!r}"
    if passed is action.accepted or action is Action.WARN:
        return None
    return f"'passed' is {passed} and 'action' is {action.value!r}, which contradict each other"


def _dict_of(hook: str, key: str, returned: Any) -> Mapping[Any, Any]:
    if not issubclass(type(returned), Mapping):
        raise Unreadable(f"{hook} returned {kind_name(returned)}, not a dict with {key!r}")
    return cast("Mapping[Any, Any]", returned)


def _flag(key: str, value: object) -> bool:
    if type(value) is not bool:
        # Text is always true.
        todo = "say True or False" if value is None or issubclass(type(value), str) else "use bool()"
        raise Unreadable(f"{key!r} is {kind_name(value)}, {todo}")
    return value


def _action(value: object, passed: bool) -> Action:
    if value is None and not passed:
        raise Unreadable("the result of validate has passed=False but lacks 'action'")
    word = plain(value, MESSAGE) if value is None or issubclass(type(value), str) else kind_name(value)
    if word in (None, "none"):
        return Action.CONTINUE
    if word not in list(Action):
        known = ", ".join(Action)
        raise Unreadable(
            f"unknown action {word[:50]!r}{nearest(word.strip().lower()[:50], map(str, Action))}; known are {known}"
        )
    return Action(word)


def _part(returned: Mapping[Any, Any], key: str, limits: Limits, kind: type) -> tuple[Any, list[str]]:
    """An entry of a result, which may be left out, and what was cut of it; one text is a list of one."""
    value = returned.get(key)
    if value is None:
        return kind(), []
    made, cut = Reader.strict(key, [value] if kind is list and issubclass(type(value), str) else value, limits)
    if not isinstance(made, kind):
        raise Unreadable(f"{key!r} is {kind_name(value)}, not a {kind.__name__}")
    return made, cut


def _reason(hook: str, error: BaseException) -> str:
    if isinstance(error, Unreadable):
        return str(error)
    return f"the result of {hook} raises {kind_name(as_raised(error), article=False)} when it is read"
