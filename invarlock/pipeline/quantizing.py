"""A run: quantize a model under guard, and keep the edit, roll it back or abort."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder, claimed
from invarlock.config.schema import RunConfig
from invarlock.core.results import Action
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.exporters.saving import Export
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.assembly import ModelFacts, announced, assemble, finish, write
from invarlock.pipeline.attempts import Attempt, RunResult
from invarlock.pipeline.clock import Progress
from invarlock.pipeline.judging import Judge, Undo
from invarlock.pipeline.keeping import Keeper, Loaded, fingerprint_of
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
    judge.documents()
    model, adapter = judge.load(config.model.id, spread=True)
    loaded = Loaded.of(model, judge.clock)
    targets = select_targets(model, plans[0])
    judge.begin(model, adapter, wants_tokenizer=config.output.save_model)
    if export is not None:
        export.check(model, targets, judge.tokenizer)
    judge.make_windows(model)
    loaded.settle()
    keeper = Keeper.of(loaded, adapter)
    try:
        attempts, undo = _attempts(judge, model, keeper, plans, export)
        report = _report(judge, attempts, model, keeper)
        finish(report, judge.plugins, ranks)
        judge.confirm(undo)
        save = None
        if export is not None and attempts[-1].verdict.accepted:
            saved = judge.view.gather(keep=ranks.is_first) if judge.view else model
            save = partial(export.write, model=saved, tokenizer=judge.tokenizer)
        if output is not None and ranks.is_first:
            write(report, output, judge.clock, save)
        ranks.gather(None)
    except BaseException:
        # The others may not be there any more to look at a model that is spread over all of them.
        keeper.restore(check=judge.view is None)
        raise
    return RunResult(report, model, attempts[-1].verdict)


def _attempts(
    judge: Judge, model: torch.nn.Module, keeper: Keeper, plans: Sequence[Plan], export: Export | None
) -> tuple[list[Attempt], Undo]:
    """Prepare the guards, then attempt the edit until one attempt is accepted or there are none left.

    :returns: the attempts, and what undoes later changes of the model as the last one left it.
    """
    judge.measure_baseline(model, keeper.undo, keeper.loaded.settle)
    if not judge.prepare(model, keeper.undo):
        return [announced(judge, judge.not_ready())], keeper.undo
    attempts: list[Attempt] = []
    for number, plan in enumerate(plans, start=1):
        attempt, undo = _attempt(judge, model, keeper, number, plan, export)
        attempts.append(announced(judge, attempt))
        if attempt.verdict.accepted:
            return attempts, undo
        keeper.restore()
        if attempt.verdict.action is Action.ABORT:
            break
    return attempts, keeper.undo


def _attempt(
    judge: Judge, model: torch.nn.Module, keeper: Keeper, number: int, plan: Plan, export: Export | None
) -> tuple[Attempt, Undo]:
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

    def edit_again() -> None:
        keeper.restore()
        quantize_model(model, plan, measure=False)

    undo = partial(keeper.loaded.undo, edit_again, edited)
    edit = {
        "name": judge.config.edit.name,
        "plan": dataclasses.asdict(plan),
        "modules": [dataclasses.asdict(module) for module in modules],
    }
    weights = keeper.snapshot.parameters() if isinstance(keeper.snapshot, Snapshot) else None
    attempt = judge.judge(
        model,
        edit,
        undo,
        settle=keeper.loaded.settle,
        number=number,
        bitwidth=plan.scheme.bitwidth,
        modules=modules,
        baseline_weights=weights,
    )
    return attempt, undo


def _report(judge: Judge, attempts: Sequence[Attempt], model: torch.nn.Module, keeper: Keeper) -> dict[str, Any]:
    last, after = attempts[-1], fingerprint_of(model, judge.clock)
    facts = ModelFacts(
        before=keeper.fingerprint.digest,
        after=after.digest,
        restored=None if last.verdict.accepted else after.digest == keeper.fingerprint.digest,
        streamed=False,
        devices=sorted({str(parameter.device) for parameter in model.parameters()}),
    )
    plan: Mapping[str, Any] = {**judge.config.as_dict()["edit"]["plan"], "bitwidth": last.bitwidth}
    return assemble(judge, attempts, facts, edit_name=judge.config.edit.name, plan=plan)
