"""Guards, asked one by one about a baseline and about each edit of it, and the fold of their results to a verdict.

It calls hooks and knows no plugin by name.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from invarlock.config.schema import RunConfig
from invarlock.core.errors import PluginError
from invarlock.core.results import Action, EditedWeight, Finding, GuardResult, PrepareResult, Verdict, fold
from invarlock.datasets.same_text import SameText
from invarlock.datasets.windows import unreadable
from invarlock.distributed.parallel_map import asked_together
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.per_byte import over_same_text
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.reach import never_ran, reach_taps
from invarlock.evaluation.results import MetricResult
from invarlock.evaluation.routing import routing_taps
from invarlock.models.facts import vocabulary_of
from invarlock.pipeline.attempts import Attempt, Edited
from invarlock.pipeline.calibration import Calibration
from invarlock.pipeline.coverage import coverage_of, of_edit, unreached
from invarlock.pipeline.keeping import Watched, some
from invarlock.pipeline.own_tokenizer import PER_BYTE
from invarlock.pipeline.session import Baseline, Session, WindowPair
from invarlock.pipeline.suspects import blame
from invarlock.pipeline.tasks import judging_of
from invarlock.plugins.manager import GuardSlot
from invarlock.plugins.observation import Observation
from invarlock.plugins.plugin import Origin
from invarlock.reporting.report import CoverageSection, MetricsSection, WindowsSection

if TYPE_CHECKING:
    from invarlock.search.fisher import Fisher

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
    prepared: Sequence[PrepareResult] = ()
    baseline_pass: PassResult | None = None
    fisher: Fisher | None = None
    """Curvature of the baseline, once it was measured."""
    coverage: CoverageSection = field(default_factory=CoverageSection)
    """Of the baseline."""
    _never_ran: frozenset[str] = frozenset()
    """Modules of the baseline that no preview window reaches."""
    _record: TokenRecord | None = None
    _observed: list[Observation] = field(default_factory=list)

    @property
    def config(self) -> RunConfig:
        return self.session.config

    # -- the baseline --------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """True once all guards are prepared, and ready."""
        return all(prepared.ready for prepared in self.prepared)

    def begin(self, model: torch.nn.Module, watched: Watched) -> None:
        """Run the baseline over the windows once, and prepare the guards one by one."""
        observed = self.baseline.sees_preview and self.windows is not None
        routing, reached = (routing_taps(model), reach_taps(model)) if observed else ({}, {})
        self._observed, self.baseline_pass = self._observed_pass(
            model, "baseline pass", watched, own=(routing, reached)
        )
        self._never_ran = never_ran(model, reached)
        if self.windows and self.baseline_pass:
            self.coverage = coverage_of(
                self.baseline.declared,
                self.windows,
                vocabulary=vocabulary_of(model),
                tokenizer=self.baseline.tokenizer,
                template=self.baseline.template,
                dataset=self.config.dataset,
                task=self.baseline.task,
                perplexity=self.baseline_pass.perplexity,
                experts=[tap.result() for tap in dict.fromkeys(routing.values())],
            )
        shown = self.baseline.shown(model)
        self.prepared = [
            min(self._asked(slot, partial(self._prepare, place, shown, watched)), key=lambda prepared: prepared.ready)
            for place, slot in enumerate(self.slots)
        ]

    def _prepare(self, place: int, model: torch.nn.Module, watched: Watched) -> PrepareResult:
        slot, observed = self.slots[place], self._observed[place]
        calib = Calibration(copy.deepcopy(self.windows[0]) if self.windows else None)
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
        verdict = self._fold(results, [])
        return Attempt(1, plan.get("bitwidth"), [], results, NO_OUTPUTS, self.coverage, verdict, plan)

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
        """Run the edited model over the windows once, ask every guard, and fold.

        :param number: of the attempt, from 1.
        """
        model, watched = edited.model, edited.watched
        if edited.unreadable:
            self.windows = None
        observed, edited_pass = self._observed_pass(model, "edited pass", watched, edited.same_text)
        metrics = self._compare(edited_pass, edited.same_text)
        gaps = [*edited.gaps, *unreached(edited.modules, self._never_ran)]
        coverage = of_edit(self.coverage, gaps, (self.baseline_pass, edited_pass))
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
        verdict = self._fold(results, [*metrics.findings, *edited.findings], coverage.findings, edited.modules)
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
    ) -> Verdict:
        """One verdict, the same in all processes, of what guards, outputs and the plugins around them gave.

        :param uncovered: come first: among warnings, what was not measured matters more than what was.
        """
        said = [Finding.of_guard(result) for result in results if result.passed is not None]
        session = self.session
        besides = [*session.plugins.faults.take(), *session.changed_checkpoints()]
        found = dict.fromkeys(finding for part in session.ranks.gather(besides) for finding in part)
        verdict = fold([*uncovered, *said, *findings, *found], strict=self.strict)
        return replace(
            verdict,
            rests_on=rests_on(self.config, self.baseline.task.made_up) if self.windows else WEIGHTS_ALONE,
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
        if changed := self.baseline.undo(watched):
            who = ", ".join(plugins.that_saw_the_end()) or "a plugin that kept it"
            raise PluginError(f"{who}: the model changed after it had been judged ({some(changed)}); nothing is saved")
        for finding in self.session.changed_checkpoints():
            log.warning("%s", finding.message)

    # -- passes --------------------------------------------------------------------------------------------------------

    def _observed_pass(
        self,
        model: torch.nn.Module,
        stage: str,
        watched: Watched,
        same_text: SameText | None = None,
        own: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[list[Observation], PassResult | None]:
        """One pass over all windows: what it measured, and what the taps of each guard collect on the way.

        :param same_text: final windows in place of the baseline's; guards see the baseline's preview windows even so.
        :param own: taps of our own.
        :raises PluginError: a tap changed the model; whose it is cannot be told.
        """
        observing = self.baseline.sees_preview
        observations = [self._observe(slot, model, watched) if observing else Observation() for slot in self.slots]
        windows = self.windows
        if windows is None:
            return observations, None
        if same_text is not None:
            # The same ids on both sides, if both know them: guards compare what one input becomes.
            preview = windows[0] if unreadable(windows[0], model) is None else windows[0][:0]
            windows = preview, same_text.windows
        tapping = [slot for slot, observed in zip(self.slots, observations, strict=True) if observed.wanted]
        strangers = [slot.name for slot in tapping if slot.plugin.origin is not Origin.BUILTIN]
        if strangers and not self.baseline.sharding:
            # What their taps change must not be taken for the model's own doing: it runs once without them.
            self.baseline.run_alone(model, windows)
            watched.settle()

        def taps_off() -> None:
            if not strangers:
                watched.settle()
            elif changed := self.baseline.undo(watched):
                raise PluginError(f"taps of {', '.join(strangers)}: the model changed in the {stage}: {some(changed)}")

        measured, record = self.baseline.run_pass(
            model,
            windows,
            stage,
            taps=[*(observation.taps for observation in observations), *own],
            reference=None if same_text else self._record,
            taps_off=taps_off,
        )
        self._record = record or self._record
        return observations, measured

    def _observe(self, slot: GuardSlot, model: torch.nn.Module, watched: Watched) -> Observation:
        """Ask a guard for its taps: a hook that it puts on the model itself could change what the pass measures."""
        plugins = self.session.plugins
        with settings_kept():
            observation = plugins.observe(slot, self.baseline.shown(model), self.baseline.adapter)
        if plugins.watches(slot) and (changed := self.baseline.undo(watched)):
            observation.fail("observe", PluginError(changed_message(changed)))
            observation.wanted = {}
        return observation

    def _compare(self, edited: PassResult | None, same_text: SameText | None) -> MetricsSection:
        """The two voices of the outputs: the loss, and the predictions token by token."""
        baseline = self.baseline_pass
        if baseline is None or edited is None:
            return NO_OUTPUTS
        if same_text is not None:
            ends = same_text.baseline_ends.numpy(), same_text.ends.numpy()
            predicted = PER_BYTE[self.baseline.task.name]
            baseline, edited = over_same_text((baseline, ends[0]), (edited, ends[1]), task=predicted)
        found = self.baseline.task.compare(baseline, edited, judging_of(self.config))
        before, after = found.passes
        sizes = None if before.bytes is None else before.bytes.tolist()
        windows = WindowsSection(before.tokens.tolist(), before.losses.tolist(), after.losses.tolist(), sizes)
        return MetricsSection(found.primary, found.predictions, windows, list(found.figures))


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put torch's defaults and Python's recursion limit back after the block: the next guard must not inherit them."""
    dtype, device, gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    depth = sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.setrecursionlimit(depth)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_default_device() != device:
            # None, not the CPU: torch would go on looking at every call, as it does for any device but none.
            torch.set_default_device(None if device.type == "cpu" else device)


def rests_on(config: RunConfig, made_up: str) -> str:
    """Outputs that the verdict rests on, where any were measured.

    :param made_up: the samples of the task where there is no data; empty where the baseline writes its own text.
    """
    dataset = config.dataset
    source = f"windows of {made_up}" if made_up else "windows that the baseline wrote"
    return f"{dataset.preview_n} + {dataset.final_n} {source if dataset.is_generated else 'windows of text'}"


def changed_message(names: Sequence[str]) -> str:
    return f"the guard changed the model ({some(names)}); the change was undone"
