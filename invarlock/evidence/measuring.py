"""The checkpoints measured again, over the same windows, through the passes of a run. No guard is asked."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from invarlock.config.schema import Dtype, RunConfig
from invarlock.core.errors import UsageError
from invarlock.core.progress import Progress
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.per_byte import over_same_text
from invarlock.evidence.disagreements import Disagreement, printable
from invarlock.evidence.outputs import passes
from invarlock.evidence.verifying import Run, Verification
from invarlock.models.fingerprint import Fingerprint
from invarlock.pipeline.comparison import unreadable_windows
from invarlock.pipeline.own_tokenizer import PER_BYTE, read_with
from invarlock.pipeline.session import Baseline, Session, WindowPair
from invarlock.pipeline.subject import Subject, load
from invarlock.pipeline.supply import Supply
from invarlock.pipeline.tasks import judging_of
from invarlock.pipeline.tokenizer import load_tokenizer
from invarlock.plugins.adapter import Adapter
from invarlock.plugins.manager import PluginManager

TOLERANCE, TOLERANCE_16_BITS = 0.001, 0.01
"""Nats per token by which a window's loss may differ, in float32 and in types of 16 bits. Processors and libraries
order their sums in their own ways, and 16 bits round every layer's output to 8 or 11 of them. A thousandth of a nat
moves a perplexity by one part in a thousand: far less than a limit that an edit is held against."""

GGUF = "model.gguf"
FROM_PATHS = frozenset({"local_jsonl", "local_text", "local_images", "local_audio", "pairs"})
"""Built-in providers that read a file or a folder; the data of any other are given as JSON lines."""


@dataclass(frozen=True)
class Checkpoints:
    """Paths of the models and of the text; None for what is not at hand."""

    baseline: str | None
    subject: str | None
    dataset: str | None = None
    """A file or folder in place of the one that the report names, for the same provider."""
    device: str | None = None


def measure_again(
    run: Run,
    checkpoints: Checkpoints,
    plugins: PluginManager,
    verification: Verification,
    on_progress: Progress = lambda stage, done, total: None,
) -> None:
    """Add to a verification what comes out when the checkpoints are measured again.

    Code that lies beside weights never runs, and plugins that the report names are not imported.

    :raises UsageError: a checkpoint or the text cannot be read.
    """
    subject = checkpoints.subject or (_saved_model(run) if checkpoints.baseline else None)
    first = checkpoints.baseline or subject
    if first is None:
        verification.not_checked.append("losses, measured again: give --baseline, --subject or both")
        return
    session = Session(_config(run, checkpoints, first, subject), plugins, on_progress)
    streamed = run.report.model.streamed
    # A run rounds no activations, for what it saves declares none.
    model, adapter = load(session, first, on_disk=streamed, simulated=run.report.edit.is_comparison)
    opened = Baseline(session, model, adapter)
    again = _Again(run, verification, opened, None)
    if stored := run.report.metrics.windows:
        supply = Supply(opened, opened.make_windows(model))
        supply.write(model, min(len(stored.tokens), supply.most))
        again = replace(again, supply=supply)
    if checkpoints.baseline is not None:
        again.baseline(model)
    if checkpoints.baseline is not None and subject is not None:
        # The baseline goes before the subject comes, and a module tree has cycles that would keep it.
        del model
        gc.collect()
        model, adapter = Subject.of(session, subject).load(on_disk=streamed)
    if subject is not None:
        again.subject(model, adapter, subject)
    for side, given in (("baseline", checkpoints.baseline), ("edited", subject)):
        if given is None:
            verification.not_checked.append(f"losses of the {side} model, measured again: its checkpoint is not given")


def _saved_model(run: Run) -> str | None:
    model = run.folder / "model"
    if not run.report.artifacts or not model.is_dir():
        return None
    return str(model / GGUF if (model / GGUF).is_file() else model)


def _config(run: Run, checkpoints: Checkpoints, first: str, subject: str | None) -> RunConfig:
    """The report's configuration, without what a stranger must not decide."""
    model = replace(
        run.config.model,
        id=first,
        adapter="auto" if (subject or "").endswith(".gguf") else run.config.model.adapter,
        device=checkpoints.device or run.config.model.device,
        dtype=_dtype(run),
        parallel="auto",
        trust_remote_code=False,
        revision=None,
    )
    # A report of an older version, which rendered no conversations, lacks the key.
    chat = run.config.dataset.chat if "chat" in run.report.config.get("dataset", {}) else "never"
    dataset = replace(run.config.dataset, chat=chat)
    if checkpoints.dataset is not None:
        provider = dataset.provider if dataset.provider in FROM_PATHS else "local_jsonl"
        dataset = replace(dataset, provider=provider, path=checkpoints.dataset)
    elif dataset.path is not None and not Path(dataset.path).exists():
        raise UsageError(f"dataset.path: there is no {printable(dataset.path)}; give the data with --dataset PATH")
    if dataset.is_generated and checkpoints.baseline is None:
        raise UsageError("dataset.provider: the baseline wrote the windows; give --baseline, too")
    return replace(run.config, model=model, dataset=dataset, plugins=())


