"""A comparison: the same guards, metric and verdict as a run, with a second checkpoint in place of an edit.

One model is in memory at a time, unless there is room for both and the baseline may be needed for further windows; its
weights are read back from disk one by one.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.checkpoints.reader import files_of
from invarlock.checkpoints.streaming import streaming_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import InputError, UsageError, named_by
from invarlock.core.invocation import Invocation
from invarlock.core.lazy import ReadWeights
from invarlock.core.progress import Progress
from invarlock.core.results import Action, Finding
from invarlock.datasets.windows import unreadable
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.models.facts import ModelClass
from invarlock.models.fingerprint import named_tensors, stored_tensors
from invarlock.models.snapshot import Snapshot, Structure, has_room
from invarlock.models.structure import is_backbone
from invarlock.pipeline.attempts import Attempt, Edited, RunResult
from invarlock.pipeline.changes import find_changes
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.coverage import Declared, touched
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import judge
from invarlock.pipeline.keeping import Gone, Loaded, Prints, Watched, WatchingStreamed
from invarlock.pipeline.own_tokenizer import Choice, read_with
from invarlock.pipeline.planning.contributions import fisher_or_none
from invarlock.pipeline.reference.kept import Reference
from invarlock.pipeline.session import SUBJECT, Baseline, Session, WindowPair
from invarlock.pipeline.shares import sensitivities_for_shares
from invarlock.pipeline.stored_formats import formats_of, named_by_format
from invarlock.pipeline.subject import Subject, load
from invarlock.pipeline.tasks import find_task
from invarlock.pipeline.tokenizer import load_tokenizer
from invarlock.pipeline.writing import write
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.selection import find_weights
from invarlock.reporting.report import COMPARE

log = logging.getLogger("invarlock")


def compare(
    config: RunConfig,
    subject: str,
    plugins: PluginManager,
    *,
    weights_only: bool = False,
    tokenizer: Choice = "own",
    output: OutputFolder | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
    invocation: Invocation | None = None,
    reference: Path | None = None,
) -> RunResult:
    """Judge an edit that somebody else made: ``config.model.id`` is the baseline, ``subject`` the edited checkpoint.

    Both are only read.

    :param weights_only: measure no outputs; the verdict rests on weights and single blocks.
    :param tokenizer: whose encodes the text for the subject. Where its own gives other ids, the loss of the same text
        is compared per byte.
    :param ranks: the processes that share the comparison; the first one writes.
    :param reference: as ``run`` takes it.
    :returns: the report, and the subject's model.
    :raises UsageError: for a mistake in the configuration or a broken checkpoint; nothing was written.
    """
    inputs = [config.model.id, subject, *([str(reference)] if reference else [])]
    with output.claimed(*inputs, ranks=ranks) if output else nullcontext():
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        return _compare(
            Session(config, plugins, on_progress, ranks, invocation, Reference.for_one(reference, ranks)),
            slots,
            strict,
            subject,
            weights_only,
            tokenizer,
            output,
        )


def _compare(
    session: Session,
    slots: Sequence[GuardSlot],
    strict: bool,
    subject: str,
    weights_only: bool,
    tokenizer: Choice,
    output: OutputFolder | None,
) -> RunResult:
    if weights_only and session.config.eval.attribute:
        raise UsageError("eval.attribute needs the outputs that --weights-only leaves out; remove one")
    # Before the baseline is measured: an adapter may be broken.
    edited = Subject.of(session, subject)
    guarding, weights, kept, gone = _prepare_baseline(session, slots, strict, weights_only)
    # The baseline goes before the subject comes, and a module tree has cycles that would keep it.
    gc.collect()
    return judge(guarding, _Comparing(guarding, edited, weights, kept, gone.prints, tokenizer, output), gone)


def _prepare_baseline(
    session: Session, slots: Sequence[GuardSlot], strict: bool, weights_only: bool
) -> tuple[Guarding, ReadWeights, Loaded | None, Gone]:
    """The prepared guards, the baseline's weights, the baseline if it is kept, and what is left of it."""
    if not weights_only and session.reference is None:
        session.documents()
    model, adapter = load(session, session.config.model.id, on_disk=weights_only)
    baseline = Baseline(session, model, adapter, wants_tokenizer=True, reads_text=False if weights_only else None)
    windows = None if weights_only else baseline.make_windows(model)
    weights: ReadWeights
    watched: Watched
    if streaming := streaming_of(model):
        weights, watched = streaming.unedited(), WatchingStreamed.of(model, streaming)
        stays = False
    else:
        stays = windows is not None and _has_room_for_another(model)
        weights, bring_back = _weights_of(model, baseline, stays, session.clock)
        watched = Loaded.of(model, session.clock, bring_back, session.known_digests)
    guarding = Guarding(session, baseline, windows, slots, strict, comparing=True)
    kept = watched if stays and isinstance(watched, Loaded) else None
    guarding.begin(model, watched, comes_back=kept is not None)
    kept = None if guarding.is_whole else kept
    if session.config.eval.attribute and guarding.ready:
        guarding.fisher = fisher_or_none(guarding, model, find_weights(model))
    if guarding.ready and guarding.fisher is None and kept is None:
        # Later it is gone; a baseline that is kept is asked once it is known which weights differ.
        guarding.sensitivities = sensitivities_for_shares(guarding, model, find_weights(model))
    return guarding, weights, kept, Gone.of(watched)


