"""Attempts of an edit: an edit is applied, judged, and undone unless it is accepted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from invarlock.core.results import EditedWeight, Finding, GuardResult, Verdict
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.results import DivergenceResult, MetricResult
from invarlock.pipeline.keeping import Watched


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
    description: Mapping[str, Any]
    """The edit as guards see it: its name, its plan, and what it did to each weight."""
    modules: Sequence[EditedWeight] = ()
    """Its effect on each weight, as the report has it."""
    bitwidth: int | None = None
    baseline_weights: Mapping[str, torch.Tensor] | None = None
    """The baseline's parameters by name, read from disk one at a time."""
    findings: Sequence[Finding] = ()
    """Findings of the edit itself, besides those of guards and outputs."""
    unreadable: bool = False
    """Whether the model cannot be run over the baseline's windows."""


class Edit(Protocol):
    """A way to an edited model: rounding in memory, rounding while streaming, or another checkpoint."""

    attempts: int
    """How many there are at most."""

    def apply(self, number: int) -> Edited:
        """Make the attempt of this number, from 1, out of the baseline."""

    def undo(self) -> Watched:
        """Take back an attempt that was not accepted; returns the model that is left."""


@dataclass(frozen=True)
class Attempt:
    """One edit and what was said of it; ``modules`` is what the edit did to each weight."""

    number: int
    bitwidth: int | None
    modules: Sequence[EditedWeight]
    results: list[GuardResult]
    metric: MetricResult | None
    divergence: DivergenceResult | None
    edited_pass: PassResult | None
    verdict: Verdict
