"""One run, stage by stage. It calls hooks and knows no plugin by name."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import logging
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from invarlock import __version__
from invarlock.checkpoints.writing import OutputFolder, write_text
from invarlock.config.schema import PlanConfig, RunConfig
from invarlock.core.errors import PluginError, UsageError, one_line
from invarlock.core.results import Action, Finding, GuardResult, Verdict, fold, plain
from invarlock.core.snapshots import Fingerprint
from invarlock.evaluation.layout import Windows
from invarlock.evaluation.metric import Kind, MetricResult, compare, kind_of
from invarlock.evaluation.models import Task, task_of
from invarlock.evaluation.passes import PassResult, measure
from invarlock.evaluation.windows import make_windows
from invarlock.plugins.manager import GuardSlot, PluginManager, Prepared
from invarlock.plugins.observation import Observation
from invarlock.quantization.model import QuantizedWeight, quantize_model
from invarlock.quantization.scheme import Plan, Scheme
from invarlock.quantization.selection import select_targets
from invarlock.reporting import report as reporting

log = logging.getLogger("invarlock")

Progress = Callable[[str, int, int], None]
"""Called with the stage, what is done of it and how much there is."""


@dataclass(frozen=True)
class RunResult:
    """The report as ``report.json`` holds it, and the model: edited if it was accepted, else the baseline."""

    report: dict[str, Any]
    model: torch.nn.Module


def run(
    config: RunConfig,
    plugins: PluginManager,
    *,
    output: OutputFolder | None = None,
    strict: bool = False,
    on_progress: Progress | None = None,
) -> RunResult:
    """Load a model, measure it, quantize it under guard, and keep it, roll it back or abort.

    :param output: where the report and, if ``output.save_model`` is set, an accepted model go; None writes nothing.
    :param strict: a warning makes the exit code of the verdict 1.
    :raises UsageError: for a mistake in the configuration or a broken input; nothing was written.
    :raises PluginError: when an adapter failed; nothing was written.

    Whatever is raised, Ctrl-C included, the model has been brought back to the baseline before.
    """
    plans = _plans(config)
    if output is not None:
        output.check(config.model.id)
    slots = plugins.guard_slots(config.guards.order, config.guards.options)
    return _Run(config, plugins, slots, plans, strict, on_progress or (lambda stage, done, total: None)).go(output)


def _plans(config: RunConfig) -> list[Plan]:
    """The plan of each attempt: after a rollback one more bit, up to 8."""
    plan = config.edit.plan
    widths = range(plan.bitwidth, min(8, plan.bitwidth + config.edit.retry.max_attempts - 1) + 1)
    return [_plan(dataclasses.replace(plan, bitwidth=width)) for width in widths]


def _plan(plan: PlanConfig) -> Plan:
    return Plan(
        Scheme(plan.bitwidth, plan.symmetric, plan.per_channel, plan.group_size, plan.clamp_ratio),
        scope=plan.scope,
        include=plan.include,
        exclude=plan.exclude,
        max_modules=plan.max_modules,
    )


@dataclass
class _Attempt:
    """One edit and what was said of it."""

    number: int
    bitwidth: int
    modules: list[QuantizedWeight]
    results: list[GuardResult]
    metric: MetricResult | None
    verdict: Verdict


@dataclass
class _Run:
    config: RunConfig
    plugins: PluginManager
    slots: list[GuardSlot]
    plans: list[Plan]
    strict: bool
    on_progress: Progress
    timings: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    guard_seconds: dict[int, float] = field(default_factory=lambda: defaultdict(float))

    def go(self, output: OutputFolder | None) -> RunResult:
        with self.stage("load"):
            self.load()
        with self.stage("windows"):
            tokenizer = self.tokenizer if self.reads_text else None
            self.preview, self.final = make_windows(self.config.dataset, self.model, tokenizer, task=self.task)
        with self.stage("snapshot"):
            self.baseline_print = Fingerprint.of(self.model)
            self.snapshot = self.adapter.snapshot(self.model)
        try:
            attempts = self.judge()
            accepted = attempts[-1].verdict.accepted
            report = self.report(attempts)
            self.plugins.run_finished(report)
            if output is not None:
                self.write(report, output, accepted)
        except BaseException:
            self.restore()
            raise
        return RunResult(report, self.model)

    # -- before the edit -----------------------------------------------------------------------------------------------

    def load(self) -> None:
        section = self.config.model
        torch.manual_seed(self.config.dataset.seed)
        trust = {"trust_remote_code": section.trust_remote_code, "revision": section.revision}
        self.model, self.adapter = self.plugins.load_model(
            section.adapter, section.id, section.device, {"dtype": section.dtype, **trust}
        )
        _refuse_offloaded(self.model)
        self.description = self.adapter.describe(self.model)
        select_targets(self.model, self.plans[0])
        self.task: Task = task_of(self.model)
        self.kind: Kind = kind_of(self.task, self.config.eval.metric.kind)
        self.reads_text = self.config.dataset.provider != "generated" or self.task == "masked"
        wanted = self.reads_text or self.config.output.save_model
        self.tokenizer = self.load_tokenizer(trust) if wanted else None

    def load_tokenizer(self, options: Mapping[str, Any]) -> Any:
        try:
            return self.adapter.load_tokenizer(self.config.model.id, **options)
        except UsageError as error:
            if self.reads_text:
                raise
            log.warning("%s; the saved model will have none", one_line(error))
            return None

    def judge(self) -> list[_Attempt]:
        """Prepare the guards, then attempt the edit until one attempt is accepted or there are none left."""
        self.baseline_observed, self.baseline_pass = self.observed_pass("baseline pass")
        self.prepared = self.prepare()
        if not all(prepared.ready for prepared in self.prepared):
            return [self.abort_before_edit()]
        attempts: list[_Attempt] = []
        for number, plan in enumerate(self.plans, start=1):
            attempts.append(self.attempt(number, plan))
            if attempts[-1].verdict.accepted:
                break
            self.restore()
            if attempts[-1].verdict.action is Action.ABORT:
                break
        return attempts

    def observed_pass(self, stage: str) -> tuple[list[Observation], PassResult]:
        """One forward pass over all windows: the losses, and what the taps of each guard collect on the way."""
        observations = [self.plugins.observe(slot, self.model, self.adapter) for slot in self.slots]
        with self.stage(stage):
            measured = measure(
                self.model, self.preview, self.final, task=self.task,
                taps=[observation.taps for observation in observations],
                on_progress=lambda done, total: self.on_progress(stage, done, total),
            )  # fmt: skip
        return observations, measured

    def prepare(self) -> list[Prepared]:
        prepared = []
        calib = _Calibration(self.preview)
        for place, slot in enumerate(self.slots):
            with self.stage("guards"), self.clocked(place):
                returned = self.plugins.prepare(slot, self.model, self.adapter, calib)
            if failed := self.baseline_observed[place].message:
                returned = Prepared(message=failed, error=self.baseline_observed[place].trace)
            if changed := self.changed_since(self.baseline_print):
                self.restore()
                message = _changed(changed)
                returned = Prepared(message=message, error=message)
            prepared.append(returned)
        return prepared

    def abort_before_edit(self) -> _Attempt:
        results = [
            GuardResult.failed(slot.name, prepared.message or "", prepared.error) if prepared.error
            else GuardResult(slot.name, None, Action.CONTINUE, "not run: a guard was not ready, so no edit was made")
            if prepared.ready
            else GuardResult(slot.name, False, Action.ABORT, _not_ready(prepared))
            for slot, prepared in zip(self.slots, self.prepared, strict=True)
        ]  # fmt: skip
        verdict = fold(
            [Finding.of_guard(result) for result in results if result.passed is not None], strict=self.strict
        )
        self.restore()
        return _Attempt(1, self.config.edit.plan.bitwidth, [], results, None, verdict)

    # -- the edit ------------------------------------------------------------------------------------------------------

    def attempt(self, number: int, plan: Plan) -> _Attempt:
        modules = self.quantize(plan)
        with self.stage("fingerprint"):
            edited_print = Fingerprint.of(self.model)
        observed, edited_pass = self.observed_pass("edited pass")
        metric = self.compare(edited_pass)
        context = self.context(number, plan, modules, metric)
        results: list[GuardResult] = []
        for place, slot in enumerate(self.slots):
            if self.config.guards.fail_fast and any(not result.action.accepted for result in results):
                results.append(GuardResult(slot.name, None, Action.CONTINUE, "not run: guards.fail_fast"))
                continue
            result = self.validate(place, context, observed[place])
            if changed := self.changed_since(edited_print):
                self.restore()
                quantize_model(self.model, plan, measure=False)
                result = GuardResult.failed(slot.name, _changed(changed))
            results.append(result)
        findings = [Finding.of_guard(result) for result in results if result.passed is not None]
        verdict = fold([*findings, Finding("primary metric", metric.action, metric.message)], strict=self.strict)
        return _Attempt(number, plan.scheme.bitwidth, modules, results, metric, verdict)

    def quantize(self, plan: Plan) -> list[QuantizedWeight]:
        with self.stage("quantize"):
            return quantize_model(
                self.model, plan, on_progress=lambda done, total, name: self.on_progress("quantize", done, total)
            )

    def compare(self, edited_pass: PassResult) -> MetricResult:
        metric = self.config.eval.metric
        return compare(
            self.baseline_pass,
            edited_pass,
            kind=self.kind,
            limit=self.config.eval.max_pm_ratio,
            level=metric.ci_level,
            reps=metric.reps,
            seed=self.config.dataset.seed,
        )

    def validate(self, place: int, context: Mapping[str, Any], edited: Observation) -> GuardResult:
        """Ask one guard; a tap of its own that failed is its error, whatever it says."""
        slot, baseline = self.slots[place], self.baseline_observed[place]
        observations = {"baseline": baseline.results(), "edited": edited.results()}
        with self.stage("guards"), self.clocked(place):
            result = self.plugins.validate(slot, self.model, self.adapter, {**context, "observations": observations})
        failed = next((observation for observation in (baseline, edited) if observation.message), None)
        return GuardResult.failed(slot.name, failed.message or "", failed.trace) if failed else result

    def context(
        self, number: int, plan: Plan, modules: Sequence[QuantizedWeight], metric: MetricResult
    ) -> dict[str, Any]:
        """What every guard gets to know; each gets a copy of its own with its policy and observations."""
        return {
            "baseline": {"kind": metric.kind, "value": metric.baseline},
            "edited": {"kind": metric.kind, "value": metric.edited, "ratio": metric.ratio, "ci": metric.ci},
            "edit": {
                "name": self.config.edit.name,
                "plan": dataclasses.asdict(plan),
                "modules": [dataclasses.asdict(module) for module in modules],
            },
            "attempt": number,
            "device": str(next(self.model.parameters()).device),
            "rank": 0,
            "vocabulary": len(self.tokenizer) if self.tokenizer is not None else None,
        }

    # -- what must not change ------------------------------------------------------------------------------------------

    def changed_since(self, earlier: Fingerprint) -> list[str]:
        with self.stage("fingerprint"):
            return Fingerprint.of(self.model).changed_since(earlier)

    def restore(self) -> None:
        """Bring the baseline back.

        :raises PluginError: when the adapter's snapshot did not bring it back bit for bit.
        """
        with self.stage("restore"):
            self.adapter.restore(self.model, self.snapshot)
        if changed := self.changed_since(self.baseline_print):
            raise PluginError(
                f"adapter {self.adapter.name}: restore did not bring the baseline back: {_some(changed)} differ"
            )

    # -- what is left behind -------------------------------------------------------------------------------------------

    def report(self, attempts: Sequence[_Attempt]) -> dict[str, Any]:
        last = attempts[-1]
        config = self.config.as_dict()
        after = Fingerprint.of(self.model)
        return reporting.Report(
            invarlock_version=__version__,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            config=config,
            config_sha256=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            model=reporting.ModelSection(
                id=self.config.model.id,
                adapter=self.adapter.name,
                devices=sorted({str(parameter.device) for parameter in self.model.parameters()}),
                description=self.description,
                fingerprint_before=self.baseline_print.digest,
                fingerprint_after=after.digest,
                restored=None if last.verdict.accepted else after == self.baseline_print,
            ),
            edit=reporting.EditSection(
                name=self.config.edit.name,
                plan={**config["edit"]["plan"], "bitwidth": last.bitwidth},
                modules=[_module_section(module) for module in last.modules],
                params_changed=sum(module.parameters for module in last.modules),
            ),
            guards=[self.guard_section(place, result) for place, result in enumerate(last.results)],
            metrics={"primary": _metric_section(last.metric, self.config.eval.metric.ci_level)},
            verdict=reporting.VerdictSection(
                action=last.verdict.action.value,
                accepted=last.verdict.accepted,
                decided_by=last.verdict.decided_by,
                reasons=list(last.verdict.reasons),
                exit_code=int(last.verdict.exit_code),
            ),
            attempts=[
                reporting.AttemptSection(
                    attempt=attempt.number,
                    bitwidth=attempt.bitwidth,
                    action=attempt.verdict.action.value,
                    decided_by=attempt.verdict.decided_by,
                    ratio=attempt.metric.ratio if attempt.metric else None,
                )
                for attempt in attempts
            ],
            timings={stage: round(seconds, 4) for stage, seconds in self.timings.items()},
            environment=_environment(),
        ).as_dict()

    def guard_section(self, place: int, result: GuardResult) -> reporting.GuardSection:
        slot = self.slots[place]
        return reporting.GuardSection(
            name=slot.name,
            origin=slot.plugin.origin.value,
            version=slot.plugin.version,
            passed=result.passed,
            action=result.action.value,
            message=result.message,
            warnings=list(result.warnings),
            metrics=dict(result.metrics),
            prepare=dict(self.prepared[place].returned),
            seconds=round(self.guard_seconds[place], 4),
            error=result.error,
        )

    def write(self, report: dict[str, Any], output: OutputFolder, accepted: bool) -> None:
        output.clear()
        if accepted and self.config.output.save_model:
            with self.stage("save"):
                report["artifacts"] |= output.save_model(self.model, self.tokenizer)
        write_text(output.path / "report.json", reporting.to_json(report))

    # -- clocks --------------------------------------------------------------------------------------------------------

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] += time.perf_counter() - started

    @contextmanager
    def clocked(self, place: int) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.guard_seconds[place] += time.perf_counter() - started


@dataclass(frozen=True)
class _Calibration:
    """The preview windows as guards see them: batches of ``input_ids`` and ``attention_mask``, to be read at will."""

    windows: Windows
    batch_size: int = 8

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.windows.batches(self.batch_size):
            yield {"input_ids": batch.input_ids.clone(), "attention_mask": batch.attention_mask.clone()}

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)


def _refuse_offloaded(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise UsageError(
                f"model.device: {name} is offloaded (on the meta device) and cannot be quantized in place; "
                "load the whole model onto devices"
            )


def _changed(names: Sequence[str]) -> str:
    return f"the guard changed the model ({_some(names)}); the change was undone"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _not_ready(prepared: Prepared) -> str:
    return str(prepared.returned.get("message") or "not ready: prepare returned ready=False")


def _module_section(module: QuantizedWeight) -> reporting.ModuleSection:
    names = {entry.name for entry in dataclasses.fields(reporting.ModuleSection)}
    return reporting.ModuleSection(**{name: plain(getattr(module, name)) for name in names})


def _metric_section(metric: MetricResult | None, level: float) -> reporting.MetricSection | None:
    if metric is None:
        return None
    values = {entry.name: getattr(metric, entry.name) for entry in dataclasses.fields(metric)}
    return reporting.MetricSection(**{**values, "action": metric.action.value, "ci_level": level})


def _environment() -> dict[str, Any]:
    import transformers

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