def _weights_of(
    model: torch.nn.Module, baseline: Baseline, stays: bool, clock: Clock
) -> tuple[ReadWeights, Callable[[], object]]:
    """The weights of a baseline in memory, and what brings it back if a plugin changed it.

    :param stays: it stays in memory, and is its own copy where all code is our own: nothing brings it back then.
    """
    if stays and not baseline.has_strangers and baseline.view is None:
        held = {name: tensor.detach() for name, tensor in stored_tensors(model)}
        return ReadWeights(held, lambda name: held[name].clone(), held.__getitem__), lambda: None
    with clock.stage("snapshot"):
        snapshot = Snapshot(model, files_of(model))
    return snapshot.parameters(), partial(snapshot.restore, model)


def _has_room_for_another(model: torch.nn.Module) -> bool:
    """True if the devices of a model have room for another one of its size."""
    needed: Counter[torch.device] = Counter()
    for _, tensor in named_tensors(model):
        needed[tensor.device] += tensor.nbytes
    return all(has_room(nbytes, device) for device, nbytes in needed.items())


class _Comparing:
    """Another checkpoint in place of an edit: it is loaded once, and only read."""

    name = COMPARE
    search = None

    def __init__(
        self,
        guarding: Guarding,
        subject: Subject,
        before: ReadWeights,
        kept: Loaded | None,
        prints: Prints | None,
        tokenizer: Choice,
        output: OutputFolder | None,
    ) -> None:
        self._kept, self._subject = kept, subject
        self.plan = subject.plan
        self.model: torch.nn.Module | None = None
        self._guarding, self._session = guarding, guarding.session
        self._before, self._prints, self._tokenizer, self._output = before, prints, tokenizer, output
        self._watched: Watched = Gone()

    def apply(self, number: int) -> Edited:
        guarding, session, subject = self._guarding, self._session, self._subject
        model, adapter = subject.load(on_disk=guarding.windows is None)
        _check_head(model, guarding.baseline, subject.model_id)
        self.model, self._watched = model, self._watching(model)
        with session.clock.stage("changes"):
            before, now = self._prints, self._watched.prints
            equal = now.marks.shared_with(before.marks) if before and now else ()
            changes = find_changes(model, self._before.lent, guarding.baseline.tokenizer, equal)
            tensors = named_by_format(changes.tensors, formats_of(model, Path(subject.model_id)))
        with named_by(SUBJECT), session.clock.stage("load"):
            own = load_tokenizer(adapter, subject.tokenizer_id, session.trust, required=False)
        with named_by(SUBJECT), session.clock.stage("windows"):
            reading = read_with(self._tokenizer, guarding.baseline, guarding.windows, model, own)
        reason = reading.unreadable
        if reason is None and reading.same_text is None:
            reason = unreadable_windows(guarding.windows, guarding.baseline, model)
        findings = [*subject.findings(), *reading.findings]
        if reason:
            findings.append(Finding("primary metric", Action.ABORT, f"not measured, {reason}"))
        return Edited(
            model,
            self._watched,
            self.name,
            self.plan,
            tensors,
            self._before,
            [*changes.findings, *findings],
            touched(
                guarding.baseline.declared,
                Declared.of(model, subject.model_id, session.simulation(model)),
                guarding.windows,
            ),
            unreadable=reason is not None,
            tokenizer=own if self._tokenizer == "own" else None,
            same_text=reading.same_text,
            bring_baseline=self._bring_baseline if self._kept else None,
        )

    @contextmanager
    def _bring_baseline(self) -> Iterator[torch.nn.Module]:
        assert self._kept is not None
        # A guard may have kept it, too.
        self._kept.undo()
        yield self._kept.model

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        return False

    def undo(self) -> Watched:
        """A rejected subject stays what it is."""
        return self._watched

    def write(self, report: dict[str, Any]) -> None:
        if self._output is not None and self._session.ranks.is_first:
            write(report, self._output, self._session.clock)

    def _watching(self, model: torch.nn.Module) -> Watched:
        """The subject as it has to stay: its files can be read again."""
        if streaming := streaming_of(model):
            return replace(WatchingStreamed.of(model, streaming), plan=self._subject.plan)
        # Without self, which would be a cycle that keeps the baseline's weights on disk.
        subject, clock, structure = self._subject, self._session.clock, Structure(model)

        def read_again() -> None:
            structure.restore()
            fresh, _ = subject.load(on_disk=False)
            kept = dict(named_tensors(fresh))
            for name, tensor in named_tensors(model):
                tensor.data = kept[name].data

        return Loaded.of(model, clock, read_again, self._prints.by_mark if self._prints else {})


def _check_head(model: torch.nn.Module, baseline: Baseline, subject: str) -> None:
    """
    :raises InputError: the subject's class has no head, and the baseline's task needs one.
    """
    name, of_subject = type(model).__name__, find_task(baseline.session.plugins, ModelClass.of(model)).name
    if is_backbone(model) and of_subject != baseline.task.name:
        raise InputError(
            f"subject: {subject}: {name}, which architectures in config.json names, has no head for the task of the "
            f"baseline ({baseline.task.name}), so it cannot be measured; name the class that the baseline has"
        )


def unreadable_windows(windows: WindowPair | None, baseline: Baseline, model: torch.nn.Module) -> str | None:
    """The reason that the subject cannot be run over the windows of a baseline, or None."""
    if windows is None:
        return None
    own, task = find_task(baseline.session.plugins, ModelClass.of(model)).name, baseline.task.name
    if own != task:
        return f"the subject is a {own} model and the baseline a {task} one"
    return next(filter(None, (unreadable(part, model) for part in windows)), None)
