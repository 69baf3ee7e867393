"""The report of a judgement, put together and written."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from invarlock import __version__
from invarlock.checkpoints.checksums import digests
from invarlock.checkpoints.output_folder import OutputFolder, unwritable_said, write_text
from invarlock.checkpoints.shard_writer import ShardedOutput
from invarlock.config.schema import RunConfig
from invarlock.core.errors import InvarlockError, one_line
from invarlock.core.plain import OWN, plain
from invarlock.core.results import GuardResult
from invarlock.distributed.process_group import Ranks
from invarlock.evaluation.divergence import DivergenceResult
from invarlock.evaluation.metric import MetricResult
from invarlock.evaluation.passes import PassResult
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.judging import Judge
from invarlock.pipeline.suspects import blame
from invarlock.plugins.manager import PluginManager
from invarlock.reporting import report as reporting
from invarlock.reporting.rendering import render_html

WEIGHTS_ALONE = "weights alone, no outputs were measured"

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class ModelFacts:
    """What became of the model: fingerprints, and whether the baseline came back (None when the edit was kept)."""

    before: str
    after: str
    restored: bool | None
    streamed: bool
    devices: list[str]


def announced(judge: Judge, attempt: Attempt) -> Attempt:
    """Tell plugins of an attempt whose verdict is folded, in the first process; hands it on.

    :raises PluginError: a plugin failed.
    """
    tell = judge.plugins.attempt_finished
    judge.ranks.from_first(lambda: tell(attempt.number, _attempt_report(judge, attempt)))
    return attempt


def _attempt_report(judge: Judge, attempt: Attempt) -> dict[str, Any]:
    """The sections of the report that an attempt has by itself, as ``report.json`` would hold them."""
    sections: dict[str, Any] = {
        "bitwidth": attempt.bitwidth,
        "modules": [dataclasses.asdict(_module_section(module)) for module in attempt.modules],
        "guards": [dataclasses.asdict(section) for section in _guard_sections(judge, attempt)],
        "metrics": dataclasses.asdict(_metrics_section(judge, attempt)),
        "verdict": dataclasses.asdict(_verdict_section(judge, attempt)),
    }
    plain_sections: dict[str, Any] = plain(sections, OWN)
    return plain_sections


def assemble(
    judge: Judge, attempts: Sequence[Attempt], facts: ModelFacts, *, edit_name: str, plan: Mapping[str, Any]
) -> dict[str, Any]:
    """The report as ``report.json`` holds it; the last attempt is the one that stands."""
    last, config = attempts[-1], judge.config.as_dict()
    return reporting.Report(
        invarlock_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config,
        config_sha256=config_digest(config),
        model=reporting.ModelSection(
            id=judge.config.model.id,
            adapter=judge.adapter.name,
            devices=facts.devices,
            description=judge.description,
            fingerprint_before=facts.before,
            fingerprint_after=facts.after,
            restored=facts.restored,
            streamed=facts.streamed,
        ),
        edit=reporting.EditSection(
            name=edit_name,
            plan=dict(plan),
            modules=[_module_section(module) for module in last.modules],
            params_changed=sum(module.parameters for module in last.modules if module.change != "unchanged"),
        ),
        guards=_guard_sections(judge, last),
        metrics=_metrics_section(judge, last),
        verdict=_verdict_section(judge, last),
        attempts=[_attempt_section(attempt) for attempt in attempts],
        timings={stage: round(seconds, 4) for stage, seconds in judge.clock.stages.items()},
        environment=_environment(),
    ).as_dict()


def finish(report: dict[str, Any], plugins: PluginManager, ranks: Ranks) -> None:
    """Let plugins look at the report and add to it, in the first process.

    :raises PluginError: one of them failed.
    """

    def add() -> None:
        report["extra"] |= plugins.run_finished(report)
        report["sections"] = [dataclasses.asdict(section) for section in plugins.report_sections(report)]

    ranks.from_first(add)


def write(
    report: dict[str, Any],
    output: OutputFolder,
    clock: Clock,
    save: Callable[..., None] | None = None,
    *,
    shards: ShardedOutput | None = None,
) -> None:
    """Write the model, if there is one to save, the report, as JSON and as HTML, and the signature.

    All is put to the side and takes its place when it is whole, and what is there by then goes only then.

    :param save: writes an accepted model, or what it lacks yet, to a folder, given that and the report.
    :param shards: the weights, if they are written already.
    :raises UsageError: something could not be written; then everything is as it was.
    :raises InvarlockError: it could not be signed; then the rest is saved.
    """
    with unwritable_said(output.path), output.replaced() as new:
        if save is not None:
            with shards.completed(new / "model") if shards else _new_folder(new / "model") as folder:
                with clock.stage("save"):
                    save(folder, report=report)
                with clock.stage("digests"):
                    report["artifacts"] |= digests(folder, "model")
                write_text(folder / "report.json", reporting.to_json(report))
        write_text(new / "report.json", reporting.to_json(report))
        if page := _drawn(report, output):
            _write_page(page, new)
        unsigned = _sign(output, new)
    if unsigned:
        raise unsigned


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    path.mkdir()
    yield path


def _sign(output: OutputFolder, folder: Path) -> InvarlockError | None:
    try:
        if output.sign:
            output.sign(folder)
    except InvarlockError as error:
        return error
    return None


def _drawn(report: dict[str, Any], output: OutputFolder) -> str | None:
    try:
        return render_html(report, output.path)
    except Exception as error:
        _without_page(error)
        return None


def _write_page(page: str, folder: Path) -> None:
    try:
        write_text(folder / "report.html", page)
    except OSError as error:
        _without_page(error)


def _without_page(error: Exception) -> None:
    log.warning("report.html could not be written: %s; report.json is whole", one_line(error))
    log.debug("report.html", exc_info=True)


def _module_section(module: Any) -> reporting.ModuleSection:
    return reporting.ModuleSection(
        **{entry.name: getattr(module, entry.name) for entry in dataclasses.fields(reporting.ModuleSection)}
    )


def _guard_sections(judge: Judge, attempt: Attempt) -> list[reporting.GuardSection]:
    return [_guard_section(judge, place, result) for place, result in enumerate(attempt.results)]


def _guard_section(judge: Judge, place: int, result: GuardResult) -> reporting.GuardSection:
    plugin = judge.slots[place].plugin
    return reporting.GuardSection(
        name=result.name,
        origin=plugin.origin.value,
        version=plugin.version,
        passed=result.passed,
        action=result.action.value,
        message=result.message,
        warnings=list(result.warnings),
        metrics=dict(result.metrics),
        prepare=dict(judge.prepared[place].returned),
        seconds=round(judge.clock.guards[place], 4),
        error=result.error,
    )


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration as the report holds it, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _metrics_section(judge: Judge, attempt: Attempt) -> reporting.MetricsSection:
    metric, divergence = attempt.metric, attempt.divergence
    return reporting.MetricsSection(
        primary=metric_section(metric, judge.config.eval.metric.ci_level) if metric else None,
        predictions=divergence_section(divergence) if divergence else None,
        windows=_windows_section(judge.baseline_pass, attempt.edited_pass),
    )


def metric_section(metric: MetricResult, level: float) -> reporting.MetricSection:
    """:param level: of the interval's confidence."""
    values = {entry.name: getattr(metric, entry.name) for entry in dataclasses.fields(metric)}
    return reporting.MetricSection(**{**values, "action": metric.action.value, "ci_level": level})


