"""The report of a run: it holds the results, and every rendering is made from it.

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
from invarlock.core.results import Action, EditedWeight, Finding, GuardResult, Verdict
from invarlock.core.sections import ReportSection
from invarlock.core.storage import Storage
from invarlock.core.text import HARMFUL
from invarlock.evaluation.results import (
    DivergenceResult,
    FigureResult,
    Look,
    MetricResult,
    NoiseResult,
    Number,
    Undecided,
)

FORMAT_VERSION: Final = "report-v1"

COMPARE: Final = "compare"
"""The name of an edit that somebody else made."""


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
    """True where the baseline came back bit for bit; null when the edit was kept."""
    streamed: bool
    """True where weights stayed on disk; the fingerprints are then of paths, sizes, times and inodes of their files."""
    own_code: list[str] = field(default_factory=list)
    """Files beside the weights, of the baseline or the subject, whose code ran (``model.trust_remote_code``)."""


@dataclass
class EditSection:
    name: str
    plan: dict[str, Any]
    modules: list[EditedWeight]
    params_changed: int
    """Parameters of the quantized weights."""

    @property
    def is_comparison(self) -> bool:
        return self.name == COMPARE


@dataclass
class WindowsSection:
    """Of each window that decides the primary metric: what the figures are computed from."""

    tokens: list[int]
    """Scored tokens, or samples that were compared."""
    baseline: list[Number]
    """Sum of the log loss over them, nats; of samples, of their distances from the baseline: 0."""
    edited: list[Number]
    bytes: list[int] | None = None
    """Bytes of text (UTF-8), where two tokenizers split it differently: the losses are of that text, and are compared
    per byte; ``tokens`` are those that the baseline's tokenizer makes of it."""
    documents: list[int] | None = None
    """Number of the document that each is of, where these are the units of a confidence sequence."""


@dataclass
class MetricsSection:
    primary: MetricResult | None
    predictions: DivergenceResult | None
    windows: WindowsSection | None
    figures: list[FigureResult] = field(default_factory=list)
    """Of tasks that compare more than the primary metric and the predictions of tokens."""
    path: list[Look] = field(default_factory=list)
    """Of windows that were measured until the limits were certain: each look on the way."""
    noise: NoiseResult | None = None
    """The noise floor, where a reference holds it."""

    @property
    def undecided(self) -> Undecided | None:
        """The limit that was not told from its figure: the primary metric's, or else the predictions'."""
        voices = (self.primary, self.predictions)
        return next((voice.undecided for voice in voices if voice and voice.undecided), None)

    @property
    def findings(self) -> list[Finding]:
        """The voices of the outputs in the verdict, where they were measured."""
        found, primary, predictions = [], self.primary, self.predictions
        if primary:
            uncertain = primary.undecided is not None
            found.append(Finding("primary metric", primary.action, primary.message, inconclusive=uncertain))
        if predictions:
            message, uncertain = predictions.message, predictions.undecided is not None
            found.append(Finding("predictions", predictions.action, message, inconclusive=uncertain))
        return found + [Finding(each.name, each.action, each.message) for each in self.figures]


@dataclass(frozen=True)
class TokensSeen:
    """Tokens of a kind that occur in the windows."""

    kind: Literal["ordinary", "special"]
    seen: int
    known: int

    @property
    def share(self) -> float | None:
        # A report that is read may lack either.
        return self.seen / self.known if self.known and self.seen is not None else None


@dataclass(frozen=True)
class Gap:
    """A part of the model that the windows did not exercise."""

    part: str
    action: Action
    """``warn`` where the edit touches it, so that it is a finding of the verdict, else ``continue``."""
    message: str
    remedy: str
    """The windows, the option or the evaluation that would exercise it."""

    @property
    def sentence(self) -> str:
        return f"{self.message}; {self.remedy}"


@dataclass(frozen=True)
class CoverageSection:
    """Parts of the model that the windows exercised; empty where no outputs were measured."""

    tokens: list[TokensSeen] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    conversations: int = 0
    """Windows, of preview and final ones together, that the chat template rendered."""
    images: int = 0
    """Windows, of both together, that have an image, where others are text alone."""

    @property
    def findings(self) -> list[Finding]:
        """Voices of the gaps that the edit touches."""
        return [Finding("coverage", gap.action, gap.sentence) for gap in self.gaps if gap.action is not Action.CONTINUE]


@dataclass(frozen=True)
class NextStep:
    """A step to take after a rejection or a warning."""

    option: str
    """Ready to paste: options to add to the command, or a command; empty where none takes the step."""
    reason: str


@dataclass(frozen=True)
class ReferenceSection:
    """The reference that the run was given in place of the baseline's pass."""

    folder: str
    digest: str
    """SHA-256 of its file SHA256SUMS."""
    created: str
    pass_again: str = ""
    """The reason that the baseline's pass was run all the same; empty where it was not."""


@dataclass
class StorageSection:
    """Weights on disk, before and after the edit; null where that cannot be told, or where nothing was saved."""

    before: Storage | None = None
    after: Storage | None = None


