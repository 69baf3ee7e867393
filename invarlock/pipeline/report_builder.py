"""The report builder: results of a judgement put into one report."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from invarlock import __version__
from invarlock.config.schema import RunConfig
from invarlock.core.plain import OWN, plain
from invarlock.core.results import GuardResult, Verdict
from invarlock.distributed.process_group import Ranks
from invarlock.evaluation.passes import PassResult
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.suspects import blame
from invarlock.plugins.manager import PluginManager
from invarlock.reporting.report import (
    AttemptSection,
    EditSection,
    MetricsSection,
    ModelSection,
    Report,
    WindowsSection,
)

WEIGHTS_ALONE = "weights alone, no outputs were measured"


@dataclass(frozen=True)
class ModelFacts:
    """Fate of the model: fingerprints, and whether the baseline came back (None when the edit was kept)."""

    before: str
    after: str
    restored: bool | None
    streamed: bool
    devices: list[str]


def announced(guarding: Guarding, attempt: Attempt) -> Attempt:
    """Tell plugins of an attempt whose verdict is folded, in the first process; hands it on.

    :raises PluginError: a plugin failed.
    """
    tell = guarding.session.plugins.attempt_finished
    guarding.session.ranks.from_first(lambda: tell(attempt.number, _attempt_report(guarding, attempt)))
    return attempt


def _attempt_report(guarding: Guarding, attempt: Attempt) -> dict[str, Any]:
    """The parts of the report that an attempt has by itself, as ``report.json`` would hold them."""
    parts: dict[str, Any] = plain(
        {
            "bitwidth": attempt.bitwidth,
            "modules": attempt.modules,
            "guards": _guards(guarding, attempt),
            "metrics": _metrics(guarding, attempt),
            "verdict": _verdict(guarding, attempt),
        },
        OWN,
    )
    return parts


def assemble(
    guarding: Guarding, attempts: Sequence[Attempt], facts: ModelFacts, *, edit_name: str, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """The report as ``report.json`` holds it; the last attempt is the one that stands."""
    last, config = attempts[-1], guarding.config.as_dict()
    weights = list(last.modules)
    return Report(
        invarlock_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config,
        config_sha256=config_digest(config),
        model=ModelSection(
            id=guarding.config.model.id,
            adapter=guarding.baseline.adapter.name,
            devices=facts.devices,
            description=dict(guarding.baseline.description),
            fingerprint_before=facts.before,
            fingerprint_after=facts.after,
            restored=facts.restored,
            streamed=facts.streamed,
        ),
        edit=EditSection(edit_name, dict(plan), weights, sum(each.parameters for each in weights if each.is_changed)),
        guards=_guards(guarding, last),
        metrics=_metrics(guarding, last),
        verdict=_verdict(guarding, last),
        attempts=[_summary(attempt) for attempt in attempts],
        timings={stage: round(seconds, 4) for stage, seconds in guarding.session.clock.stages.items()},
        environment=_environment(),
    ).as_dict()


def finish(report: dict[str, Any], plugins: PluginManager, ranks: Ranks) -> None:
    """Let plugins look at the report and add to it, in the first process.

    :raises PluginError: one of them failed.
    """

    def add() -> None:
        report["extra"] |= plugins.run_finished(report)
        report["sections"] = [asdict(section) for section in plugins.report_sections(report)]

    ranks.from_first(add)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration as the report holds it, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def rests_on(config: RunConfig) -> str:
    """Outputs that the verdict rests on, where any were measured."""
    dataset = config.dataset
    source = "windows that the baseline wrote" if dataset.is_generated else "windows of text"
    return f"{dataset.preview_n} + {dataset.final_n} {source}"


def _guards(guarding: Guarding, attempt: Attempt) -> list[GuardResult]:
    return [_with_origin(guarding, place, result) for place, result in enumerate(attempt.results)]


def _with_origin(guarding: Guarding, place: int, result: GuardResult) -> GuardResult:
    plugin = guarding.slots[place].plugin
    return replace(
        result,
        origin=plugin.origin.value,
        version=plugin.version,
        prepare=guarding.prepared[place].returned,
        seconds=round(guarding.session.clock.guards[place], 4),
    )


def _metrics(guarding: Guarding, attempt: Attempt) -> MetricsSection:
    windows = _windows(guarding.baseline_pass, attempt.edited_pass)
    return MetricsSection(attempt.metric, attempt.divergence, windows)


def _windows(baseline: PassResult | None, edited: PassResult | None) -> WindowsSection | None:
    if baseline is None or edited is None:
        return None
    return WindowsSection(baseline.tokens.tolist(), baseline.losses.tolist(), edited.losses.tolist())


def _verdict(guarding: Guarding, attempt: Attempt) -> Verdict:
    return replace(
        attempt.verdict,
        rests_on=rests_on(guarding.config) if guarding.windows else WEIGHTS_ALONE,
        suspects=() if attempt.verdict.accepted else blame(attempt.results),
    )


def _summary(attempt: Attempt) -> AttemptSection:
    verdict, metric = attempt.verdict, attempt.metric
    return AttemptSection(
        attempt.number, attempt.bitwidth, verdict.action, verdict.decided_by, metric.ratio if metric else None
    )


def _environment() -> dict[str, Any]:
    import transformers

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
