"""What there is to see in a report: the one model from which every rendering is made.

It is read from plain data that may lack anything or mean harm (``plain_data``): text has no control characters, and
what is missing is None, which every rendering shows as not measured. It still has to be escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invarlock.reporting.describing import (
    NOT_MEASURED,
    Measure,
    edit_line,
    flattened,
    measures_of,
    model_line,
    provenance_of,
)
from invarlock.reporting.plain_data import Node

ACTIONS = ("continue", "warn", "rollback", "abort")
MOST_SUSPECTS = 3
"""Named on the first screen."""
STORED_BITS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8}


@dataclass(frozen=True)
class Finding:
    """One voice in the verdict."""

    source: str
    action: str
    message: str
    failed: bool

    @property
    def objects(self) -> bool:
        return self.action != "continue"


@dataclass(frozen=True)
class Suspect:
    module: str
    evidence: list[str]
    """Each begins with the name of the guard; at least one."""


@dataclass(frozen=True)
class Verdict:
    action: str
    """One of ``ACTIONS``, or ``unknown``."""
    accepted: bool | None
    decided_by: str
    rests_on: str
    strict: bool
    exit_code: int | None
    findings: list[Finding]
    reasons: list[str]
    suspects: list[Suspect]

    @classmethod
    def of(cls, node: Node) -> Verdict:
        return cls(
            action=_action(node["action"]),
            accepted=node["accepted"].flag(),
            decided_by=node["decided_by"].text("unknown"),
            rests_on=node["rests_on"].text(NOT_MEASURED),
            strict=node["strict"].flag() or False,
            exit_code=node["exit_code"].whole(),
            findings=[_finding(entry) for entry in node["findings"].entries()],
            reasons=[entry.text() for entry in node["reasons"].entries()],
            suspects=[_suspect(entry) for entry in node["suspects"].entries()],
        )

    @property
    def word(self) -> str:
        return {True: "ACCEPTED", False: "REJECTED", None: "NO VERDICT"}[self.accepted]

    @property
    def summary(self) -> str:
        return "no guard objected" if self.action == "continue" else f"decided by {self.decided_by}"

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        if self.accepted is None:
            return "The report holds no verdict."
        if self.exit_code == 3:
            return f"The edit was rejected, and {self.decided_by} itself failed: there is no verdict to rely on."
        if not self.accepted:
            return f"The edit was rejected: {self.decided_by} called for {self.action}."
        return f"The edit was accepted{'' if self.action == 'continue' else ' with a warning'}: {self.summary}."

    @property
    def deciding(self) -> Finding | None:
        """The finding that decided; None where nothing objected."""
        return next((found for found in self.findings if found.source == self.decided_by and found.objects), None)


@dataclass(frozen=True)
class Guard:
    name: str
    origin: str
    version: str
    passed: bool | None
    action: str
    message: str
    warnings: list[str]
    seconds: float | None
    figures: list[tuple[str, str]]
    """Its own metrics, nested keys joined by dots."""
    error: str

    @classmethod
    def of(cls, node: Node) -> Guard:
        return cls(
            name=node["name"].text("unnamed"),
            origin=node["origin"].text("unknown origin"),
            version=node["version"].text(),
            passed=node["passed"].flag(),
            action=_action(node["action"]),
            message=node["message"].text(),
            warnings=[entry.text() for entry in node["warnings"].entries()],
            seconds=node["seconds"].number(),
            figures=flattened(node["metrics"]),
            error=node["error"].text(),
        )

    @property
    def said(self) -> str:
        return NOT_MEASURED if self.passed is None else self.action


@dataclass(frozen=True)
class Module:
    """What the edit did to one weight."""

    name: str
    role: str
    change: str
    bits: int | None
    parameters: int | None
    relative_error: float | None
    sqnr_db: float | None
    clipped_share: float | None
    block: str
    """The name up to its first number, or the whole name: the place of the weight along the depth of the model."""

    @classmethod
    def of(cls, node: Node) -> Module:
        name = node["name"].text("unnamed")
        return cls(
            name=name,
            role=node["role"].text("other"),
            change=node["change"].text("unknown"),
            bits=node["bits"].whole(),
            parameters=node["parameters"].whole(),
            relative_error=node["relative_error"].number(),
            sqnr_db=node["sqnr_db"].number(),
            clipped_share=node["clipped_share"].number(),
            block=re.split(r"(?<=\d)(?!\d)", name, maxsplit=1)[0],
        )


@dataclass(frozen=True)
class Attempt:
    number: str
    bitwidth: int | None
    action: str
    decided_by: str
    ratio: float | None


@dataclass(frozen=True)
class Windows:
    """How much the loss of each window rose, nats a token; None where a loss is not a finite number."""

    rises: list[float | None]
    tokens: list[int]
    ratio: float | None
    interval: tuple[float, float] | None
    interval_level: float | None
    limit: float | None
    """The ratio, its interval and its limit are of perplexities: exponentials of rises."""

    @classmethod
    def of(cls, node: Node, metric: Node) -> Windows | None:
        columns = [[entry.number() for entry in node[key].entries()] for key in ("tokens", "baseline", "edited")]
        rows = [
            (tokens, before, after)
            for tokens, before, after in zip(*columns, strict=False)
            if tokens is not None and 0 < tokens < 2**63
        ]
        ends = [entry.number() for entry in metric["ci"].entries()]
        if not rows:
            return None
        return cls(
            rises=[_rise(*row) for row in rows],
            tokens=[int(tokens) for tokens, _, _ in rows],
            ratio=metric["ratio"].number(),
            interval=(ends[0], ends[1]) if len(ends) == 2 and ends[0] is not None and ends[1] is not None else None,
            interval_level=metric["ci_level"].number(),
            limit=metric["limit"].number(),
        )


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values of one weight, the largest first, before and after the edit."""

    module: str
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class Section:
    """What a plugin adds: text, a table, or both."""

    source: str
    title: str
    text: str
    columns: list[str]
    rows: list[list[str]]

    @classmethod
    def of(cls, node: Node) -> Section:
        return cls(
            source=node["source"].text("unknown"),
            title=node["title"].text("untitled"),
            text=node["text"].text(),
            columns=[entry.text() for entry in node["columns"].entries()],
            rows=[[_cell(cell) for cell in row.entries()] for row in node["rows"].entries()],
        )


