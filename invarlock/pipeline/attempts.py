"""Attempts of an edit: an edit is applied, judged, and undone unless it is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from invarlock.core.results import EditedWeight, Finding, GuardResult, Verdict
from invarlock.datasets.same_text import SameText
from invarlock.pipeline.keeping import Watched
from invarlock.reporting.report import CoverageSection, Gap, MetricsSection


@dataclass(frozen=True)
class RunResult:
    """The report as ``report.json`` holds it, and the model as it was left.

    Of a run the model is the edited one if it was accepted, else the baseline; of a comparison it is the subject, or
    None where it was not loaded because a guard was not ready.
    """

    report: dict[str, Any]
    model: torch.nn.Module | None
    verdict: Verdict


@dataclass(frozen=True)
class Edited:
    """An edited model, and what was done to it."""

    model: torch.nn.Module
    watched: Watched
    name: str
    """Of the edit."""
    plan: Mapping[str, Any]
    modules: Sequence[EditedWeight] = ()
    """Its effect on each weight."""
    baseline_weights: Mapping[str, torch.Tensor] | None = None
    """The baseline's parameters by name, read from disk one at a time."""
    findings: Sequence[Finding] = ()
    """Findings of the edit itself, besides those of guards and outputs."""
    gaps: Sequence[Gap] = ()
    """Changes that the windows do not exercise."""
    unreadable: bool = False
    """True where the model cannot be run over the baseline's windows."""
    tokenizer: Any = None
    """The model's own, where it has one besides the baseline's."""
    same_text: SameText | None = None
    """Final windows of the model's own, where its tokenizer gives other ids than the baseline's."""
    bring_baseline: Callable[[], AbstractContextManager[torch.nn.Module]] | None = None
    """A block in which the baseline is in memory, and after which the edited model is as it was; None where it went."""


class Editor(Protocol):
    """A way to an edited model: rounding in memory, rounding while streaming, or another checkpoint."""

    @property
    def name(self) -> str:
        """Of the edit."""

    @property
    def plans(self) -> Sequence[Mapping[str, Any]]:
        """The plan of each attempt; there are no more attempts than plans."""

    @property
    def model(self) -> torch.nn.Module | None:
        """The model as it is left; None where it was not loaded."""

    def apply(self, number: int) -> Edited:
        """Make the attempt of this number, from 1, out of the baseline."""

    def undo(self) -> Watched:
        """Take back an attempt that was not accepted; returns the model that is left."""

    def write(self, report: dict[str, Any]) -> None:
        """Write the report and, if it was accepted and shall be saved, the model; all processes call this."""


@dataclass(frozen=True)
class Attempt:
    """One edit, and the judgement of it."""

    number: int
    bitwidth: int | None
    modules: Sequence[EditedWeight]
    guards: list[GuardResult]
    metrics: MetricsSection
    coverage: CoverageSection
    verdict: Verdict