def _dtype(run: Run) -> Dtype:
    """The data type that was judged: a model that the run saved need not hold it."""
    if run.report.edit.is_comparison:
        return run.config.model.dtype
    judged = run.report.model.description.get("dtype")
    return next((dtype for dtype in get_args(Dtype) if dtype == judged), run.config.model.dtype)


@dataclass(frozen=True)
class _Again:
    """Both sides, over windows of the first model, which are made with its tokenizer or by itself."""

    run: Run
    verification: Verification
    first: Baseline
    supply: Supply | None
    """Of windows; None where the report has no losses."""
    passes: list[PassResult] = field(default_factory=list)
    """Of the baseline, where what is compared cannot be told before the subject has been run."""

    @property
    def count(self) -> int:
        """Number of final windows that were measured; the configuration tells it, unless steps were taken."""
        stored, wanted = self.run.report.metrics.windows, self.run.config.dataset.final_n
        return wanted if wanted != "auto" else len(stored.tokens) if stored else 0

    @property
    def windows(self) -> WindowPair | None:
        """Those that were measured."""
        return (self.supply.preview, self.supply.between(0, self.count)) if self.supply else None

    @property
    def per_byte(self) -> bool:
        stored = self.run.report.metrics.windows
        return stored is not None and stored.bytes is not None

    @property
    def is_distance(self) -> bool:
        metric = self.run.report.metrics.primary
        return metric is not None and metric.is_distance

    def baseline(self, model: torch.nn.Module) -> None:
        self._fingerprint("fingerprint_before", model)
        if (self.per_byte or self.is_distance) and self.windows is not None:
            self.passes.append(self.first.run_pass(model, self.windows, "pass")[0])
        else:
            self._losses("baseline", 0, model)

    def subject(self, model: torch.nn.Module, adapter: Adapter, checkpoint: str) -> None:
        # A saved model's format has tensors of its own; its files have digests.
        if self.run.report.edit.is_comparison:
            self._fingerprint("fingerprint_after", model)
        if self.run.report.coverage.conversations and self.first.session.config.model.id == checkpoint:
            missing = "the baseline's chat template renders some of the windows; give --baseline, too"
            self.verification.not_checked.append(f"losses of the edited model, measured again: {missing}")
        elif self.per_byte:
            self._losses_per_byte(model, adapter, checkpoint)
        elif reason := unreadable_windows(self.windows, self.first, model):
            self.verification.check("losses of the edited model", [Disagreement(checkpoint, "a model", reason)])
        elif self.is_distance:
            self._distances(model)
        else:
            self._losses("edited", 1, model)

    def _fingerprint(self, name: str, model: torch.nn.Module) -> None:
        stored = getattr(self.run.report.model, name)
        what = f"model.{name}"
        if self.run.report.model.streamed:
            self.verification.not_checked.append(f"{what}: of a streamed run it holds on the run's machine alone")
            return
        found = Fingerprint.of(model).digest
        self.verification.check(
            f"{what}, of the checkpoint", [Disagreement(what, stored, found, "measured")] if stored != found else []
        )

    def _losses(self, side: str, place: int, model: torch.nn.Module) -> None:
        stored = passes(self.run.report)
        if stored is None or self.windows is None:
            return
        vocabulary = self.run.report.model.description.get("vocab_size")
        known = vocabulary if isinstance(vocabulary, int) else None
        found, _ = self.first.run_pass(model, self.windows, "pass", vocabulary=known)
        self._compare(side, stored[place], found)

    def _losses_per_byte(self, model: torch.nn.Module, adapter: Adapter, checkpoint: str) -> None:
        """Both sides' losses of the same text, which takes both tokenizers."""
        stored = passes(self.run.report)
        if stored is None or self.supply is None or not self.passes:
            reason = "they are of the text that two tokenizers split; give --baseline, too"
            self.verification.not_checked.append(f"losses of both models, measured again: {reason}")
            return
        session = self.first.session
        own = load_tokenizer(adapter, checkpoint, session.trust, required=True)
        same_text = read_with("own", self.first, self.supply.made_yet, model, own).same_text
        if same_text is None:
            told = Disagreement("metrics.windows.bytes", "two tokenizers", "the same ids from both", "measured")
            self.verification.check("losses of both models", [told])
            return
        edited, _ = self.first.run_pass(model, (self.supply.preview[:0], same_text.windows[: self.count]), "pass")
        found = over_same_text(self.passes[0], edited, same_text.shared, task=PER_BYTE[self.first.task.name])
        for side, old, new in zip(("baseline", "edited"), stored, found, strict=True):
            self._compare(side, old, new)

    def _distances(self, model: torch.nn.Module) -> None:
        """Both sides' distances from the baseline, which takes both models."""
        stored = passes(self.run.report)
        if stored is None or self.windows is None or not self.passes:
            self.verification.not_checked.append("distances, measured again: give --baseline, too")
            return
        edited, _ = self.first.run_pass(model, self.windows, "pass")
        found = self.first.task.compare(
            self.passes[0], edited, judging_of(self.run.config, self.count, self.first.reader)
        ).passes
        for side, old, new in zip(("baseline", "edited"), stored, found, strict=True):
            self._compare(side, old, new)

    def _compare(self, side: str, stored: PassResult, found: PassResult) -> None:
        judged = self.run.report.model.description.get("dtype")
        tolerance = TOLERANCE if judged == "float32" else TOLERANCE_16_BITS
        what = f"losses of the {side} model, measured again, to {tolerance:g} nats per token"
        metric = self.run.report.metrics.primary
        if metric is not None and metric.is_distance:
            # A label at a boundary may be another one on another processor.
            tolerance = 1 / max(1, int(stored.tokens.min())) if metric.statistic == "share" else tolerance
            what = f"{metric.name} of the {side} model, measured again, to {tolerance:g} per sample"
        self.verification.check(what, _differing(side, stored, found, tolerance))