@dataclass(frozen=True)
class View:
    """One report."""

    name: str
    """Of the run: its folder's name, or the model's."""
    verdict: Verdict
    model: str
    edit: str
    metric: str
    predictions: str
    """What is said of them; empty where they were not measured."""
    restored: bool | None
    """Whether the baseline came back; None where the edit was kept."""
    measures: list[Measure]
    guards: list[Guard]
    modules: list[Module]
    families: list[tuple[str, str, int]]
    """Of a comparison: family, change, how many weights."""
    attempts: list[Attempt]
    windows: Windows | None
    stages: list[tuple[str, float]]
    """Seconds of each stage, in the order of the run."""
    spectra: list[Spectrum]
    sections: list[Section]
    provenance: list[tuple[str, str]]
    artifacts: list[tuple[str, str]]
    """Names and SHA-256 of what was saved."""
    bits_per_parameter: float | None
    """Mean over all parameters, without scales."""
    saved_bytes: int | None
    ratio: float | None
    """Edited over baseline perplexity."""
    plan: dict[str, str]

    @classmethod
    def of(cls, report: Mapping[str, Any], folder: Path | None = None) -> View:
        """
        :param report: as ``report.json`` holds it.
        :param folder: the run's, to name it and to measure what was saved there.
        """
        node = Node(report)
        metrics, modules = node["metrics"], [Module.of(entry) for entry in node["edit"]["modules"].entries()]
        artifacts = [(name, digest.text()) for name, digest in node["artifacts"].items()]
        return cls(
            name=Node(folder.name).text() if folder else Path(node["model"]["id"].text("unnamed model")).name,
            verdict=Verdict.of(node["verdict"]),
            model=model_line(node["model"]),
            edit=edit_line(node["edit"]),
            metric=metrics["primary"]["message"].text(NOT_MEASURED),
            predictions=metrics["predictions"]["message"].text(),
            restored=node["model"]["restored"].flag(),
            measures=measures_of(metrics),
            guards=[Guard.of(entry) for entry in node["guards"].entries()],
            modules=modules,
            families=list(_families(node["edit"]["plan"]["families"])),
            attempts=[_attempt(entry) for entry in node["attempts"].entries()],
            windows=Windows.of(metrics["windows"], metrics["primary"]),
            stages=[
                (name, seconds) for name, entry in node["timings"].items() if (seconds := entry.number()) is not None
            ],
            spectra=list(_spectra(node["guards"])),
            sections=[Section.of(entry) for entry in node["sections"].entries()],
            provenance=provenance_of(node),
            artifacts=artifacts,
            bits_per_parameter=_bits_per_parameter(node["model"]["description"], modules),
            saved_bytes=_saved_bytes(folder, [name for name, _ in artifacts]),
            ratio=metrics["primary"]["ratio"].number(),
            plan={key: _cell(entry) for key, entry in node["edit"]["plan"].items() if key != "families"},
        )

    @property
    def reasons(self) -> list[str]:
        """What decided, and what is said by no metric and no guard."""
        shown = [f"guard {guard.name}" for guard in self.guards]
        if self.metric != NOT_MEASURED:
            shown += ["primary metric", "predictions"]
        others = tuple(f"{source}: " for source in shown if source != self.verdict.decided_by)
        return [reason for reason in self.verdict.reasons if not reason.startswith(others)]

    @property
    def limits(self) -> list[bool]:
        """Of each figure that has a limit: whether it is within."""
        return [measure.within for measure in self.measures if measure.within is not None]

    @property
    def most_suspect(self) -> list[Suspect]:
        return self.verdict.suspects[:MOST_SUSPECTS]

    @property
    def shown_spectra(self) -> list[Spectrum]:
        """Those of the suspects, the most suspect first, and else those that a guard put first."""
        order = {suspect.module: place for place, suspect in enumerate(self.verdict.suspects)}
        return sorted(self.spectra, key=lambda spectrum: order.get(spectrum.module, len(order)))[:MOST_SUSPECTS]