@dataclass
class AttemptSection:
    attempt: int
    bitwidth: int | None
    """Null where the plan is a list of rules."""
    action: Action
    decided_by: str
    ratio: Number | None
    figure: Number | None = None
    """Of the primary metric, whatever it is; equal to ``ratio`` where that is one of perplexities."""
    plan: dict[str, Any] | None = None
    """As ``edit.plan`` of the report, which is that of the last attempt; null of a comparison."""
    bits_per_weight: float | None = None
    """Of the weights that the first plan rounds, scales of 16 bits included; what a later plan leaves alone has those
    that it is stored in."""
    seconds: float | None = None
    """For the edit and its judgement."""

    @property
    def metric(self) -> Number | None:
        """The figure; earlier builds wrote the ratio alone."""
        return self.ratio if self.figure is None else self.figure


@dataclass(frozen=True)
class ModuleRise:
    """The part of a changed weight in the rise of the loss, nats per token; null stands for what was not measured."""

    module: str
    predicted: Number | None
    """By the gradients of the baseline and the change of the weight."""
    share: Number | None
    """Of the sum of all predicted parts."""
    measured: Number | None = None
    """The part of the rise that goes if this weight alone is put back."""
    noise: Number | None = None
    """The rise from a random change of the same norm in its place."""


@dataclass(frozen=True)
class AttributionSection:
    """The rise of the loss on the final windows, weight by weight."""

    rise: Number | None
    """Measured with all weights edited, nats per token; null where the model gives tokens no finite loss."""
    predicted: Number | None
    """The sum of all predicted parts."""
    additivity: Number | None
    """The measured parts, one by one, over that of the same weights put back together."""
    modules: list[ModuleRise]
    """The largest contributions first."""
    not_predicted: str = ""
    """The reason that no part is predicted; empty where they are."""


@dataclass(frozen=True)
class SearchPoint:
    """A plan of a search that was judged."""

    bits_per_weight: float
    """Of the weights that are searched, scales included."""
    bytes: int
    """Of those weights, with their scales."""
    predicted: float
    """The ratio of perplexities that the sensitivities predict."""
    ratio: Number | None
    """As it was measured on the final windows."""
    ci: tuple[Number, Number] | None
    action: Action
    plan: list[dict[str, Any]]
    """As ``edit.plan`` of a configuration takes it."""


@dataclass(frozen=True)
class SearchSection:
    """A search for the bits of each weight; the attempts of the report are those since it was last begun."""

    target: str
    decisions: int
    """Weights, or sets of weights that engines fuse, which are given a scheme each."""
    points: list[SearchPoint]
    """The smallest first; the windows that they were measured on are the same."""
    sensitivities: str = "gradients"
    """That predict the rise of the loss: "gradients", or "relative errors" with a factor for each family of weights."""
    no_gradients: str = ""
    """The reason for relative errors."""
    preview_passes: int | None = None
    """Forward passes over the preview windows, those that are run backwards as well aside; null of earlier versions."""


@dataclass
class Report:
    invarlock_version: str
    created: str
    config: dict[str, Any]
    config_sha256: str
    model: ModelSection
    edit: EditSection
    guards: list[GuardResult]
    metrics: MetricsSection
    verdict: Verdict
    attempts: list[AttemptSection]
    timings: dict[str, float]
    """Seconds a stage."""
    environment: dict[str, Any]
    artifacts: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was saved beside the report."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Additions of plugins in ``invarlock_run_finished``."""
    coverage: CoverageSection = field(default_factory=CoverageSection)
    storage: StorageSection = field(default_factory=StorageSection)
    sections: list[ReportSection] = field(default_factory=list)
    """Sections of plugins, of ``invarlock_report_sections``."""
    attribution: AttributionSection | None = None
    """Null where no weight was changed."""
    search: SearchSection | None = None
    """Null where the bits were given."""
    what_next: list[NextStep] = field(default_factory=list)
    """At most three, of a rejection or a warning."""
    reference: ReferenceSection | None = None
    """Null where the baseline's pass was run."""
    command: str = ""
    """The command line that asked for the report; empty where a program did."""
    format_version: Literal["report-v1"] = FORMAT_VERSION

    def as_dict(self) -> dict[str, Any]:
        """The report as ``report.json`` holds it: only what JSON can hold, the format version first."""
        values: dict[str, Any] = plain(self, OWN)
        return {"format_version": values.pop("format_version"), **values}


def to_json(report: Mapping[str, Any]) -> str:
    """:raises ValueError: it is nested too deep, or holds what JSON cannot."""
    values, _ = Reader.strict("report", report, OWN)
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    # They stand inside of texts alone; printed as they are, a terminal would obey them.
    return re.sub(HARMFUL, lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


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
    for result in map(
        schema["$defs"].get, ("EditedWeight", "GuardResult", "Finding", "Verdict", "MetricResult", "WindowsSection")
    ):
        # Results have defaults; what is written has every key.
        result["required"] = list(result["properties"])
        for each in result["properties"].values():
            each.pop("default", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": FORMAT_VERSION, **schema}
