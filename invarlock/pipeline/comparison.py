"""A comparison: the same guards, metric and verdict as a run, with a second checkpoint in place of an edit.

One model is in memory at a time; the baseline's weights are read back from disk one by one.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder, claimed
from invarlock.checkpoints.streaming import streaming_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.progress import Progress, counted
from invarlock.core.results import Action, Finding
from invarlock.datasets.windows import unreadable
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.models.facts import Task, task_of
from invarlock.models.fingerprint import Fingerprint, named_tensors
from invarlock.models.snapshot import Snapshot, Structure
from invarlock.pipeline.attempts import Edited, RunResult
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import Judgement, judge
from invarlock.pipeline.keeping import Gone, Keeper, Loaded, Watched, Watching, WatchingStreamed
from invarlock.pipeline.report_builder import ModelFacts, assemble, finish
from invarlock.pipeline.session import Session, WindowPair
from invarlock.pipeline.writing import write
from invarlock.plugins.adapter import Adapter
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.grids import infer_grid
from invarlock.quantization.selection import WeightTarget, find_weights
from invarlock.reporting.report import COMPARE, EditedWeight

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
        return _compare(Session(config, plugins, on_progress, ranks), slots, strict, subject, weights_only, output)


def _compare(
    session: Session,
    slots: Sequence[GuardSlot],
    strict: bool,
    subject: str,
    weights_only: bool,
    output: OutputFolder | None,
) -> RunResult:
    guarding, ready, kept = _prepare_baseline(session, slots, strict, weights_only)
    # The baseline goes before the subject comes, and a module tree has cycles that would keep it.
    gc.collect()
    edit = _Subject(guarding, subject, kept)
    judgement = judge(guarding, edit, Gone(), ready=ready)
    report = _report(guarding, judgement, edit)
    finish(report, session.plugins, session.ranks)
    guarding.confirm(judgement.left)
    if output is not None and session.ranks.is_first:
        write(report, output, session.clock)
    session.ranks.gather(None)
    return RunResult(report, edit.model, judgement.last.verdict)


@dataclass(frozen=True)
class _Kept:
    """Facts of the baseline that stay once its model has gone."""

    fingerprint: str
    weights: Mapping[str, torch.Tensor]
    vocabulary: Mapping[str, int] | None
    streamed: bool


def _prepare_baseline(
    session: Session, slots: Sequence[GuardSlot], strict: bool, weights_only: bool
) -> tuple[Guarding, bool, _Kept]:
    if not weights_only:
        session.documents()
    model, adapter = load(session, session.config.model.id, on_disk=weights_only)
    baseline = session.open(model, adapter, wants_tokenizer=True, reads_text=False if weights_only else None)
    windows = None if weights_only else baseline.make_windows(model)
    streaming = streaming_of(model)
    weights: Mapping[str, torch.Tensor]
    watched: Watched
    if streaming:
        weights, watched = MappingProxyType(streaming), WatchingStreamed.of(model, streaming)
    else:
        with session.clock.stage("snapshot"):
            snapshot = Snapshot(model)
        weights, watched = snapshot.parameters(), Keeper(adapter, Loaded.of(model, session.clock), snapshot).baseline
    guarding = Guarding(session, baseline, windows, slots, strict)
    ready = guarding.begin(model, watched)
    vocabulary = baseline.tokenizer.get_vocab() if baseline.tokenizer is not None else None
    return guarding, ready, _Kept(_fingerprint(model), weights, vocabulary, streamed=streaming is not None)


def load(session: Session, model_id: str, *, on_disk: bool) -> tuple[torch.nn.Module, Adapter]:
    """Load a checkpoint, leaving its weights on disk if that is wanted and can be."""
    if on_disk:
        try:
            return session.load(model_id, stream=True)
        except UsageError as error:
            log.info("%s; loading the whole model", one_line(error))
    return session.load(model_id)


def _fingerprint(model: torch.nn.Module) -> str:
    streaming = streaming_of(model)
    return streaming.checkpoint.fingerprint() if streaming else Fingerprint.of(model).digest


class _Subject:
    """Another checkpoint in place of an edit: it is loaded once, and only read."""

    attempts = 1

    def __init__(self, guarding: Guarding, subject: str, kept: _Kept) -> None:
        self.subject, self.kept = subject, kept
        self.model: torch.nn.Module | None = None
        self._guarding, self._session = guarding, guarding.session
        self._watched: Watched = Gone()

    def apply(self, number: int) -> Edited:
        session = self._session
        self.model, adapter = load(session, self.subject, on_disk=self._guarding.windows is None)
        self._watched = self._watching(self.model)
        with session.clock.stage("changes"):
            changes = changed_weights(self.model, self.kept.weights)
        findings = _tokenizer_findings(adapter, self.subject, session.trust, self.kept.vocabulary)
        if reason := unreadable_windows(self._guarding.windows, self._guarding.baseline.task, self.model):
            findings.append(Finding("primary metric", Action.ABORT, f"not measured, {reason}"))
        return Edited(
            self.model,
            self._watched,
            {
                "name": "compare",
                "plan": {"subject": self.subject},
                "modules": [dataclasses.asdict(change) for change in changes],
            },
            changes,
            baseline_weights=self.kept.weights,
            findings=findings,
            unreadable=reason is not None,
        )

    def undo(self) -> Watched:
        """A rejected subject stays what it is."""
        return self._watched

    def _watching(self, model: torch.nn.Module) -> Watched:
        """The subject as it has to stay: its files can be read again."""
        if streaming := streaming_of(model):
            return WatchingStreamed.of(model, streaming)
        structures = [Structure.of(module) for module in model.modules()]

        def read_again() -> None:
            for structure in structures:
                structure.restore()
            fresh, _ = self._session.load(self.subject)
            kept = dict(named_tensors(fresh))
            for name, tensor in named_tensors(model):
                tensor.data = kept[name].data

        return Watching(Loaded.of(model, self._session.clock), read_again)


def unreadable_windows(windows: WindowPair | None, task: Task, model: torch.nn.Module) -> str | None:
    """Why the subject cannot be run over the windows of a baseline of this task, or None."""
    if windows is None:
        return None
    if (own := task_of(model)) != task:
        return f"the subject is a {own} model and the baseline a {task} one"
    return next(filter(None, (unreadable(part, model) for part in windows)), None)


def changed_weights(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> list[ChangedWeight]:
    """Each weight of the subject against the baseline's, read from disk for the comparison and let go."""
    return [_change(target, before) for target in counted(find_weights(model))]


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


def _report(guarding: Guarding, judgement: Judgement, edit: _Subject) -> dict[str, Any]:
    model, kept = edit.model, edit.kept
    facts = ModelFacts(
        before=kept.fingerprint,
        after=_fingerprint(model) if model is not None else kept.fingerprint,
        restored=None,
        streamed=kept.streamed,
        devices=sorted({str(parameter.device) for parameter in model.parameters()}) if model is not None else [],
    )
    plan = {"subject": edit.subject, "families": families(judgement.last.modules)}
    return assemble(guarding, judgement.attempts, facts, edit_name=COMPARE, plan=plan)


def families(changes: Iterable[ChangedWeight | EditedWeight]) -> list[dict[str, Any]]:
    """Changes summed by family: how many weights of each were changed in which way.

    A family is the same weight of every layer: a name with its numbers left out.
    """
    counts: dict[str, dict[str, int]] = {}
    for change in changes:
        family = counts.setdefault(re.sub(r"\d+", "*", change.name), {})
        family[change.change] = family.get(change.change, 0) + 1
    return [{"family": family, "changes": changes_of_it} for family, changes_of_it in counts.items()]