def _action(node: Node) -> str:
    said = node.text()
    return said if said in ACTIONS else "unknown"


def _finding(node: Node) -> Finding:
    failed = node["failed"].flag() or False
    return Finding(node["source"].text("unknown"), _action(node["action"]), node["message"].text(), failed)


def _suspect(node: Node) -> Suspect:
    evidence = [entry.text() for entry in node["evidence"].entries()]
    return Suspect(node["module"].text("unnamed"), evidence or ["suspected"])


def _attempt(node: Node) -> Attempt:
    return Attempt(
        node["attempt"].text("?"),
        node["bitwidth"].whole(),
        _action(node["action"]),
        node["decided_by"].text("unknown"),
        node["ratio"].number(),
    )


def _families(families: Node) -> Iterator[tuple[str, str, int]]:
    for family in families.entries():
        for change, count in family["changes"].items():
            yield family["family"].text("unnamed"), change, count.whole() or 0


def _spectra(guards: Node) -> Iterator[Spectrum]:
    """A guard lists its own in ``metrics["spectra"]``: dicts with ``module``, ``before`` and ``after``."""
    for guard in guards.entries():
        for entry in guard["metrics"]["spectra"].entries():
            before, after = (
                [value for number in entry[key].entries() if (value := number.number()) is not None]
                for key in ("before", "after")
            )
            yield Spectrum(entry["module"].text("unnamed"), before, after)


def _rise(tokens: float, before: float | None, after: float | None) -> float | None:
    if before is None or after is None:
        return None
    rise = (after - before) / tokens
    return rise if abs(rise) < float("inf") else None


def _cell(node: Node) -> str:
    if isinstance(node.value, list):
        return ", ".join(_cell(entry) for entry in node.entries())
    return node.text("" if node.flag() is None else "yes" if node.flag() else "no")


def _bits_per_parameter(description: Node, modules: Sequence[Module]) -> float | None:
    """What was not rounded counts with the bits of the type that the model has."""
    stored, total = STORED_BITS.get(description["dtype"].text()), description["parameters"].whole()
    rounded = [(module.bits, module.parameters) for module in modules if module.bits and module.parameters]
    left = (total or 0) - sum(parameters for _, parameters in rounded)
    if not stored or not total or left < 0:
        return None
    return (sum(bits * parameters for bits, parameters in rounded) + stored * left) / total


def _saved_bytes(folder: Path | None, names: Sequence[str]) -> int | None:
    if folder is None or not names:
        return None
    try:
        return sum((folder / name).stat().st_size for name in names)
    except (OSError, ValueError):
        return None