def divergence_section(divergence: DivergenceResult) -> reporting.DivergenceSection:
    values = {entry.name: getattr(divergence, entry.name) for entry in dataclasses.fields(divergence)}
    limits = dataclasses.asdict(divergence.limits) if divergence.limits else None
    return reporting.DivergenceSection(**{**values, "action": divergence.action.value, "limits": limits})


def _windows_section(baseline: PassResult | None, edited: PassResult | None) -> reporting.WindowsSection | None:
    if baseline is None or edited is None:
        return None
    return reporting.WindowsSection(baseline.tokens.tolist(), baseline.losses.tolist(), edited.losses.tolist())


def _verdict_section(judge: Judge, attempt: Attempt) -> reporting.VerdictSection:
    verdict = attempt.verdict
    return reporting.VerdictSection(
        action=verdict.action.value,
        accepted=verdict.accepted,
        decided_by=verdict.decided_by,
        rests_on=rests_on(judge.config) if judge.windows else WEIGHTS_ALONE,
        strict=judge.strict,
        findings=[reporting.FindingSection(**dataclasses.asdict(finding)) for finding in verdict.findings],
        reasons=list(verdict.reasons),
        suspects=[] if verdict.accepted else blame(attempt.results),
        exit_code=int(verdict.exit_code),
    )


def rests_on(config: RunConfig) -> str:
    """What was measured, where outputs were."""
    dataset = config.dataset
    source = "windows that the baseline wrote" if dataset.is_generated else "windows of text"
    return f"{dataset.preview_n} + {dataset.final_n} {source}"


def _attempt_section(attempt: Attempt) -> reporting.AttemptSection:
    return reporting.AttemptSection(
        attempt=attempt.number,
        bitwidth=attempt.bitwidth,
        action=attempt.verdict.action.value,
        decided_by=attempt.verdict.decided_by,
        ratio=attempt.metric.ratio if attempt.metric else None,
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