def _differing(side: str, stored_pass: PassResult, found_pass: PassResult, tolerance: float) -> Sequence[Disagreement]:
    """One line for all windows of a side, about the one that differs most."""
    if not np.array_equal(stored_pass.tokens, found_pass.tokens) or not np.array_equal(
        stored_pass.sizes, found_pass.sizes
    ):
        # Every figure is a mean over tokens: with other counts it could be any.
        return [
            Disagreement(
                f"metrics.windows.tokens (beside {side})", _counted(stored_pass), _counted(found_pass), "measured"
            )
        ]
    stored, found, tokens = stored_pass.losses, found_pass.losses, np.maximum(found_pass.tokens, 1)
    with np.errstate(invalid="ignore"):
        # Equal infinities and NaN on both sides agree; one side alone that is not finite does not.
        same = (stored == found) | (np.isnan(stored) & np.isnan(found))
        apart = np.where(same, 0.0, np.nan_to_num(np.abs(stored - found), nan=np.inf)) / tokens
    beyond = int((apart > tolerance).sum())
    if not beyond:
        return []
    worst = int(apart.argmax())
    what = f"metrics.windows.{side}[{worst}] (as {beyond - 1} more of {len(apart)} windows; this one most)"
    return [Disagreement(what, float(stored[worst]), float(found[worst]), "measured")]


def _counted(measured: PassResult) -> str:
    return f"{int(measured.tokens.sum())} tokens in {len(measured.tokens)} windows"
