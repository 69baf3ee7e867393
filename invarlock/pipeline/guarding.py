"""Guards, asked one by one about a baseline and about each edit of it, and the fold of their results to a verdict.

It calls hooks and knows no plugin by name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from invarlock.config.schema import RunConfig
from invarlock.core.errors import PluginError
from invarlock.core.results import Action, EditedWeight, Finding, GuardResult, PrepareResult, Verdict, fold
from invarlock.datasets.layout import Windows
from invarlock.datasets.windows import unreadable
from invarlock.distributed.parallel_map import asked_together
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.reach import never_ran, reach_taps
from invarlock.evaluation.results import MetricResult
from invarlock.evaluation.routing import routing_taps
from invarlock.models.facts import vocabulary_of
from invarlock.pipeline.attempts import Attempt, Edited
from invarlock.pipeline.calibration import Calibration
from invarlock.pipeline.coverage import coverage_of, of_edit, unreached
from invarlock.pipeline.keeping import Watched, some
from invarlock.pipeline.observing import changed_message, failures_named, observe, settings_kept, watching_of
from invarlock.pipeline.reference.facts import facts_of
from invarlock.pipeline.reference.kept import BaselinePass
from invarlock.pipeline.reference.noise import with_noise
from invarlock.pipeline.session import Baseline, Session, WindowPair
from invarlock.pipeline.stepping import Measured, Stepping, Watching
from invarlock.pipeline.suspects import blame
from invarlock.plugins.manager import GuardSlot
from invarlock.plugins.observation import Observation
from invarlock.reporting.report import CoverageSection, MetricsSection, WindowsSection

if TYPE_CHECKING:
    from invarlock.search.fisher import BaselineFisher, Fisher

log = logging.getLogger("invarlock")

Found = TypeVar("Found")

SHARED = ("baseline_weights", "tokenizers")
"""Entries of a guard's context that would take long to copy; a baseline's tokenizer that was changed is undone."""
NO_OUTPUTS = MetricsSection(None, None, None)
WEIGHTS_ALONE = "weights alone, no outputs were measured"


@dataclass
class Guarding:
    """The guards of one run, and what they and the passes learned of the baseline."""

    session: Session
    baseline: Baseline
    windows: WindowPair | None
    """None where outputs are not measured."""
    slots: Sequence[GuardSlot]
    strict: bool = False
    comparing: bool = False
    """The edited model is another checkpoint."""
    prepared: Sequence[PrepareResult] = ()
    fisher: Fisher | None = None
    """Curvature of the baseline on the preview windows, once it was measured."""
    sensitivities: BaselineFisher | None = None
    """The same from a few tokens; None while it was not asked for."""
    pass_again: str = ""
    """The reason that the baseline's pass was run in spite of a reference."""
    _stepping: Stepping | None = None
    """The passes; None where outputs are not measured."""
    _vocabulary: int = 0
    """Of the baseline, as ``_experts`` and ``_never_ran``."""
    _experts: Sequence[torch.Tensor | None] = ()
    """Of each layer of experts, which of them received a token of the preview windows."""
    _never_ran: frozenset[str] = frozenset()
    """Modules that no preview window reaches."""
    _observed: list[Observation] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.session.config

    # -- the baseline --------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True once all guards are prepared, and ready."""
        return all(prepared.ready for prepared in self.prepared)

    def begin(self, model: torch.nn.Module, watched: Watched, *, comes_back: bool = True) -> None:
        """Run the baseline over the first windows, or take its pass from a reference, and prepare the guards.

        :param comes_back: whether it can be run over more of them later; else it is run over all that are planned.
        """
        self._vocabulary = vocabulary_of(model)
        if not self._held(model, watched):
            self._measure(model, watched)
            if self._stepping and not comes_back:
                self._stepping.take_all(model)
        shown = self.baseline.shown(model)
        self.prepared = [
            min(self._asked(slot, partial(self._prepare, place, shown, watched)), key=lambda prepared: prepared.ready)
            for place, slot in enumerate(self.slots)
        ]

    def final_windows(self, count: int) -> Windows:
        """The first of the final windows."""
        assert self._stepping is not None
        return self._stepping.supply.between(0, count)

    @property
    def is_whole(self) -> bool:
        """True if a reference holds the baseline's pass, which then need not be run again."""
        return self.session.reference is not None and not self.pass_again

    def measure_baseline(self, model: torch.nn.Module, watched: Watched) -> tuple[WindowPair, BaselinePass]:
        """Run the baseline over all windows, with the guards' taps on it; no guard is prepared."""
        self._measure(model, watched)
        assert self._stepping is not None
        measured = self._stepping.complete(model)
        measured = replace(measured, observed=self._observed, never_ran=self._never_ran, experts=self._experts)
        return self._stepping.supply.made_yet, measured

    def _measure(self, model: torch.nn.Module, watched: Watched) -> None:
        """Run the baseline over the first windows."""
        observed = self.baseline.sees_preview and self.windows is not None
        routing, reached = (routing_taps(model), reach_taps(model)) if observed else ({}, {})
        self._observed, watching = watching_of(
            self.baseline, self.slots, model, "baseline pass", watched, self.windows, (routing, reached)
        )
        if self.windows:
            self._stepping = Stepping(self.baseline, self.windows, streamed=watched.streamed)
            self._stepping.begin(model, watching)
        self._never_ran = never_ran(model, reached)
        self._experts = [tap.result() for tap in dict.fromkeys(routing.values())]

    def _held(self, model: torch.nn.Module, watched: Watched) -> bool:
        """Take the baseline's pass from a reference; False where there is none, or it lacks what a guard observes.

        :raises InputError: it is of another baseline.
        """
        reference = self.session.reference
        if reference is None or self.windows is None:
            return False
        reference.check(facts_of(self.baseline, model, watched.digest), self.baseline.task, model)
        observed = reference.observations(
            self.slots, [observe(self.baseline, slot, model, watched) for slot in self.slots]
        )
        if isinstance(observed, str):
            log.warning("--reference: %s; the baseline's pass is run", observed)
            self.pass_again = observed
            return False
        held = reference.measured
        self._observed, self._never_ran, self._experts = observed, held.never_ran, held.experts
        self._stepping = Stepping(self.baseline, self.windows, streamed=watched.streamed, held=held)
        return True

    def _prepare(self, place: int, model: torch.nn.Module, watched: Watched) -> PrepareResult:
        slot, observed = self.slots[place], self._observed[place]
        calib = Calibration(copy.deepcopy(self.windows[0]) if self.windows else None, comparing=self.comparing)
        with settings_kept(), self.session.clock.guard(place, slot.name):
            prepared = self.session.plugins.prepare(slot, model, self.baseline.adapter, calib)
        if observed.message:
            prepared = PrepareResult.failed(observed.message, observed.trace)
        if changed := self.baseline.undo(watched):
            prepared = PrepareResult.failed(changed_message(changed))
        return prepared

    def _asked(self, slot: GuardSlot, ask: Callable[[], Found]) -> list[Found]:
        """Answers of a guard in each process that asks it: all where it shares its work or the model is spread."""
        ranks = self.session.ranks
        if self.baseline.view:
            return ranks.gather(ask())
        return asked_together(slot.name, ranks, ask) if slot.shares_work else [ranks.from_first(ask)]

    def not_ready(self, plan: Mapping[str, Any]) -> Attempt:
        """The abort before the edit, when a guard was not ready."""
        results = [self._described(place, self._unready_result(place)) for place in range(len(self.slots))]
        coverage = CoverageSection()
        if self._stepping:
            coverage = self._coverage(self._stepping.baseline_pass, self._stepping.measured)
        verdict = self._fold(results, [])
        return Attempt(1, plan.get("bitwidth"), [], results, NO_OUTPUTS, coverage, verdict, plan)

    def _unready_result(self, place: int) -> GuardResult:
        slot, prepared = self.slots[place], self.prepared[place]
        if prepared.error:
            return GuardResult.failed(slot.name, prepared.message or "", prepared.error)
        if prepared.ready:
            message = "not run: a guard was not ready, so no edit was judged"
            return GuardResult(slot.name, None, Action.CONTINUE, message)
        message = str(prepared.returned.get("message") or "not ready: prepare returned ready=False")
        return GuardResult(slot.name, False, Action.ABORT, message)

    # -- the edit ------------------------------------------------------------------------------------------------------

    def judge(self, edited: Edited, number: int = 1) -> Attempt:
        """Run the edited model over windows until the limits are certain, ask every guard, and fold.

        :param number: of the attempt, from 1.
        """
        model, watched = edited.model, edited.watched
        if edited.unreadable:
            self.windows = self._stepping = None
        windows = self._windows_for(edited)
        with failures_named(self.baseline, model, windows) if self.comparing else nullcontext():
            observed, watching = watching_of(self.baseline, self.slots, model, "edited pass", watched, windows)
            measured = self._measured(edited, watching, windows)
        metrics = self._compare(measured)
        if self.session.reference:
            metrics = with_noise(metrics, self.session.reference.noise)
        gaps = [*edited.gaps, *unreached(edited.modules, self._never_ran)]
        coverage = of_edit(CoverageSection(), gaps)
        if measured:
            equal = np.array_equal(measured.baseline.losses, measured.edited.losses)
            coverage = of_edit(self._coverage(measured.baseline, measured.judging.windows), gaps, equal=equal)
        context = self._context(edited, metrics.primary, number)
        shown = self.baseline.shown(model)
        results: list[GuardResult] = []
        for place, slot in enumerate(self.slots):
            if self.config.guards.fail_fast and any(not result.action.accepted for result in results):
                result = GuardResult(slot.name, None, Action.CONTINUE, "not run: guards.fail_fast")
            else:
                ask = partial(self._validate, place, shown, context, observed[place], watched)
                result = GuardResult.merged(self._asked(slot, ask))
            results.append(self._described(place, result))
        count = measured.judging.windows if measured else None
        findings = [*metrics.findings, *edited.findings]
        verdict = self._fold(results, findings, coverage.findings, edited.modules, windows=count)
        found = edited.modules, results, metrics, coverage, verdict
        return Attempt(number, edited.plan.get("bitwidth"), *found, edited.plan, edited.bits_per_weight)

    def _described(self, place: int, result: GuardResult) -> GuardResult:
        """A result with all that the report has of its guard."""
        plugin = self.slots[place].plugin
        return replace(
            result,
            origin=plugin.origin.value,
            version=plugin.version,
            prepare=self.prepared[place].returned,
            seconds=round(self.session.clock.guards[place], 4),
        )

    def _validate(
        self, place: int, model: torch.nn.Module, context: Mapping[str, Any], edited: Observation, watched: Watched
    ) -> GuardResult:
        """Ask one guard; a tap of its own that failed is its error, whatever it says, and so is a changed model."""
        slot, baseline = self.slots[place], self._observed[place]
        # Copies, but for the weights on disk: what one guard changes of them is nothing that the next one may see.
        own = {name: value if name in SHARED else copy.deepcopy(value) for name, value in context.items()}
        own["observations"] = {"baseline": baseline.results(), "edited": edited.results()}
        with settings_kept(), self.session.clock.guard(place, slot.name):
            result = self.session.plugins.validate(slot, model, self.baseline.adapter, own)
        if failed := next((observation for observation in (baseline, edited) if observation.message), None):
            result = GuardResult.failed(slot.name, failed.message or "", failed.trace)
        if changed := self.baseline.undo(watched):
            result = GuardResult.failed(slot.name, changed_message(changed))
        return result

    def _fold(
        self,
        results: Sequence[GuardResult],
        findings: Sequence[Finding],
        uncovered: Sequence[Finding] = (),
        weights: Sequence[EditedWeight] = (),
        *,
        windows: int | None = None,
    ) -> Verdict:
        """One verdict, the same in all processes, of what guards, outputs and the plugins around them gave.

        :param uncovered: come first: among warnings, what was not measured matters more than what was.
        :param windows: number of final windows that both models were run over; None where there was no edit.
        """
        said = [Finding.of_guard(result) for result in results if result.passed is not None]
        session = self.session
        besides = [*session.plugins.faults.take(), *session.changed_checkpoints()]
        found = dict.fromkeys(finding for part in session.ranks.gather(besides) for finding in part)
        verdict = fold([*uncovered, *said, *findings, *found], strict=self.strict)
        return replace(
            verdict,
            rests_on=rests_on(self.config, self.baseline.task.made_up, windows) if self.windows else WEIGHTS_ALONE,
            suspects=() if verdict.accepted else blame(results, weights),
        )

    def _context(self, edited: Edited, metric: MetricResult | None, number: int) -> dict[str, Any]:
        """The context of ``validate``; ``baseline`` and ``edited`` are None where no outputs were measured."""
        tokenizer = self.baseline.tokenizer if edited.tokenizer is None else edited.tokenizer
        return {
            "baseline": metric and {"kind": metric.kind, "value": metric.baseline},
            "edited": metric
            and {
                "kind": metric.kind,
                "value": metric.edited,
                "ratio": metric.ratio,
                "figure": metric.figure,
                "ci": metric.ci,
                "unit": metric.unit,
            },
            "edit": {"name": edited.name, "plan": edited.plan, "modules": [asdict(each) for each in edited.modules]},
            "limit": self.config.eval.max_pm_ratio,
            "attempt": number,
            "device": str(next(edited.model.parameters()).device),
            "rank": self.session.ranks.rank,
            "vocabulary": len(tokenizer) if tokenizer is not None else None,
            "tokenizers": {"baseline": self.baseline.tokenizer, "edited": tokenizer},
            "baseline_weights": edited.baseline_weights,
        }

    def confirm(self, watched: Watched) -> None:
        """Make sure that what was judged is still what there is, before it is saved.

        :raises PluginError: a plugin changed it after the last guard had been asked.
        """
        plugins = self.session.plugins
        if faults := plugins.faults.take():
            raise PluginError("; ".join(f"{fault.source}: {fault.message}" for fault in faults))
        if changed := self.baseline.undo(watched, at_the_end=True):
            who = ", ".join(plugins.that_saw_the_end()) or "a plugin that kept it"
            raise PluginError(f"{who}: the model changed after it had been judged ({some(changed)}); nothing is saved")
        for finding in self.session.changed_checkpoints():
            log.warning("%s", finding.message)

    # -- passes --------------------------------------------------------------------------------------------------------

    def _windows_for(self, edited: Edited) -> WindowPair | None:
        """Windows that an edited model begins with: the baseline's, or those of the same text."""
        if self.windows is None or edited.same_text is None:
            return self.windows
        # The same ids on both sides, if both know them: guards compare what one input becomes.
        preview = self.windows[0] if unreadable(self.windows[0], edited.model) is None else self.windows[0][:0]
        return preview, edited.same_text.windows

    def _measured(self, edited: Edited, watching: Watching, windows: WindowPair | None) -> Measured | None:
        if self._stepping is None or windows is None:
            return None
        return self._stepping.judge(
            edited.model,
            watching,
            changed=any(weight.is_changed for weight in edited.modules),
            preview=windows[0],
            same_text=edited.same_text,
            bring_baseline=edited.bring_baseline,
        )

    def _compare(self, measured: Measured | None) -> MetricsSection:
        """The two voices of the outputs: the loss, and the predictions token by token."""
        if measured is None:
            return NO_OUTPUTS
        found = self.baseline.task.compare(measured.baseline, measured.edited, measured.judging)
        before, after = found.passes
        sizes = None if before.bytes is None else before.bytes.tolist()
        stopping, count = measured.judging.stopping, len(before.tokens)
        units = stopping.units(count).tolist() if stopping and stopping.documents is not None else None
        windows = WindowsSection(before.tokens.tolist(), before.losses.tolist(), after.losses.tolist(), sizes, units)
        return MetricsSection(found.primary, found.predictions, windows, list(found.figures), measured.path)

    def _coverage(self, baseline: PassResult, count: int) -> CoverageSection:
        """Of the baseline, by the windows that its pass was over."""
        assert self._stepping is not None
        return coverage_of(
            self.baseline.declared,
            (self._stepping.supply.preview, self._stepping.supply.between(0, count)),
            vocabulary=self._vocabulary,
            tokenizer=self.baseline.tokenizer,
            template=self.baseline.template,
            dataset=self.baseline.dataset.counted(count),
            task=self.baseline.task,
            perplexity=baseline.perplexity,
            experts=self._experts,
        )


def rests_on(config: RunConfig, made_up: str, windows: int | None) -> str:
    """Outputs that the verdict rests on, where any were measured.

    :param made_up: the samples of the task where there is no data; empty where the baseline writes its own text.
    :param windows: number of final windows that both models were run over; None where there was no edit.
    """
    dataset = config.dataset
    source = f"windows of {made_up}" if made_up else "windows that the baseline wrote"
    final = f"up to {dataset.max_n}" if dataset.is_stepped else dataset.final_n
    source = source if dataset.is_generated else "windows of the dataset"
    return f"{dataset.preview_n} + {final if windows is None else windows} {source}"
