"""A run: quantize a model under guard, and keep the edit, roll it back or abort."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.config.schema import RunConfig
from invarlock.core.invocation import Invocation
from invarlock.core.progress import Progress
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.exporters.saving import Export
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.attempts import Edited, RunResult
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import judge
from invarlock.pipeline.keeping import Keeper, Loaded
from invarlock.pipeline.plans import check, export_of, keys_named, plans_of, targets_of
from invarlock.pipeline.reference import Reference
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.writing import write
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.model import quantize_model
from invarlock.quantization.scheme import Plan


def run(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
    invocation: Invocation | None = None,
    reference: Path | None = None,
) -> RunResult:
    """Load a model, measure it, quantize it under guard, and keep it, roll it back or abort.

    :param output: where the report and, if ``output.save_model`` is set, an accepted model go; None writes nothing.
    :param strict: a warning makes the exit code of the verdict 1.
    :param ranks: the processes that share the run; the first one writes.
    :param reference: folder of a reference (:func:`invarlock.pipeline.make_reference`) that holds the baseline's pass.
    :raises UsageError: for a mistake in the configuration or a broken input; nothing was written.
    :raises PluginError: when an adapter failed; nothing was written.

    Whatever is raised, Ctrl-C included, the model has been brought back to the baseline before.
    """
    inputs = [config.model.id, *([str(reference)] if reference else [])]
    with output.claimed(*inputs, ranks=ranks) if output else nullcontext():
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        held = Reference.for_one(reference, ranks)
        return _run(Session(config, plugins, on_progress, ranks, invocation, held), slots, strict, output)


def _run(session: Session, slots: Sequence[GuardSlot], strict: bool, output: OutputFolder | None) -> RunResult:
    config = session.config
    export = export_of(config, session.plugins)
    if session.reference is None:
        session.documents()
    model, adapter = session.load(config.model.id, spread=True)
    loaded = Loaded.of(model, session.clock)
    targets = targets_of(config, model)
    baseline = Baseline(session, model, adapter, wants_tokenizer=config.output.save_model)
    if export is not None:
        check(export, plans_of(config), model, targets, baseline.tokenizer)
    windows = baseline.make_windows(model)
    loaded.settle()
    keeper = Keeper(loaded, adapter)
    guarding = Guarding(session, baseline, windows, slots, strict)
    try:
        guarding.begin(model, keeper.baseline)
        return judge(guarding, _Rounding(guarding, keeper, export, output), keeper.baseline)
    except BaseException:
        # The others may not be there any more to look at a model that is spread over all of them.
        keeper.restore(check=baseline.view is None)
        raise


class _Rounding:
    """Rounding in memory, by one plan an attempt."""

    def __init__(self, guarding: Guarding, keeper: Keeper, export: Export | None, output: OutputFolder | None) -> None:
        self.name, self.model = guarding.config.edit.name, keeper.baseline.model
        self.plans = [dataclasses.asdict(plan) for plan in plans_of(guarding.config)]
        self._guarding, self._keeper, self._export, self._output = guarding, keeper, export, output

    def apply(self, number: int) -> Edited:
        plan, export, keeper = Plan(**self.plans[number - 1]), self._export, self._keeper
        if export is not None:
            export.plan = plan
        scale_dtype = export.exporter.scale_dtype if export else None
        with self._guarding.session.clock.stage("quantize"), keys_named():
            modules = quantize_model(
                self.model,
                plan,
                parameters=export.quantized if export and export.exporter.stores_codes else None,
                scale_dtype=scale_dtype,
            )

        def round_again() -> None:
            keeper.restore()
            quantize_model(self.model, plan, measure=False, scale_dtype=scale_dtype)

        @contextmanager
        def bring_baseline() -> Iterator[torch.nn.Module]:
            keeper.restore()
            yield self.model
            with self._guarding.session.clock.stage("quantize"):
                quantize_model(self.model, plan, measure=False, scale_dtype=scale_dtype)

        return Edited(
            self.model,
            keeper.baseline.edited(round_again),
            self.name,
            self.plans[number - 1],
            modules,
            keeper.snapshot.parameters() if isinstance(keeper.snapshot, Snapshot) else None,
            bring_baseline=bring_baseline,
        )

    def undo(self) -> Loaded:
        self._keeper.restore()
        return self._keeper.baseline

    def write(self, report: dict[str, Any]) -> None:
        session, baseline, save = self._guarding.session, self._guarding.baseline, None
        if self._export is not None and report["verdict"]["accepted"]:
            saved = baseline.view.gather(keep=session.ranks.is_first) if baseline.view else self.model
            save = partial(self._export.write, model=saved, tokenizer=baseline.tokenizer)
        if self._output is not None and session.ranks.is_first:
            write(report, self._output, session.clock, save)
