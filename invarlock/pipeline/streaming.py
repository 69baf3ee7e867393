"""A run on weights that stay on disk: each is read, rounded and written by itself, whatever the size of the model.

Guards and passes see a model whose weights are read when an operation needs them (``checkpoints.streaming``), before
the edit as they are stored, after it as rounding leaves them. Nothing in memory has to be restored, and the input is
only read. Shards are written before the verdict is known, under a name that is none of a checkpoint, and renamed if the
edit is accepted; a run that was cut off goes on after the last whole shard when it is started again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invarlock import __version__
from invarlock.checkpoints.output_folder import OutputFolder, unwritable_said
from invarlock.checkpoints.shard_writer import ShardedOutput
from invarlock.checkpoints.streaming import Part, Streaming, WeightEdit, streaming_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError
from invarlock.core.invocation import Invocation
from invarlock.core.progress import Progress, counted
from invarlock.core.results import EditedWeight
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.exporters.saving import Export
from invarlock.pipeline.attempts import Attempt, Edited, RunResult
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import judge
from invarlock.pipeline.keeping import WatchingStreamed
from invarlock.pipeline.planning.choosing import plans_for
from invarlock.pipeline.planning.plans import check, export_of, plans_of, weights_of
from invarlock.pipeline.planning.probing import Probe
from invarlock.pipeline.planning.retrying import Retries
from invarlock.pipeline.planning.searching import Search, check_held, check_target
from invarlock.pipeline.planning.sensitivities import check_measurable, sensitivities_or_none
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.writing import write
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.model import Rounding
from invarlock.quantization.selection import PlannedWeight
from invarlock.reporting.report import SearchSection

log = logging.getLogger("invarlock")


def run_streamed(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
    invocation: Invocation | None = None,
    frontier: bool = False,
) -> RunResult:
    """As ``run``, tensor by tensor.

    Without text, outputs are not measured: a model writes windows token by token, and would be read for each of them.

    :raises UsageError: also for a checkpoint that cannot be streamed: packed, or laid out unlike the model.
    """
    export = export_of(config, plugins)
    if export is not None and not export.exporter.streams:
        name = export.exporter.name
        raise UsageError(f"output.format: {name}: it cannot be written shard by shard; run without --stream")
    with output.claimed(config.model.id, ranks=ranks):
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        session = Session(config, plugins, on_progress, ranks, invocation)
        return _run_streamed(session, slots, strict, output, export, frontier)


def _run_streamed(
    session: Session,
    slots: Sequence[GuardSlot],
    strict: bool,
    output: OutputFolder,
    export: Export | None,
    frontier: bool,
) -> RunResult:
    config = session.config
    if config.eval.attribute:
        raise UsageError("eval.attribute puts weights back in memory: run without --stream")
    check_measurable(config, streamed=True, processes=session.ranks.size)
    check_target(config, frontier=frontier)
    session.documents()
    model, adapter = session.load(config.model.id, stream=True)
    streaming = streaming_of(model)
    if streaming is None:
        raise UsageError(f"model.adapter: {adapter.name} cannot leave weights on disk; run without --stream")
    watched = WatchingStreamed.of(model, streaming)
    weights = weights_of(config, model)
    reads_text = not config.dataset.is_generated
    baseline = Baseline(session, model, adapter, wants_tokenizer=config.output.save_model, reads_text=reads_text)
    if export is not None:
        check(export, plans_of(config), model, baseline.tokenizer)
        if config.edit.is_searched:
            check_held(config, export, model, baseline.tokenizer)
        _check_packable(export, streaming, weights)
    windows = baseline.make_windows(model) if reads_text else None
    if windows is None:
        log.warning("outputs are not measured: a streamed model needs text, set dataset.provider and dataset.path")
    guarding = Guarding(session, baseline, windows, slots, strict)
    guarding.begin(model, watched)
    rounded = partial(_rounded, streaming)
    plans = plans_for(guarding, watched, rounded, export, output.path, frontier=frontier)
    rounding = _StreamedRounding(guarding, watched, plans, output, export)
    try:
        return judge(guarding, rounding, watched)
    except UsageError:
        # A full disk. After anything else the same command goes on with the shards that are whole.
        if session.ranks.size == 1:
            rounding.discard()
        raise


@contextmanager
def _rounded(streaming: Streaming, weights: Sequence[PlannedWeight]) -> Iterator[None]:
    """As ``Rounded``."""
    streaming.put(_edit_of(_by_stored_name(streaming, weights), Rounding(measure=False)))
    yield
    streaming.put(None)


def _by_stored_name(streaming: Streaming, weights: Sequence[PlannedWeight]) -> dict[str, PlannedWeight]:
    return {streaming.stored[planned.target.parameter_name]: planned for planned in weights}


def _edit_of(weights: Mapping[str, PlannedWeight], rounding: Rounding) -> WeightEdit:
    """Function that rounds a weight of a plan, each time that one is read.

    :param weights: by the name that they are stored under.
    """

    def rounded(parameter: str, weight: Tensor) -> Tensor:
        if parameter in weights:
            rounding(weights[parameter], weight)
        return weight

    return rounded


class _StreamedRounding:
    """Rounding shard by shard, by one plan an attempt; the edited model reads weights as rounding leaves them."""

    def __init__(
        self,
        guarding: Guarding,
        watched: WatchingStreamed,
        plans: Retries | Search,
        output: OutputFolder,
        export: Export | None,
    ) -> None:
        self.name, self.model = guarding.config.edit.name, watched.model
        self.plans = plans
        self.guarding, self.session = guarding, guarding.session
        self.watched, self.streaming, self.output, self.export = watched, watched.streaming, output, export
        self.weights: dict[str, PlannedWeight] = {}
        """Of the plan, by the name that they are stored under."""
        self.shards: ShardedOutput | None = None

    @property
    def plan(self) -> Mapping[str, Any]:
        return self.plans.described

    def apply(self, number: int) -> Edited:
        session, described, weights = self.session, self.plan, self.plans.weights()
        self.weights = _by_stored_name(self.streaming, weights)
        with session.clock.stage("quantize"), unwritable_said(self.output.path):
            if self.export is not None:
                self.export.take(self.plans.plan, weights)
                self.shards = self._open_shards()
            with session.ranks.progress_summed():
                modules = self._round_all()
        edit = _edit_of(self.weights, self._rounding(measure=False))
        self.streaming.put(edit)
        watched = dataclasses.replace(self.watched, plan=described)

        @contextmanager
        def bring_baseline() -> Iterator[torch.nn.Module]:
            self.streaming.put(None)
            yield self.model
            self.streaming.put(edit)

        return Edited(
            self.model,
            watched,
            self.name,
            described,
            modules,
            self.streaming.unedited(),
            bits_per_weight=self.plans.bits_per_weight,
            bring_baseline=bring_baseline,
        )

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        plans = self.plans
        if isinstance(plans, Retries) and plans.wants_sensitivities(attempts):
            self.streaming.put(None)
            probe = Probe(self.guarding, self.model, partial(_rounded, self.streaming))
            plans.learn(sensitivities_or_none(self.guarding, plans.targets, probe))
        return plans.revise(attempts)

    def undo(self) -> WatchingStreamed:
        self.streaming.put(None)
        return self.watched

    def write(self, report: dict[str, Any]) -> None:
        """Write the report, and keep the shards or throw them away."""
        if not self.session.ranks.is_first:
            return
        self._write(report)
        if isinstance(self.plans, Search):
            self.plans.finished()

    @property
    def search(self) -> SearchSection | None:
        return self.plans.section if isinstance(self.plans, Search) else None

    def _write(self, report: dict[str, Any]) -> None:
        if not report["verdict"]["accepted"] or self.export is None or self.shards is None:
            self.discard()
            write(report, self.output, self.session.clock)
            return
        self.export.quantized = dict.fromkeys(self.export.schemes)
        complete = partial(self.export.complete, model=self.model, tokenizer=self.guarding.baseline.tokenizer)
        write(report, self.output, self.session.clock, complete, shards=self.shards)

    def discard(self) -> None:
        if self.shards is not None and self.session.ranks.is_first:
            self.shards.discard()

    def _open_shards(self) -> ShardedOutput:
        """Go on with what an earlier process left, or begin; the first process makes room for what the others write."""
        described = {
            "version": __version__,
            "files": self.streaming.checkpoint.current_identity(),
            "plan": self.plan,
            "format": self.session.config.output.format,
            "dtype": self.session.config.model.dtype,
        }
        identity = json.loads(json.dumps(described))
        ranks, files = self.session.ranks, self.streaming.checkpoint.files
        make = partial(ShardedOutput, self.output.path, files, identity, ranks.rank)
        shards = make() if ranks.is_first else None
        ranks.gather(None)
        return shards or make()

    def _round_all(self) -> list[EditedWeight]:
        """Round every weight of the plan, shard by shard; write them, and all others as they are, if they are kept.

        Processes share the shards.
        """
        checkpoint, ranks = self.streaming.checkpoint, self.session.ranks
        rounding = self._rounding(measure=True)
        files = checkpoint.files[ranks.rank :: ranks.size]
        notes: dict[str, dict[str, Any]] = {}
        for file in counted(files, checkpoint.nbytes_of):
            noted = self.shards.notes(file) if self.shards else None
            notes |= self._round_shard(file, rounding) if noted is None else noted
        found = {name: note for part in ranks.gather(notes) for name, note in part.items()}
        return [EditedWeight(**found[name]) for name in self.weights]

    def _round_shard(self, file: str, rounding: Rounding) -> dict[str, dict[str, Any]]:
        """Round and write one shard; the effect on each of its weights by name, as its journal holds it."""
        entries = self.streaming.checkpoint.entries
        tensors: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any]] = {}
        for part in self.streaming.parts_in(file):
            here = [name for name in part.stored if entries[name].file == file]
            if self.weights.keys().isdisjoint(part.parameters):
                tensors |= {name: self.streaming.read(name) for name in here} if self.shards else {}
                continue
            stored, results = self._round(part, rounding)
            notes |= {name: dataclasses.asdict(result) for name, result in results.items()}
            # A parameter that is stored in several files is rounded for each of them.
            tensors |= {name: stored[name] for name in here} if part.converts and self.shards else stored
        if self.shards:
            self.shards.write(file, tensors, notes)
        return notes

    def _round(self, part: Part, rounding: Rounding) -> tuple[dict[str, Tensor], dict[str, EditedWeight]]:
        """Tensors to store for some weights, and the effect of rounding on each of them that is in the plan."""
        weights = part.load(self.streaming.read)
        rounded = {name: rounding(self.weights[name], weights[name]) for name in weights.keys() & self.weights.keys()}
        targets = [self.weights[name].target for name in rounded]
        results = dict(zip(rounded, rounding.effects(targets, [done.sums for done in rounded.values()]), strict=True))
        if self.export is None:
            return {}, results
        stored, exporter = part.store(weights), self.export.exporter
        if not part.converts:
            ((name, weight),), ((parameter, done),) = stored.items(), rounded.items()
            scheme = self.weights[parameter].scheme
            stored = exporter.store(name, weight, scheme, done if exporter.stores_codes else None)
        return stored, results

    def _rounding(self, *, measure: bool) -> Rounding:
        return Rounding(measure, self.export.exporter.scale_dtype if self.export else None)


def _check_packable(export: Export, streaming: Streaming, weights: Sequence[PlannedWeight]) -> None:
    """Codes are stored of a weight that is a tensor of the checkpoint, and of no other."""
    for target in (planned.target for planned in weights):
        if export.exporter.stores_codes and streaming.parts[streaming.stored[target.parameter_name]].converts:
            raise UsageError(
                f"output.format: {export.exporter.name}: {target.name} is made of tensors that are stored otherwise; "
                "run without --stream, or set output.format to dequantized"
            )
