"""A comparison: the same guards, metric and verdict as a run, with a second checkpoint in place of an edit.

One model is in memory at a time; the baseline's weights are read back from disk one by one.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder, claimed
from invarlock.checkpoints.streaming import Streaming, streaming_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.results import Action, Finding
from invarlock.datasets.windows import unreadable
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.models.facts import task_of
from invarlock.models.fingerprint import Fingerprint, named_tensors
from invarlock.models.snapshot import Snapshot, Structure
from invarlock.models.state import ModelState
from invarlock.pipeline.assembly import ModelFacts, announced, assemble, finish, write
from invarlock.pipeline.attempts import Attempt, RunResult
from invarlock.pipeline.clock import Progress
from invarlock.pipeline.judging import Judge, Settle, Undo
from invarlock.pipeline.keeping import Keeper, Loaded
from invarlock.plugins.adapter import Adapter
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.inference import infer_grid
from invarlock.quantization.selection import WeightTarget, find_weights
from invarlock.reporting.report import ModuleSection

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class ChangedWeight:
    """How one weight of the subject differs from the baseline's."""

    name: str
    role: str
    change: str
    """``unchanged``, ``a grid of ...`` (an inferred scheme), ``changed``, or ``not in the baseline``."""
    parameters: int
    bits: int | None
    relative_error: float | None
    """None where there is nothing to compare with, or it is not finite."""
    device: str
    sqnr_db: None = None
    clipped_share: None = None
    non_finite_rows: int | None = None


def compare(
    config: RunConfig,
    subject: str,
    plugins: PluginManager,
    *,
    weights_only: bool = False,
    output: OutputFolder | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
) -> RunResult:
    """Judge an edit that somebody else made: ``config.model.id`` is the baseline, ``subject`` the edited checkpoint.

    Both are only read.

    :param weights_only: measure no outputs; the verdict rests on weights and single blocks.
    :param ranks: the processes that share the comparison; the first one writes.
    :returns: the report, and the subject's model.
    :raises UsageError: for a mistake in the configuration or a broken checkpoint; nothing was written.
    """
    with claimed(output, config.model.id, subject, ranks=ranks):
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        return _compare(Judge(config, plugins, slots, strict, on_progress, ranks), subject, weights_only, output)


def _compare(judge: Judge, subject: str, weights_only: bool, output: OutputFolder | None) -> RunResult:
    ready, baseline = _prepare_baseline(judge, weights_only)
    # The baseline goes before the subject comes, and a module tree has cycles that would keep it.
    gc.collect()
    model, attempt, undo = _judge_subject(judge, subject, baseline) if ready else (None, judge.not_ready(), list)
    report = _report(judge, subject, announced(judge, attempt), baseline, model)
    finish(report, judge.plugins, judge.ranks)
    judge.confirm(undo)
    if output is not None and judge.ranks.is_first:
        write(report, output, judge.clock)
    judge.ranks.gather(None)
    return RunResult(report, model, attempt.verdict)


@dataclass(frozen=True)
class _Baseline:
    """What is left of the baseline once its model has gone."""

    fingerprint: str
    weights: Mapping[str, torch.Tensor]
    vocabulary: Mapping[str, int] | None
    streamed: bool


def _prepare_baseline(judge: Judge, weights_only: bool) -> tuple[bool, _Baseline]:
    if not weights_only:
        judge.documents()
    model, adapter = load(judge, judge.config.model.id, on_disk=weights_only)
    judge.begin(model, adapter, wants_tokenizer=True, reads_text=False if weights_only else None)
    if weights_only:
        judge.windows = None
    else:
        judge.make_windows(model)
    streaming = streaming_of(model)
    weights: Mapping[str, torch.Tensor]
    undo: Undo
    settle: Settle
    if streaming:
        weights = MappingProxyType(streaming)
        undo, settle = _streamed_undo(model, streaming)
    else:
        with judge.clock.stage("snapshot"):
            snapshot = Snapshot(model)
        weights, loaded = snapshot.parameters(), Loaded.of(model, judge.clock)
        undo, settle = Keeper(adapter, loaded, snapshot).undo, loaded.settle
    judge.measure_baseline(model, undo, settle)
    ready = judge.prepare(model, undo)
    vocabulary = judge.tokenizer.get_vocab() if judge.tokenizer is not None else None
    return ready, _Baseline(_fingerprint(model), weights, vocabulary, streamed=streaming is not None)


def load(judge: Judge, model_id: str, *, on_disk: bool) -> tuple[torch.nn.Module, Adapter]:
    """Load a checkpoint, leaving its weights on disk if that is wanted and can be."""
    if on_disk:
        try:
            return judge.load(model_id, stream=True)
        except UsageError as error:
            log.info("%s; loading the whole model", one_line(error))
    return judge.load(model_id)


def _fingerprint(model: torch.nn.Module) -> str:
    streaming = streaming_of(model)
    return streaming.checkpoint.fingerprint() if streaming else Fingerprint.of(model).digest


