"""One attempt of an edit, and what comes of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from invarlock.core.results import GuardResult, Verdict
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.results import DivergenceResult, MetricResult


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
class Attempt:
    """One edit and what was said of it; ``modules`` is what the edit did to each weight."""

    number: int
    bitwidth: int | None
    modules: Sequence[Any]
    results: list[GuardResult]
    metric: MetricResult | None
    divergence: DivergenceResult | None
    edited_pass: PassResult | None
    verdict: Verdict
