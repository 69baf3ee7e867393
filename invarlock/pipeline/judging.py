"""What a run and a comparison share: one pass a side, guards asked one by one, and the fold to a verdict.

It calls hooks and knows no plugin by name.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from invarlock.config.schema import RunConfig
from invarlock.core.errors import PluginError, UsageError
from invarlock.core.results import Action, Finding, GuardResult, PrepareResult, Verdict, fold
from invarlock.datasets.layout import Windows
from invarlock.datasets.windows import make_windows
from invarlock.distributed.dtensor import Sharding, sharding_of
from invarlock.distributed.gathered_view import WholeView
from invarlock.distributed.parallel_map import asked_together
from invarlock.distributed.process_group import Ranks
from invarlock.evaluation.divergence import DivergenceResult, compare_predictions
from invarlock.evaluation.metric import Kind, MetricResult, compare, kind_of
from invarlock.evaluation.passes import PassResult, measure
from invarlock.evaluation.predictions import TokenRecord
from invarlock.models.facts import Task, batch_size, task_of
from invarlock.models.state import ModelState
from invarlock.pipeline.attempts import Attempt
from invarlock.pipeline.calibration import Calibration
from invarlock.pipeline.clock import Clock, Progress
from invarlock.pipeline.inputs import Inputs
from invarlock.pipeline.keeping import some
from invarlock.pipeline.settings import settings_kept
from invarlock.pipeline.tokenizer import LoadedTokenizer
from invarlock.plugins.adapter import Adapter
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.plugins.observation import Observation
from invarlock.plugins.plugin import Origin

log = logging.getLogger("invarlock")

Found = TypeVar("Found")

Undo = Callable[[], list[str]]
"""Undoes what was changed of a model, and names it."""
Settle = Callable[[], None]
"""Takes note of what a model's own code has changed of it."""


