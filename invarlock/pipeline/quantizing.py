"""A run: quantize a model under guard, and keep the edit, roll it back or abort."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from invarlock.checkpoints.exporting import Export
from invarlock.checkpoints.writing import OutputFolder, claimed
from invarlock.config.schema import RunConfig
from invarlock.core.ranks import ALONE, Ranks
from invarlock.core.results import Action
from invarlock.core.snapshots import Snapshot
from invarlock.pipeline.assembly import ModelFacts, announced, assemble, finish, write
from invarlock.pipeline.clock import Progress
from invarlock.pipeline.judging import Attempt, Judge, RunResult
from invarlock.pipeline.keeping import Keeper, fingerprint_of
from invarlock.pipeline.plans import plans_of
from invarlock.plugins.manager import PluginManager
from invarlock.quantization.model import quantize_model
from invarlock.quantization.scheme import Plan
from invarlock.quantization.selection import select_targets


def run(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
) -> RunResult:
    """Load a model, measure it, quantize it under guard, and keep it, roll it back or abort.

    :param output: where the report and, if ``output.save_model`` is set, an accepted model go; None writes nothing.
    :param strict: a warning makes the exit code of the verdict 1.
    :param ranks: the processes that share the run; the first one writes.
    :raises UsageError: for a mistake in the configuration or a broken input; nothing was written.
    :raises PluginError: when an adapter failed; nothing was written.

    Whatever is raised, Ctrl-C included, the model has been brought back to the baseline before.
    """
    with claimed(output, config.model.id, ranks=ranks):
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        return _run(Judge(config, plugins, slots, strict, on_progress, ranks), output)


def _run(judge: Judge, output: OutputFolder | None) -> RunResult:
    config, ranks = judge.config, judge.ranks
    plans = plans_of(config)
    export = Export(config.output.format, plans[0].scheme, config.model.id) if config.output.save_model else None
    model, adapter = judge.load(config.model.id, spread=True)
    targets = select_targets(model, plans[0])
    judge.begin(model, adapter, wants_tokenizer=config.output.save_model)
    if export is not None:
        export.check(model, targets, judge.tokenizer)
    judge.make_windows(model)
    keeper = Keeper.of(model, adapter, judge.clock)
    try:
        attempts = _attempts(judge, model, keeper, plans, export)
        report = _report(judge, attempts, model, keeper)
        finish(report, judge.plugins, ranks)
        save = None
        if export is not None and attempts[-1].verdict.accepted:
            saved = judge.view.gather(keep=ranks.is_first) if judge.view else model
            save = partial(export.write, model=saved, tokenizer=judge.tokenizer)
        if output is not None and ranks.is_first:
            write(report, output, judge.clock, save)
        ranks.gather(None)
    except BaseException:
        # The others may not be there any more to look at a model that is spread over all of them.
        keeper.restore(model, check=judge.view is None)
        raise
    return RunResult(report, model)


def _attempts(
    judge: Judge, model: torch.nn.Module, keeper: Keeper, plans: Sequence[Plan], export: Export | None
) -> list[Attempt]:
    """Prepare the guards, then attempt the edit until one attempt is accepted or there are none left."""
    judge.measure_baseline(model)
    if not judge.prepare(model, lambda: keeper.undo(model)):
        return [announced(judge, judge.not_ready())]
    attempts: list[Attempt] = []
    for number, plan in enumerate(plans, start=1):
        attempts.append(announced(judge, _attempt(judge, model, keeper, number, plan, export)))
        if attempts[-1].verdict.accepted:
            break
        keeper.restore(model)
        if attempts[-1].verdict.action is Action.ABORT:
            break
    return attempts


def _attempt(
    judge: Judge, model: torch.nn.Module, keeper: Keeper, number: int, plan: Plan, export: Export | None
) -> Attempt:
    if export is not None:
        export.scheme = plan.scheme
    with judge.clock.stage("quantize"):
        modules = quantize_model(
            model,
            plan,
            scales=export.scales if export is not None and export.stores_codes else None,
            on_progress=lambda done, total, name: judge.on_progress("quantize", done, total),
        )
    edited = fingerprint_of(model, judge.clock)

    def check() -> list[str]:
        if changed := keeper.changed(model, edited):
            keeper.restore(model)
            quantize_model(model, plan, measure=False)
        return changed

    edit = {
        "name": judge.config.edit.name,
        "plan": dataclasses.asdict(plan),
        "modules": [dataclasses.asdict(module) for module in modules],
    }
    weights = keeper.snapshot.parameters() if isinstance(keeper.snapshot, Snapshot) else None
    return judge.judge(
        model, edit, check, number=number, bitwidth=plan.scheme.bitwidth, modules=modules, baseline_weights=weights
    )


def _report(judge: Judge, attempts: Sequence[Attempt], model: torch.nn.Module, keeper: Keeper) -> dict[str, Any]:
    last, after = attempts[-1], fingerprint_of(model, judge.clock)
    facts = ModelFacts(
        before=keeper.fingerprint.digest,
        after=after.digest,
        restored=None if last.verdict.accepted else after == keeper.fingerprint,
        streamed=False,
        devices=sorted({str(parameter.device) for parameter in model.parameters()}),
    )
    plan: Mapping[str, Any] = {**judge.config.as_dict()["edit"]["plan"], "bitwidth": last.bitwidth}
    return assemble(judge, attempts, facts, edit_name=judge.config.edit.name, plan=plan)
