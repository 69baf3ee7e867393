"""A run: quantize a model under guard, and keep the edit, roll it back or abort."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.config.schema import RunConfig
from invarlock.core.invocation import Invocation
from invarlock.core.progress import Progress
from invarlock.core.results import EditedWeight
from invarlock.distributed.process_group import ALONE, Ranks
from invarlock.exporters.saving import Export
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.attempts import Attempt, Edited, RunResult
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.judging import judge
from invarlock.pipeline.keeping import Keeper, Loaded
from invarlock.pipeline.planning.choosing import plans_for
from invarlock.pipeline.planning.plans import check, export_of, keys_named, plans_of, weights_of
from invarlock.pipeline.planning.probing import Probe
from invarlock.pipeline.planning.retrying import Retries
from invarlock.pipeline.planning.searching import Search, check_held, check_target
from invarlock.pipeline.planning.sensitivities import check_measurable, sensitivities_or_none
from invarlock.pipeline.reference.kept import Reference
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.writing import write
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.quantization.model import quantize_weights
from invarlock.quantization.selection import PlannedWeight
from invarlock.reporting.report import SearchSection


def run(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder | None = None,
    strict: bool = False,
    ranks: Ranks = ALONE,
    on_progress: Progress = lambda stage, done, total: None,
    invocation: Invocation | None = None,
    frontier: bool = False,
    reference: Path | None = None,
) -> RunResult:
    """Load a model, measure it, quantize it under guard, and keep it, roll it back or abort.

    :param output: where the report and, if ``output.save_model`` is set, an accepted model go; None writes nothing.
    :param strict: a warning makes the exit code of the verdict 1.
    :param ranks: the processes that share the run; the first one writes.
    :param frontier: with ``edit.plan.bitwidth: auto``, measure plans of all sizes, and not those for a target.
    :param reference: folder of a reference (:func:`invarlock.pipeline.make_reference`) that holds the baseline's pass.
    :raises UsageError: for a mistake in the configuration or a broken input; nothing was written.
    :raises PluginError: when an adapter failed; nothing was written.

    Whatever is raised, Ctrl-C included, the model has been brought back to the baseline before.
    """
    inputs = [config.model.id, *([str(reference)] if reference else [])]
    with output.claimed(*inputs, ranks=ranks) if output else nullcontext():
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        held = Reference.for_one(reference, ranks)
        session = Session(config, plugins, on_progress, ranks, invocation, held)
        return _run(session, slots, strict, output, frontier)


def _run(
    session: Session, slots: Sequence[GuardSlot], strict: bool, output: OutputFolder | None, frontier: bool
) -> RunResult:
    config = session.config
    check_measurable(config, streamed=False, processes=session.ranks.size)
    check_target(config, frontier=frontier)
    export = export_of(config, session.plugins)
    if session.reference is None:
        session.documents()
    model, adapter = session.load(config.model.id, spread=True)
    loaded = Loaded.of(model, session.clock, by_mark=session.known_digests)
    weights_of(config, model)
    baseline = Baseline(session, model, adapter, wants_tokenizer=config.output.save_model)
    if export is not None:
        check(export, plans_of(config), model, baseline.tokenizer)
        if config.edit.is_searched:
            check_held(config, export, model, baseline.tokenizer)
    windows = baseline.make_windows(model)
    loaded.settle()
    keeper = Keeper(loaded, adapter)
    guarding = Guarding(session, baseline, windows, slots, strict)
    try:
        guarding.begin(model, keeper.baseline)
        folder = output.path if output else None
        plans = plans_for(guarding, keeper.baseline, partial(_rounded, keeper), export, folder, frontier=frontier)
        return judge(guarding, _Rounding(guarding, keeper, plans, export, output), keeper.baseline)
    except BaseException:
        # The others may not be there any more to look at a model that is spread over all of them.
        keeper.restore(check=baseline.view is None)
        raise


@contextmanager
def _rounded(keeper: Keeper, weights: Sequence[PlannedWeight]) -> Iterator[None]:
    """As ``Rounded``."""
    quantize_weights(weights, measure=False)
    yield
    keeper.restore()


class _Rounding:
    """Rounding in memory, by one plan an attempt; what two plans round alike is rounded once."""

    def __init__(
        self,
        guarding: Guarding,
        keeper: Keeper,
        plans: Retries | Search,
        export: Export | None,
        output: OutputFolder | None,
    ) -> None:
        self.name, self.model = guarding.config.edit.name, keeper.baseline.model
        self._guarding, self._keeper, self._export, self._output = guarding, keeper, export, output
        self._plans = plans
        self._rounded: dict[str, tuple[PlannedWeight, EditedWeight]] = {}
        """As the model has them now, by the name of the parameter."""

    @property
    def plan(self) -> Mapping[str, Any]:
        return self._plans.described

    def apply(self, number: int) -> Edited:
        weights, export, keeper = self._plans.weights(), self._export, self._keeper
        scale_dtype = export.exporter.scale_dtype if export else None
        if export is not None:
            export.take(self._plans.plan, weights)
        with self._guarding.session.clock.stage("quantize"), keys_named():
            self._restore_others(weights)
            new = [planned for planned in weights if planned.target.parameter_name not in self._rounded]
            effects = quantize_weights(
                new,
                parameters=export.quantized if export and export.exporter.stores_codes else None,
                scale_dtype=scale_dtype,
            )
        for planned, effect in zip(new, effects, strict=True):
            self._rounded[planned.target.parameter_name] = planned, effect

        def round_again() -> None:
            keeper.restore()
            quantize_weights(self._plans.weights(), measure=False, scale_dtype=scale_dtype)

        @contextmanager
        def bring_baseline() -> Iterator[torch.nn.Module]:
            keeper.restore()
            yield self.model
            with self._guarding.session.clock.stage("quantize"):
                quantize_weights(self._plans.weights(), measure=False, scale_dtype=scale_dtype)

        return Edited(
            self.model,
            keeper.baseline.edited(round_again),
            self.name,
            self.plan,
            [self._rounded[planned.target.parameter_name][1] for planned in weights],
            keeper.snapshot.parameters() if isinstance(keeper.snapshot, Snapshot) else None,
            bring_baseline=bring_baseline,
            bits_per_weight=self._plans.bits_per_weight,
        )

    def _restore_others(self, weights: Sequence[PlannedWeight]) -> None:
        """Restore what is rounded now, and not as a plan has it for these weights."""
        wanted = {planned.target.parameter_name: planned.scheme.alone for planned in weights}
        others = [name for name, (now, _) in self._rounded.items() if wanted.get(name) != now.scheme.alone]
        if others and isinstance(self._keeper.snapshot, Snapshot) and len(others) < len(self._rounded):
            self._keeper.snapshot.restore_only(others)
        elif others:
            self._restore_all()
            return
        for name in others:
            del self._rounded[name]
            if self._export is not None:
                self._export.quantized.pop(name, None)

    def revise(self, attempts: Sequence[Attempt]) -> bool:
        plans = self._plans
        if isinstance(plans, Retries) and plans.wants_sensitivities(attempts):
            # Those of the baseline, which later attempts go on from.
            self._restore_all()
            guarding, probe = self._guarding, Probe(self._guarding, self.model, partial(_rounded, self._keeper))
            found = sensitivities_or_none(guarding, plans.targets, probe)
            if found and not found.no_gradients:
                guarding.fisher = found.curvatures
            plans.learn(found)
        return plans.revise(attempts)

    def _restore_all(self) -> None:
        self._keeper.restore()
        self._rounded.clear()
        if self._export is not None:
            self._export.quantized.clear()

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
        if isinstance(self._plans, Search):
            self._plans.finished()

    @property
    def search(self) -> SearchSection | None:
        return self._plans.section if isinstance(self._plans, Search) else None