@dataclass
class Judge:
    """The guards of one run, the windows, and what the baseline measured."""

    config: RunConfig
    plugins: PluginManager
    slots: list[GuardSlot]
    strict: bool
    on_progress: Progress
    ranks: Ranks = field(default_factory=Ranks)
    clock: Clock = field(init=False)
    inputs: Inputs = field(init=False)
    sharding: Sharding | None = None
    view: WholeView | None = None
    """Of a model that is spread over the processes."""
    view_state: ModelState | None = None
    _tokenizer: LoadedTokenizer | None = None
    _documents: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.clock = Clock(self.on_progress)
        self.inputs = Inputs(self.ranks, self.clock)

    # -- loading -------------------------------------------------------------------------------------------------------

    def load(self, model_id: str, *, stream: bool = False, spread: bool = False) -> tuple[torch.nn.Module, Adapter]:
        """Load a checkpoint as ``model`` of the configuration says.

        :param stream: leave its weights on disk, to be read at each use.
        :param spread: spread its weights over the processes, if there are several and ``model.parallel`` says so.
        :raises UsageError: also when weights are offloaded: they could be neither edited nor judged in memory.
        """
        section = self.config.model
        self.inputs.take_note_of(Path(model_id))
        torch.manual_seed(self.config.dataset.seed)
        options = {"dtype": section.dtype, **self.trust, **({"stream": True} if stream else {})}
        if spread and self.ranks.size > 1 and section.parallel != "windows":
            options["parallel"] = section.parallel
        with self.clock.stage("load"):
            model, adapter = self.plugins.load_model(section.adapter, model_id, section.device, options)
        if not isinstance(model, torch.nn.Module):
            raise PluginError(
                f"adapter {adapter.name}: load_model returned {type(model).__name__}, not a torch.nn.Module"
            )
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":
                raise UsageError(
                    f"model.device: {name} is offloaded (on the meta device) and cannot be quantized in place; "
                    "load the whole model onto devices"
                )
        return model, adapter

    @property
    def trust(self) -> dict[str, Any]:
        section = self.config.model
        return {"trust_remote_code": section.trust_remote_code, "revision": section.revision}

    def begin(
        self,
        model: torch.nn.Module,
        adapter: Adapter,
        *,
        wants_tokenizer: bool = False,
        reads_text: bool | None = None,
    ) -> None:
        """Take a loaded baseline.

        :param wants_tokenizer: load the tokenizer if there is one, even if no text has to be read with it.
        :param reads_text: whether windows are made with the tokenizer; None leaves it to the dataset and the task.
        """
        self.adapter = adapter
        self.sharding = sharding_of(model)
        if self.sharding:
            self.view = WholeView(model)
            self.view_state = ModelState.of(self.view.model)
        self.description = adapter.describe(self._shown(model))
        self.task: Task = task_of(model)
        self.kind: Kind = kind_of(self.task, self.config.eval.metric.kind)
        needs_text = not self.config.dataset.is_generated or self.task == "masked"
        self.reads_text = needs_text if reads_text is None else reads_text
        if self.reads_text or wants_tokenizer:
            model_id = self.config.model.id
            self._tokenizer = LoadedTokenizer(adapter, model_id, self.trust, required=self.reads_text)

    @property
    def tokenizer(self) -> Any:
        """The baseline's, or None where there is none or nobody needs it."""
        return self._tokenizer.live if self._tokenizer else None

    def _shown(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model as guards see it."""
        return self.view.model if self.view else model

    def documents(self) -> Sequence[str] | None:
        """The text of the dataset, None where the baseline writes it; called before a model is loaded to fail early."""
        dataset = self.config.dataset
        if self._documents is None and not dataset.is_generated:
            with self.clock.stage("load"):
                self._documents = self.plugins.documents(dataset)
        return self._documents

    def make_windows(self, model: torch.nn.Module) -> None:
        documents = self.documents()
        with self.clock.stage("windows"):
            tokenizer = self.tokenizer if self.reads_text else None
            self.windows: tuple[Windows, Windows] | None = make_windows(
                self.config.dataset, model, tokenizer, task=self.task, documents=documents
            )
        self._documents = None

    # -- the baseline --------------------------------------------------------------------------------------------------

    def measure_baseline(self, model: torch.nn.Module, undo: Undo = list, settle: Settle = lambda: None) -> None:
        """Run the baseline over the windows once.

        :param undo: called after each guard that asked for taps.
        :param settle: called once the model alone has run.
        """
        self.record: TokenRecord | None = None
        self.baseline_observed, self.baseline_pass = self._observed_pass(model, "baseline pass", undo, settle=settle)

    def _whole_undo(self, undo: Undo) -> Undo:
        """Function that undoes changes of all that guards can reach: the model as they see it, and the tokenizer."""

        def undo_all() -> list[str]:
            of_tokenizer = self._tokenizer.undo() if self._tokenizer else []
            if self.view and self.view_state:
                return [*self.view_state.undo(), *self.view.undo(), *of_tokenizer]
            return [*undo(), *of_tokenizer]

        return undo_all

    def confirm(self, undo: Undo) -> None:
        """Make sure that what was judged is still what there is, before it is saved.

        :raises PluginError: a plugin changed it after the last guard had been asked.
        """
        if faults := self.plugins.faults.take():
            raise PluginError("; ".join(f"{fault.source}: {fault.message}" for fault in faults))
        if changed := self._whole_undo(undo)():
            who = ", ".join(self.plugins.that_saw_the_end()) or "a plugin that kept it"
            raise PluginError(f"{who}: the model changed after it had been judged ({some(changed)}); nothing is saved")
        for finding in self.inputs.changes():
            log.warning("%s", finding.message)

    def prepare(self, model: torch.nn.Module, undo: Undo) -> bool:
        """Prepare the guards one by one.

        :param undo: called after each.
        :returns: whether all are ready.
        """
        shown, undo = self._shown(model), self._whole_undo(undo)
        self.prepared = [
            min(self._asked(slot, partial(self._prepare, place, shown, undo)), key=lambda prepared: prepared.ready)
            for place, slot in enumerate(self.slots)
        ]
        return all(prepared.ready for prepared in self.prepared)

    def _prepare(self, place: int, model: torch.nn.Module, undo: Undo) -> PrepareResult:
        calib, observed = (
            Calibration(copy.deepcopy(self.windows[0]) if self.windows else None),
            self.baseline_observed[place],
        )
        with settings_kept(), self.clock.guard(place, self.slots[place].name):
            prepared = self.plugins.prepare(self.slots[place], model, self.adapter, calib)
        if observed.message:
            prepared = PrepareResult.failed(observed.message, observed.trace)
        if changed := undo():
            prepared = PrepareResult.failed(changed_message(changed))
        return prepared

    def _asked(self, slot: GuardSlot, ask: Callable[[], Found]) -> list[Found]:
        """What each process that asks a guard is told: all where it shares its work or the model is spread."""
        if self.view:
            return self.ranks.gather(ask())
        return asked_together(slot.name, self.ranks, ask) if slot.shares_work else [self.ranks.from_first(ask)]

    def not_ready(self) -> Attempt:
        """The abort before the edit, when a guard was not ready."""
        results = [
            self._unready_result(slot, prepared) for slot, prepared in zip(self.slots, self.prepared, strict=True)
        ]
        return Attempt(1, self.config.edit.plan.bitwidth, [], results, None, None, None, self._fold(results, []))

    def _unready_result(self, slot: GuardSlot, prepared: PrepareResult) -> GuardResult:
        if prepared.error:
            return GuardResult.failed(slot.name, prepared.message or "", prepared.error)
        if prepared.ready:
            return GuardResult(
                slot.name, None, Action.CONTINUE, "not run: a guard was not ready, so no edit was judged"
            )
        message = str(prepared.returned.get("message") or "not ready: prepare returned ready=False")
        return GuardResult(slot.name, False, Action.ABORT, message)

    # -- the edit ------------------------------------------------------------------------------------------------------

    def judge(
        self,
        model: torch.nn.Module,
        edit: Mapping[str, Any],
        undo: Undo,
        *,
        settle: Settle = lambda: None,
        number: int = 1,
        bitwidth: int | None = None,
        modules: Sequence[Any] = (),
        baseline_weights: Mapping[str, torch.Tensor] | None = None,
        findings: Iterable[Finding] = (),
    ) -> Attempt:
        """Run the edited model over the windows once, ask every guard, and fold.

        :param edit: what guards get to know of the edit.
        :param undo: called after each guard.
        :param settle: called once the model alone has run.
        :param baseline_weights: the baseline's parameters by name, read from disk one at a time.
        :param findings: what was found besides.
        """
        observed, edited_pass = self._observed_pass(model, "edited pass", undo, self.record, settle)
        metric, divergence = self._compare(edited_pass)
        context = self._context(model, edit, metric, number) | {"baseline_weights": baseline_weights}
        shown, undo = self._shown(model), self._whole_undo(undo)
        results: list[GuardResult] = []
        for place, slot in enumerate(self.slots):
            if self.config.guards.fail_fast and any(not result.action.accepted for result in results):
                results.append(GuardResult(slot.name, None, Action.CONTINUE, "not run: guards.fail_fast"))
            else:
                ask = partial(self._validate, place, shown, context, observed[place], undo)
                results.append(GuardResult.merged(self._asked(slot, ask)))
        outputs = []
        if metric and divergence:
            outputs = [
                Finding("primary metric", metric.action, metric.message),
                Finding("predictions", divergence.action, divergence.message),
            ]
        verdict = self._fold(results, [*outputs, *findings])
        return Attempt(number, bitwidth, modules, results, metric, divergence, edited_pass, verdict)

    def _validate(
        self,
        place: int,
        model: torch.nn.Module,
        context: Mapping[str, Any],
        edited: Observation,
        undo: Undo,
    ) -> GuardResult:
        """Ask one guard; a tap of its own that failed is its error, whatever it says, and so is a changed model."""
        slot, baseline = self.slots[place], self.baseline_observed[place]
        observations = {"baseline": baseline.results(), "edited": edited.results()}
        # Copies: what one guard changes of them is nothing that the next one may see.
        shared = ("baseline_weights",)
        own = {name: value if name in shared else copy.deepcopy(value) for name, value in context.items()}
        own["observations"] = observations
        with settings_kept(), self.clock.guard(place, slot.name):
            result = self.plugins.validate(slot, model, self.adapter, own)
        if failed := next((observation for observation in (baseline, edited) if observation.message), None):
            result = GuardResult.failed(slot.name, failed.message or "", failed.trace)
        if changed := undo():
            result = GuardResult.failed(slot.name, changed_message(changed))
        return result

    def _fold(self, results: Sequence[GuardResult], findings: Sequence[Finding]) -> Verdict:
        """One verdict, the same in all processes, of what guards, outputs and the plugins around them gave."""
        said = [Finding.of_guard(result) for result in results if result.passed is not None]
        besides = [*self.plugins.faults.take(), *self.inputs.changes()]
        found = dict.fromkeys(finding for part in self.ranks.gather(besides) for finding in part)
        return fold([*said, *findings, *found], strict=self.strict)

    def _context(
        self, model: torch.nn.Module, edit: Mapping[str, Any], metric: MetricResult | None, number: int
    ) -> dict[str, Any]:
        """What every guard gets to know; ``baseline`` and ``edited`` are None where no outputs were measured."""
        return {
            "baseline": metric and {"kind": metric.kind, "value": metric.baseline},
            "edited": metric and {"kind": metric.kind, "value": metric.edited, "ratio": metric.ratio, "ci": metric.ci},
            "edit": edit,
            "limit": self.config.eval.max_pm_ratio,
            "attempt": number,
            "device": str(next(model.parameters()).device),
            "rank": self.ranks.rank,
            "vocabulary": len(self.tokenizer) if self.tokenizer is not None else None,
        }

    # -- passes --------------------------------------------------------------------------------------------------------

    def _observed_pass(
        self,
        model: torch.nn.Module,
        stage: str,
        undo: Undo,
        reference: TokenRecord | None = None,
        settle: Settle = lambda: None,
    ) -> tuple[list[Observation], PassResult | None]:
        """One forward pass over all windows: what it measured, and what the taps of each guard collect on the way.

        Processes share the final windows; the preview ones, which are the guards', are the first one's, or everybody's
        where the model is spread over them.
        """
        guarding = self.ranks.is_first or self.sharding is not None
        undo = self._whole_undo(undo)
        observations = [self._observe(slot, model, undo) if guarding else Observation() for slot in self.slots]
        if self.windows is None:
            return observations, None
        preview, final = self.windows
        strangers = self._strangers_tapping(observations)
        if strangers and self.sharding is None:
            # What their taps change must not be taken for the model's own doing: it runs once without them.
            measure(model, preview[:0], final[:1], task=self.task)
            settle()
        share, calls = self._share_of(final, ahead=0 if self.sharding else len(preview), model=model)
        with self.clock.stage(stage) as shown:
            measured = measure(
                model,
                preview if guarding else preview[:0],
                final[share],
                task=self.task,
                taps=[observation.taps for observation in observations],
                reference=reference,
                calls=calls,
                taps_off=partial(self._check_taps, strangers, stage, undo) if strangers else settle,
                on_progress=shown if self.sharding is Sharding.TENSOR else self.ranks.summed(shown),
            )
            self.record = measured.record or self.record
            parts = self.ranks.gather(dataclasses.replace(measured, record=None))
        # Under tensor parallelism all processes have measured the same.
        return observations, PassResult.joined(parts[:1] if self.sharding is Sharding.TENSOR else parts)

    def _observe(self, slot: GuardSlot, model: torch.nn.Module, undo: Undo) -> Observation:
        """Ask a guard for its taps: a hook that it puts on the model itself could change what the pass measures."""
        with settings_kept():
            observation = self.plugins.observe(slot, self._shown(model), self.adapter)
        if self.plugins.watches(slot) and (changed := undo()):
            observation.fail("observe", PluginError(changed_message(changed)))
            observation.wanted = {}
        return observation

    def _strangers_tapping(self, observations: Sequence[Observation]) -> list[str]:
        """Guards that are not built in and have asked for taps."""
        tapping = [slot for slot, observed in zip(self.slots, observations, strict=True) if observed.wanted]
        return [slot.name for slot in tapping if slot.plugin.origin is not Origin.BUILTIN]

    def _check_taps(self, strangers: Sequence[str], stage: str, undo: Undo) -> None:
        """Make sure that no tap changed the model during a pass.

        :raises PluginError: one did; whose it is cannot be told.
        """
        if changed := undo():
            raise PluginError(f"taps of {', '.join(strangers)}: the model changed in the {stage}: {some(changed)}")

    def _share_of(self, final: Windows, *, ahead: int, model: torch.nn.Module) -> tuple[slice, int]:
        """This process's part of the final windows, and how often all of them have to run the model."""
        if self.sharding is Sharding.TENSOR:
            return slice(None), 0
        share = self.ranks.share(len(final), ahead=ahead)
        if self.sharding is None:
            return share, 0
        most = -(-len(final) // self.ranks.size)
        return share, -(-most // batch_size(model, final.length))

    def _compare(self, edited_pass: PassResult | None) -> tuple[MetricResult, DivergenceResult] | tuple[None, None]:
        """The two voices of the outputs: the loss, and the predictions token by token."""
        if self.baseline_pass is None or edited_pass is None:
            return None, None
        section = self.config.eval
        metric = compare(
            self.baseline_pass,
            edited_pass,
            kind=self.kind,
            limit=section.max_pm_ratio,
            level=section.metric.ci_level,
            reps=section.metric.reps,
            seed=self.config.dataset.seed,
        )
        return metric, compare_predictions(self.baseline_pass, edited_pass, ratio=section.max_pm_ratio)


def changed_message(names: Sequence[str]) -> str:
    return f"the guard changed the model ({some(names)}); the change was undone"
