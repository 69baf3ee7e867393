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
from collections.abc import Iterator, Sequence
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
from invarlock.pipeline.attempts import Edited, RunResult
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import judge
from invarlock.pipeline.keeping import WatchingStreamed
from invarlock.pipeline.plans import check, export_of, plans_of, targets_of
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.writing import write
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.model import Rounding
from invarlock.quantization.scheme import Plan
from invarlock.quantization.selection import WeightTarget

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
        return _run_streamed(Session(config, plugins, on_progress, ranks, invocation), slots, strict, output, export)


def _run_streamed(
    session: Session, slots: Sequence[GuardSlot], strict: bool, output: OutputFolder, export: Export | None
) -> RunResult:
    config = session.config
    session.documents()
    model, adapter = session.load(config.model.id, stream=True)
    streaming = streaming_of(model)
    if streaming is None:
        raise UsageError(f"model.adapter: {adapter.name} cannot leave weights on disk; run without --stream")
    watched = WatchingStreamed.of(model, streaming)
    targets = targets_of(config, model)
    reads_text = not config.dataset.is_generated
    baseline = Baseline(session, model, adapter, wants_tokenizer=config.output.save_model, reads_text=reads_text)
    if export is not None:
        check(export, plans_of(config), model, targets, baseline.tokenizer)
        _check_packable(export, streaming, targets)
    windows = baseline.make_windows(model) if reads_text else None
    if windows is None:
        log.warning("outputs are not measured: a streamed model needs text, set dataset.provider and dataset.path")
    guarding = Guarding(session, baseline, windows, slots, strict)
    rounding = _StreamedRounding(guarding, watched, targets, output, export)
    try:
        guarding.begin(model, watched)
        return judge(guarding, rounding, watched)
    except UsageError:
        # A full disk. After anything else the same command goes on with the shards that are whole.
        if session.ranks.size == 1:
            rounding.discard()
        raise


class _StreamedRounding:
    """Rounding shard by shard, by one plan an attempt; the edited model reads weights as rounding leaves them."""

    def __init__(
        self,
        guarding: Guarding,
        watched: WatchingStreamed,
        targets: Sequence[WeightTarget],
        output: OutputFolder,
        export: Export | None,
    ) -> None:
        self.name, self.model = guarding.config.edit.name, watched.model
        self.plans = [dataclasses.asdict(plan) for plan in plans_of(guarding.config)]
        self.guarding, self.session = guarding, guarding.session
        self.watched, self.streaming, self.output, self.export = watched, watched.streaming, output, export
        self.targets = {self.streaming.stored[target.parameter_name]: target for target in targets}
        self.shards: ShardedOutput | None = None

    def apply(self, number: int) -> Edited:
        session, described = self.session, self.plans[number - 1]
        plan = Plan(**described)
        with session.clock.stage("quantize"), unwritable_said(self.output.path):
            if self.export is not None:
                self.export.plan = plan
                self.shards = self._open_shards(plan)
            with session.ranks.progress_summed():
                modules = self._round_all(plan)
        edit = self._edit(plan)
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
            bring_baseline=bring_baseline,
        )

    def undo(self) -> WatchingStreamed:
        self.streaming.put(None)
        return self.watched

    def write(self, report: dict[str, Any]) -> None:
        """Write the report, and keep the shards or throw them away."""
        if not self.session.ranks.is_first:
            return
        if not report["verdict"]["accepted"] or self.export is None or self.shards is None:
            self.discard()
            write(report, self.output, self.session.clock)
            return
        self.export.quantized = dict.fromkeys(target.parameter_name for target in self.targets.values())
        complete = partial(self.export.complete, model=self.model, tokenizer=self.guarding.baseline.tokenizer)
        write(report, self.output, self.session.clock, complete, shards=self.shards)

    def discard(self) -> None:
        if self.shards is not None and self.session.ranks.is_first:
            self.shards.discard()

    def _open_shards(self, plan: Plan) -> ShardedOutput:
        """Go on with what an earlier process left, or begin; the first process makes room for what the others write."""
        described = {
            "version": __version__,
            "files": self.streaming.checkpoint.current_identity(),
            "plan": dataclasses.asdict(plan),
            "format": self.session.config.output.format,
            "dtype": self.session.config.model.dtype,
        }
        identity = json.loads(json.dumps(described))
        ranks, files = self.session.ranks, self.streaming.checkpoint.files
        make = partial(ShardedOutput, self.output.path, files, identity, ranks.rank)
        shards = make() if ranks.is_first else None
        ranks.gather(None)
        return shards or make()

    def _round_all(self, plan: Plan) -> list[EditedWeight]:
        """Round every weight of the plan, shard by shard; write them, and all others as they are, if they are kept.

        Processes share the shards.
        """
        checkpoint, ranks = self.streaming.checkpoint, self.session.ranks
        rounding = self._rounding(plan, measure=True)
        files = checkpoint.files[ranks.rank :: ranks.size]
        notes: dict[str, dict[str, Any]] = {}
        for file in counted(files, checkpoint.nbytes_of):
            noted = self.shards.notes(file) if self.shards else None
            notes |= self._round_shard(file, rounding) if noted is None else noted
        found = {name: note for part in ranks.gather(notes) for name, note in part.items()}
        return [EditedWeight(**found[name]) for name in self.targets]

    def _round_shard(self, file: str, rounding: Rounding) -> dict[str, dict[str, Any]]:
        """Round and write one shard; the effect on each of its weights by name, as its journal holds it."""
        entries = self.streaming.checkpoint.entries
        tensors: dict[str, Tensor] = {}
        notes: dict[str, dict[str, Any]] = {}
        for part in self.streaming.parts_in(file):
            here = [name for name in part.stored if entries[name].file == file]
            if self.targets.keys().isdisjoint(part.parameters):
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
        rounded = {name: rounding(self.targets[name], weights[name]) for name in weights.keys() & self.targets.keys()}
        results = {name: rounding.effect(self.targets[name], weight.sums) for name, weight in rounded.items()}
        if self.export is None:
            return {}, results
        stored, exporter = part.store(weights), self.export.exporter
        if not part.converts:
            ((name, weight),), (done,) = stored.items(), rounded.values()
            stored = exporter.store(name, weight, self.export.plan, done if exporter.stores_codes else None)
        return stored, results

    def _rounding(self, plan: Plan, *, measure: bool) -> Rounding:
        return Rounding(plan, measure, self.export.exporter.scale_dtype if self.export else None)

    def _edit(self, plan: Plan) -> WeightEdit:
        """Function that rounds a weight of the plan, each time that one is read."""
        rounding = self._rounding(plan, measure=False)

        def rounded(parameter: str, weight: Tensor) -> Tensor:
            if parameter in self.targets:
                rounding(self.targets[parameter], weight)
            return weight

        return rounded


def _check_packable(export: Export, streaming: Streaming, targets: Sequence[WeightTarget]) -> None:
    """Codes are stored of a weight that is a tensor of the checkpoint, and of no other."""
    for target in targets:
        if export.exporter.stores_codes and streaming.parts[streaming.stored[target.parameter_name]].converts:
            raise UsageError(
                f"output.format: {export.exporter.name}: {target.name} is made of tensors that are stored otherwise; "
                "run without --stream, or set output.format to dequantized"
            )
