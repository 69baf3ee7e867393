"""The report of a run: the one model from which every rendering is made.

``report-v1.schema.json`` beside this module is its JSON Schema. What was not measured is null, never a number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Final, Literal

from invarlock.core.plain import OWN, Reader, plain
from invarlock.core.sections import ReportSection
from invarlock.core.text import HARMFUL

FORMAT_VERSION: Final = "report-v1"

Actions = Literal["continue", "warn", "rollback", "abort"]
Number = float | Literal["nan", "inf", "-inf"]
"""JSON has no number that is not finite."""


@dataclass
class ModelSection:
    id: str
    adapter: str
    devices: list[str]
    description: dict[str, Any]
    fingerprint_before: str
    """Of the baseline: a digest of every tensor's name, dtype, shape and bytes, and of what is tied."""
    fingerprint_after: str
    """Of the model as the run left it; after a rollback or an abort it equals the one before."""
    restored: bool | None
    """Whether the baseline came back bit for bit; null when the edit was kept."""
    streamed: bool
    """Whether weights stayed on disk; the fingerprints are then of paths, sizes, times and inodes of their files."""


@dataclass
class ModuleSection:
    name: str
    role: str
    change: str
    """``quantized``; of a comparison ``unchanged``, ``changed`` or the inferred grid."""
    bits: int | None
    parameters: int
    relative_error: float | None
    """Frobenius norm of the change over that of the weight."""
    sqnr_db: float | None
    """Signal to quantization noise, decibels."""
    clipped_share: float | None
    """Share of the weights that the quantile clip changed."""
    non_finite_rows: int | None
    """Rows with NaN or Inf; they were left as they are."""
    device: str


@dataclass
class EditSection:
    name: str
    plan: dict[str, Any]
    modules: list[ModuleSection]
    params_changed: int
    """Parameters of the quantized weights."""


@dataclass
class GuardSection:
    name: str
    origin: Literal["builtin", "plugin", "local"]
    version: str | None
    passed: bool | None
    action: Actions
    message: str
    warnings: list[str]
    metrics: dict[str, Any]
    prepare: dict[str, Any]
    seconds: float
    error: str | None


@dataclass
class MetricSection:
    kind: Literal["perplexity", "masked_perplexity", "target_perplexity"]
    baseline: Number | None
    edited: Number | None
    ratio: Number | None
    ci: tuple[Number, Number] | None
    ci_level: float
    windows: int
    tokens: int
    limit: float
    action: Actions
    message: str


@dataclass
class DivergenceSection:
    """The edited model's predictions against the baseline's, token by token; divergences are lower bounds, in nats."""

    kl_mean: float | None
    kl_p95: float | None
    kl_p99: float | None
    window_p95: float | None
    """95th percentile over windows of the rise of the loss, nats a token."""
    flips: float | None
    """Share of the tokens whose likeliest prediction is another one."""
    broken: float | None
    """Share of the tokens whose divergence is above log 2."""
    margin_baseline: float | None
    margin_loss: float | None
    limits: dict[str, float] | None
    action: Actions
    message: str


@dataclass
class WindowsSection:
    """Of each window that decides the primary metric: what the figures are computed from."""

    tokens: list[int]
    """Scored tokens."""
    baseline: list[Number]
    """Sum of the log loss over them, nats."""
    edited: list[Number]


@dataclass
class MetricsSection:
    primary: MetricSection | None
    predictions: DivergenceSection | None
    windows: WindowsSection | None


@dataclass
class SuspectSection:
    module: str
    score: float
    """Reciprocal rank over all guards that suspect it."""
    evidence: list[str]


@dataclass
class FindingSection:
    """One voice in the verdict."""

    source: str
    action: Actions
    message: str
    failed: bool
    """Whether the source itself failed, so that its word cannot be relied on."""


@dataclass
class VerdictSection:
    action: Actions
    accepted: bool
    decided_by: str
    rests_on: str
    """What was measured: windows of text, windows that the baseline wrote, or weights alone."""
    strict: bool
    """Whether a warning, though accepted, ends the process with exit code 1."""
    findings: list[FindingSection]
    """What was folded, guards first."""
    reasons: list[str]
    suspects: list[SuspectSection]
    """Of a rejection: the modules most likely responsible, best first."""
    exit_code: int


@dataclass
class AttemptSection:
    attempt: int
    bitwidth: int | None
    action: Actions
    decided_by: str
    ratio: Number | None


@dataclass
class Report:
    invarlock_version: str
    created: str
    config: dict[str, Any]
    config_sha256: str
    model: ModelSection
    edit: EditSection
    guards: list[GuardSection]
    metrics: MetricsSection
    verdict: VerdictSection
    attempts: list[AttemptSection]
    timings: dict[str, float]
    """Seconds a stage."""
    environment: dict[str, Any]
    artifacts: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was saved beside the report."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What plugins add in ``invarlock_run_finished``."""
    sections: list[ReportSection] = field(default_factory=list)
    """What plugins add in ``invarlock_report_sections``."""
    format_version: Literal["report-v1"] = FORMAT_VERSION

    def as_dict(self) -> dict[str, Any]:
        """The report as ``report.json`` holds it: only what JSON can hold, the format version first."""
        values: dict[str, Any] = plain(self, OWN)
        return {"format_version": values.pop("format_version"), **values}


def to_json(report: Mapping[str, Any]) -> str:
    """
    :raises ValueError: it is nested too deep, or holds what JSON cannot.
    """
    values, _ = Reader.strict("report", report, OWN)
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    # They stand inside of texts alone; printed as they are, a terminal would obey them.
    return HARMFUL.sub(_as_escape, text) + "\n"


def _as_escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of ``report.json``, as shipped in the package."""
    text = (resources.files(__package__) / "report-v1.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def make_json_schema() -> dict[str, Any]:
    """The schema made anew from the data classes; a test holds the shipped one against it."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Report).json_schema()
    schema["required"] = list(schema["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": FORMAT_VERSION, **schema}