def _judge_subject(judge: Judge, subject: str, baseline: _Baseline) -> tuple[torch.nn.Module, Attempt, Undo]:
    model, adapter = load(judge, subject, on_disk=judge.windows is None)
    undo, settle = _subject_undo(judge, model, subject)
    changes = list(changed_weights(model, baseline.weights, judge.on_progress))
    findings = _tokenizer_findings(adapter, subject, judge.trust, baseline.vocabulary)
    if reason := unreadable_windows(judge, model):
        judge.windows = None
        findings.append(Finding("primary metric", Action.ABORT, f"not measured, {reason}"))
    edit = {
        "name": "compare",
        "plan": {"subject": subject},
        "modules": [dataclasses.asdict(change) for change in changes],
    }
    attempt = judge.judge(
        model,
        edit,
        undo,
        settle=settle,
        modules=changes,
        baseline_weights=baseline.weights,
        findings=findings,
    )
    return model, attempt, undo


def _streamed_undo(model: torch.nn.Module, streaming: Streaming) -> tuple[Undo, Settle]:
    state = ModelState.of(model)

    def settle() -> None:
        state.settle()
        streaming.settle(model)

    return lambda: [*state.undo(), *streaming.undo(model)], settle


def _subject_undo(judge: Judge, model: torch.nn.Module, subject: str) -> tuple[Undo, Settle]:
    """Functions that undo a guard's changes of the subject, whose files can be read again, and spare its own."""
    streaming = streaming_of(model)
    if streaming:
        return _streamed_undo(model, streaming)
    loaded, structures = Loaded.of(model, judge.clock), [Structure.of(module) for module in model.modules()]

    def read_again() -> None:
        for structure in structures:
            structure.restore()
        fresh, _ = judge.load(subject)
        kept = dict(named_tensors(fresh))
        for name, tensor in named_tensors(model):
            tensor.data = kept[name].data

    return partial(loaded.undo, read_again), loaded.settle


def unreadable_windows(judge: Judge, model: torch.nn.Module) -> str | None:
    """Why the subject cannot be run over the baseline's windows, or None."""
    if judge.windows is None:
        return None
    if (task := task_of(model)) != judge.task:
        return f"the subject is a {task} model and the baseline a {judge.task} one"
    return next(filter(None, (unreadable(windows, model) for windows in judge.windows)), None)


def changed_weights(
    model: torch.nn.Module, before: Mapping[str, torch.Tensor], on_progress: Progress
) -> Iterator[ChangedWeight]:
    """Each weight of the subject against the baseline's, read from disk for the comparison and let go."""
    targets = find_weights(model)
    for done, target in enumerate(targets, start=1):
        yield _change(target, before)
        on_progress("changes", done, len(targets))


@torch.no_grad()
def _change(target: WeightTarget, before: Mapping[str, torch.Tensor]) -> ChangedWeight:
    weight = target.parameter.detach()
    changed = partial(
        ChangedWeight,
        name=target.name,
        role=target.role.value,
        parameters=weight.numel(),
        device=str(weight.device),
    )
    old = before.get(target.parameter_name)
    if old is None or old.shape != weight.shape:
        return changed(change="not in the baseline", bits=None, relative_error=None)
    old = old.to(weight.device)
    if torch.equal(old.float(), weight.float()):
        return changed(change="unchanged", bits=None, relative_error=0.0)
    difference = torch.linalg.vector_norm(weight.float() - old.float(), dtype=torch.float64)
    quotient = float(difference / torch.linalg.vector_norm(old.float(), dtype=torch.float64).clamp(min=1e-300))
    error = quotient if math.isfinite(quotient) else None
    grid = infer_grid(weight, target.layout)
    if grid is not None and infer_grid(old, target.layout) != grid:
        return changed(change=str(grid), bits=grid.bits, relative_error=error)
    return changed(change="changed", bits=None, relative_error=error)


def _tokenizer_findings(
    adapter: Adapter, subject: str, trust: Mapping[str, Any], vocabulary: Mapping[str, int] | None
) -> list[Finding]:
    """The baseline's tokenizer is used for both; a subject with another one is said."""
    try:
        other = adapter.load_tokenizer(subject, **trust).get_vocab()
    except UsageError as error:
        return (
            []
            if vocabulary is None
            else [Finding("tokenizer", Action.WARN, f"the subject has none: {one_line(error)}")]
        )
    if vocabulary is None or other == vocabulary:
        return []
    differing = len(other.items() ^ vocabulary.items())
    message = f"the subject's vocabulary differs in {differing} entries; the baseline's was used for both"
    return [Finding("tokenizer", Action.WARN, message)]


def _report(
    judge: Judge, subject: str, attempt: Attempt, baseline: _Baseline, model: torch.nn.Module | None
) -> dict[str, Any]:
    facts = ModelFacts(
        before=baseline.fingerprint,
        after=_fingerprint(model) if model is not None else baseline.fingerprint,
        restored=None,
        streamed=baseline.streamed,
        devices=sorted({str(parameter.device) for parameter in model.parameters()}) if model is not None else [],
    )
    plan = {"subject": subject, "families": families(attempt.modules)}
    return assemble(judge, [attempt], facts, edit_name="compare", plan=plan)


def families(changes: Iterable[ChangedWeight | ModuleSection]) -> list[dict[str, Any]]:
    """What was changed, summed by family: how many weights of each were changed in which way.

    A family is the same weight of every layer: a name with its numbers left out.
    """
    counts: dict[str, dict[str, int]] = {}
    for change in changes:
        family = counts.setdefault(re.sub(r"\d+", "*", change.name), {})
        family[change.change] = family.get(change.change, 0) + 1
    return [{"family": family, "changes": changes_of_it} for family, changes_of_it in counts.items()]
