"""A run on weights that stay on disk: each is read, rounded and written by itself, whatever the size of the model.

Guards and passes see a model whose weights are read when an operation needs them (``checkpoints.streamed``), before the
edit as they are stored, after it as rounding leaves them. Nothing in memory has to be restored, and the input is only
read. Shards are written beside the verdict's being found, under a name that is none of a checkpoint, and renamed if the
edit is accepted; a run that was cut off goes on after the last whole shard when it is started again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from invarlock import __version__
from invarlock.checkpoints.output_folder import OutputFolder, unwritable_said
from invarlock.checkpoints.shard_writer import ShardedOutput
from invarlock.checkpoints.streaming import Edit, Part, Streaming, streaming_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError
from invarlock.core.progress import counted, showing
from invarlock.core.results import Action
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.exporters.saving import Export
from invarlock.models.state import ModelState
from invarlock.pipeline.assembly import ModelFacts, announced, assemble, finish, write
from invarlock.pipeline.attempts import Attempt, RunResult
from invarlock.pipeline.clock import Progress
from invarlock.pipeline.judging import Judge
from invarlock.pipeline.plans import plans_of
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.model import QuantizedWeight
from invarlock.quantization.rtn import Scratch, quantize_, scales_of
from invarlock.quantization.scheme import Plan, Scheme
from invarlock.quantization.selection import WeightTarget, select_targets

log = logging.getLogger("invarlock")


def run_streamed(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
) -> RunResult:
    """As ``run``, tensor by tensor.

    Without text, outputs are not measured: a model writes windows token by token, and would be read for each of them.

    :raises UsageError: also for a checkpoint that cannot be streamed: packed, or laid out unlike the model.
    """
    if config.output.save_model and config.output.format == "gguf":
        raise UsageError("output.format: gguf: it cannot be written shard by shard; run without --stream")
    with output.claimed(config.model.id, ranks=ranks):
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        return _run_streamed(Judge(config, plugins, slots, strict, on_progress, ranks), output)


def _run_streamed(judge: Judge, output: OutputFolder) -> RunResult:
    config = judge.config
    plans = plans_of(config)
    judge.documents()
    model, adapter = judge.load(config.model.id, stream=True)
    streaming = streaming_of(model)
    if streaming is None:
        raise UsageError(f"model.adapter: {adapter.name} cannot leave weights on disk; run without --stream")
    state = ModelState.of(model)
    targets = select_targets(model, plans[0])
    reads_text = not config.dataset.is_generated
    judge.begin(model, adapter, wants_tokenizer=config.output.save_model, reads_text=reads_text)
    export = Export(config.output.format, plans[0].scheme, config.model.id) if config.output.save_model else None
    if export is not None:
        export.check(model, targets, judge.tokenizer)
        _check_packable(export, streaming, targets)
    if reads_text:
        judge.make_windows(model)
    else:
        log.warning("outputs are not measured: a streamed model needs text, set dataset.provider and dataset.path")
        judge.windows = None
    streamed = _StreamedRun(judge, model, streaming, state, targets, output, export)
    judge.measure_baseline(model, streamed.undo, streamed.settle)
    try:
        ready = judge.prepare(model, streamed.undo)
        return streamed.report(streamed.attempts(plans) if ready else [announced(judge, judge.not_ready())])
    except UsageError:
        # A full disk. After anything else the same command goes on with the shards that are whole.
        if judge.ranks.size == 1:
            streamed.discard()
        raise


class _StreamedRun:
    """One model, the shards that are made of it, and the report."""

    def __init__(
        self,
        judge: Judge,
        model: torch.nn.Module,
        streaming: Streaming,
        state: ModelState,
        targets: Sequence[WeightTarget],
        output: OutputFolder,
        export: Export | None,
    ) -> None:
        self.judge, self.model, self.streaming, self.state = judge, model, streaming, state
        self.output, self.export = output, export
        self.targets = {streaming.stored[target.parameter_name]: target for target in targets}
        self.shards: ShardedOutput | None = None

    def undo(self) -> list[str]:
        """Undo what a guard changed of the model, and name it."""
        return [*self.state.undo(), *self.streaming.undo(self.model)]

    def settle(self) -> None:
        """Take note of what the model's own code has changed of it."""
        self.state.settle()
        self.streaming.settle(self.model)

    def attempts(self, plans: Sequence[Plan]) -> list[Attempt]:
        attempts: list[Attempt] = []
        for number, plan in enumerate(plans, start=1):
            attempts.append(announced(self.judge, self._attempt(number, plan)))
            if attempts[-1].verdict.action is not Action.ROLLBACK:
                break
            self.streaming.put(None)
        return attempts

    def report(self, attempts: Sequence[Attempt]) -> RunResult:
        """Put the report together, and keep the shards or throw them away."""
        judge, last = self.judge, attempts[-1]
        accepted = last.verdict.accepted
        if not accepted:
            self.streaming.put(None)
        plan = {**judge.config.as_dict()["edit"]["plan"], "bitwidth": last.bitwidth}
        facts = ModelFacts(
            before=self.streaming.checkpoint.fingerprint(),
            after=self.streaming.checkpoint.fingerprint(plan if accepted else None),
            restored=None if accepted else True,
            streamed=True,
            devices=[str(self.streaming.device)],
        )
        report = assemble(judge, attempts, facts, edit_name=judge.config.edit.name, plan=plan)
        finish(report, judge.plugins, judge.ranks)
        judge.confirm(self.undo)
        if judge.ranks.is_first:
            self._write(report)
        judge.ranks.gather(None)
        return RunResult(report, self.model, last.verdict)

    def _write(self, report: dict[str, Any]) -> None:
        if not report["verdict"]["accepted"] or self.export is None or self.shards is None:
            self.discard()
            write(report, self.output, self.judge.clock)
            return
        quantized = {target.parameter_name for target in self.targets.values()}
        complete = partial(self.export.complete, model=self.model, tokenizer=self.judge.tokenizer, quantized=quantized)
        write(report, self.output, self.judge.clock, complete, shards=self.shards)

    def discard(self) -> None:
        if self.shards is not None and self.judge.ranks.is_first:
            self.shards.discard()

    def _attempt(self, number: int, plan: Plan) -> Attempt:
        judge = self.judge
        with judge.clock.stage("quantize") as shown, unwritable_said(self.output.path):
            if self.export is not None:
                self.export.scheme = plan.scheme
                self.shards = self._open_shards(plan)
            with showing(judge.ranks.summed(shown)):
                modules = self._round_all(plan.scheme)
        self.streaming.put(self._edit(plan.scheme))
        edit = {
            "name": judge.config.edit.name,
            "plan": dataclasses.asdict(plan),
            "modules": [dataclasses.asdict(module) for module in modules],
        }
        return judge.judge(
            self.model,
            edit,
            self.undo,
            settle=self.settle,
            number=number,
            bitwidth=plan.scheme.bitwidth,
            modules=modules,
            baseline_weights=MappingProxyType(self.streaming),
        )

    def _open_shards(self, plan: Plan) -> ShardedOutput:
        """Go on with what an earlier process left, or begin; the first process makes room for what the others write."""
        described = {
            "version": __version__,
            "files": self.streaming.checkpoint.current_identity(),
            "plan": dataclasses.asdict(plan),
            "format": self.judge.config.output.format,
            "dtype": self.judge.config.model.dtype,
        }
        identity = json.loads(json.dumps(described))
        ranks, files = self.judge.ranks, self.streaming.checkpoint.files
        make = partial(ShardedOutput, self.output.path, files, identity, ranks.rank)
        shards = make() if ranks.is_first else None
        ranks.gather(None)
        return shards or make()

    def _round_all(self, scheme: Scheme) -> list[QuantizedWeight]:
        """Round every weight of the plan, shard by shard; write them, and all others as they are, if they are kept.

        Processes share the shards.
        """
        checkpoint, scratch, ranks = self.streaming.checkpoint, Scratch(), self.judge.ranks
        files = checkpoint.files[ranks.rank :: ranks.size]
        notes: list[dict[str, Any]] = []
        for file in counted(files, checkpoint.nbytes_of):
            noted = self.shards.notes(file) if self.shards else None
            notes += self._round_shard(file, scheme, scratch) if noted is None else noted
        found = {note["parameter_name"]: note for part in ranks.gather(notes) for note in part}
        return [_weight_of(found[target.parameter_name]) for target in self.targets.values()]

    def _round_shard(self, file: str, scheme: Scheme, scratch: Scratch) -> list[dict[str, Any]]:
        """One shard: what was done to each of its weights."""
        entries = self.streaming.checkpoint.entries
        tensors: dict[str, Tensor] = {}
        notes: list[dict[str, Any]] = []
        for part in self.streaming.parts_in(file):
            here = [name for name in part.stored if entries[name].file == file]
            if self.targets.keys().isdisjoint(part.parameters):
                tensors |= {name: self.streaming.read(name) for name in here} if self.shards else {}
                continue
            stored, results = self._round(part, scheme, scratch)
            notes += map(dataclasses.asdict, results)
            # A parameter that is stored in several files is rounded for each of them.
            tensors |= {name: stored[name] for name in here} if part.converts and self.shards else stored
        if self.shards:
            self.shards.write(file, tensors, notes)
        return notes

    def _round(self, part: Part, scheme: Scheme, scratch: Scratch) -> tuple[dict[str, Tensor], list[QuantizedWeight]]:
        """What is stored of some weights, and what was done to each of them that is in the plan."""
        export = self.export
        stores_codes = export is not None and export.stores_codes
        scale, results = None, []
        weights = part.load(self.streaming.read)
        for name in weights.keys() & self.targets.keys():
            target = self.targets[name]
            scale = scales_of(weights[name], scheme, layout=target.layout) if stores_codes else None
            figures = quantize_(weights[name], scheme, layout=target.layout, scratch=scratch)
            results.append(QuantizedWeight.of(target, scheme, figures))
        stored = part.store(weights) if export is not None else {}
        if export is not None and not part.converts:
            ((name, weight),) = stored.items()
            stored = export.stored(name, weight, scale)
        return stored, results

    def _edit(self, scheme: Scheme) -> Edit:
        """What the edited model's weights are, each time that one is read."""
        scratch = Scratch()

        def rounded(parameter: str, weight: Tensor) -> Tensor:
            if parameter in self.targets:
                quantize_(weight, scheme, layout=self.targets[parameter].layout, measure=False, scratch=scratch)
            return weight

        return rounded


def _check_packable(export: Export, streaming: Streaming, targets: Sequence[WeightTarget]) -> None:
    """Codes are stored of a weight that is a tensor of the checkpoint, and of no other."""
    for target in targets:
        if export.stores_codes and streaming.part_of(streaming.stored[target.parameter_name]).converts:
            raise UsageError(
                f"output.format: {export.format}: {target.name} is made of tensors that are stored otherwise; "
                "run without --stream, or set output.format to dequantized"
            )


def _weight_of(note: dict[str, Any]) -> QuantizedWeight:
    return QuantizedWeight(**{**note, "scheme": Scheme(**note["scheme"])})
