"""How well the verdict tells harm from harmless: named edits, labelled by perplexity on text that no guard sees.

    python benchmarks/judgement/judge.py
    python benchmarks/judgement/judge.py --model smollm2 --text acts.txt --label-text kings.txt --every 3

An edit that raises perplexity by at most 2 % is harmless, by 10 % or more harmful; those in between are not counted. It
prints, for each mode (with text, with generated windows, weights alone), how often each guard and the verdict object to
a harmless edit, how many harmful ones they let pass, and how often the damaged module is named first. With
``--ablation`` it prints, from the same runs, what verdict and blame come to without each guard; with ``--stepped``
windows are measured until the limits are certain, up to ``--final``, and their median is printed, too.
Ctrl-C prints the tables of the edits that are done.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from invarlock.cli.commands.run import demo_folder
from invarlock.config.schema import DatasetConfig, EvalConfig, GuardsConfig, ModelConfig, RunConfig
from invarlock.core.errors import ExitCode
from invarlock.core.results import Action, fold
from invarlock.datasets.windows import make_windows
from invarlock.evaluation.passes import measure
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.attempts import Attempt, Edited
from invarlock.pipeline.changes import find_changes
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Gone, Keeper, Loaded
from invarlock.pipeline.session import Baseline, Session
from invarlock.pipeline.suspects import blame
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.reporting.report import COMPARE
from invarlock.testing.named_edits import Edit, edits

HARMLESS, HARMFUL = 1.02, 1.10
MODES = ("text", "generated", "weights only")
STRICT = "verdict, --strict"
UNREAD = 15
"""Rows that no window reads: so many are harmful to the demo model, and too few for any other guard to see."""


@dataclass
class Tally:
    """The mistakes of one voice about the labelled edits in one mode."""

    false_alarms: list[str] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)


@dataclass
class Score:
    """One mode: a tally for each guard and for the verdict, and the blame."""

    without: str | None = None
    """The guard that is left out."""
    voices: dict[str, Tally] = field(default_factory=dict)
    harmless: int = 0
    harmful: int = 0
    located: int = 0
    misplaced: list[str] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    """Final windows that each edit was measured on."""

    def add(self, edit: Edit, harmful: bool, attempt: Attempt) -> None:
        self.harmful += harmful
        self.harmless += not harmful
        if metric := attempt.metrics.primary:
            self.windows.append(metric.windows)
        results = [result for result in attempt.guards if result.name != self.without]
        findings = [finding for finding in attempt.verdict.findings if finding.source != f"guard {self.without}"]
        accepted = fold(findings).accepted
        objections = {result.name: result.action is not Action.CONTINUE for result in results}
        objections["verdict"] = not accepted
        objections[STRICT] = fold(findings, strict=True).exit_code is not ExitCode.ACCEPTED
        for voice, objects in objections.items():
            tally = self.voices.setdefault(voice, Tally())
            if objects != harmful:
                (tally.misses if harmful else tally.false_alarms).append(edit.name)
        if harmful and edit.module and not accepted:
            suspects = [suspect.module for suspect in blame(results)]
            if suspects[:1] == [edit.module]:
                self.located += 1
            else:
                self.misplaced.append(f"{edit.name} (named {', '.join(suspects[:2]) or 'nobody'})")

    def shares(self, voice: str) -> str:
        tally = self.voices[voice]
        return f"{_share(tally.false_alarms, self.harmless)} | {_share(tally.misses, self.harmful)}"

    @property
    def blamed(self) -> str:
        return f"{self.located} of {self.located + len(self.misplaced)}"


@dataclass
class Bench:
    """A baseline, and its guards for each mode, all prepared once."""

    model: Any
    guarding: dict[str, Guarding]
    snapshot: Snapshot
    label: Any

    @classmethod
    def of(cls, args: argparse.Namespace, *, untied: bool) -> Bench:
        model: Any = None
        all_guarding: dict[str, Guarding] = {}
        label = None
        for mode in MODES:
            config = _config(args, mode)
            plugins = PluginManager.load(Selection())
            session = Session(config, plugins)
            if model is None:
                model, adapter = session.load(config.model.id)
                if untied and model.lm_head.weight is model.model.embed_tokens.weight:
                    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
                keeper = Keeper(Loaded.of(model, session.clock), adapter)
            weights_only = mode == "weights only"
            reads_text = False if weights_only else None
            baseline = Baseline(session, model, adapter, wants_tokenizer=True, reads_text=reads_text)
            windows = None if weights_only else baseline.make_windows(model)
            guarding = Guarding(session, baseline, windows, plugins.guard_slots(config.guards.order, {}))
            guarding.begin(model, keeper.baseline)
            assert guarding.ready, [prepared.message for prepared in guarding.prepared]
            all_guarding[mode] = guarding
            if label is None:
                dataset = _label_dataset(args)
                documents = plugins.documents(dataset)
                _, label = make_windows(
                    dataset.counted(args.final), model, baseline.tokenizer, task="causal", documents=documents
                )
        return cls(model, all_guarding, keeper.snapshot, label)

    def perplexity(self) -> float:
        return measure(self.model, self.label[:1], self.label, task="causal").perplexity

    def unread_rows(self) -> Edit:
        """Exchanges embeddings of tokens that the label text has and no window of any mode, the rarest of them."""
        windows = [part for guarding in self.guarding.values() for part in guarding.windows or ()]
        read = {token for part in windows for token in part.input_ids.flatten().tolist()}
        rows = torch.tensor(sorted({*self.label.input_ids.flatten().tolist()} - read)[-UNREAD:])
        embedding = self.model.get_input_embeddings()
        module = next(name for name, module in self.model.named_modules() if module is embedding)
        tied = "tied" if embedding.weight is self.model.get_output_embeddings().weight else "untied"

        def exchange(model: Any, seed: torch.Generator) -> None:
            weight = model.get_input_embeddings().weight
            weight[rows] = weight[rows.roll(1)]

        return Edit(f"{tied} embedding rows that no window reads, exchanged", exchange, module)

    def attempts(self, edit: Edit) -> Iterator[tuple[str, Attempt]]:
        @contextmanager
        def bring_baseline() -> Iterator[Any]:
            self.snapshot.restore(self.model)
            yield self.model
            edit(self.model)

        before = self.snapshot.parameters()
        tensors = find_changes(self.model, before.lent).tensors
        edited = Edited(self.model, Gone(), COMPARE, {}, tensors, before, bring_baseline=bring_baseline)
        for mode, guarding in self.guarding.items():
            yield mode, guarding.judge(edited)


def _config(args: argparse.Namespace, mode: str) -> RunConfig:
    dataset = _text_dataset(args, args.text, seed=42) if mode != "generated" else DatasetConfig(**_sizes(args), seed=42)
    adapter = "hf_gguf" if args.model.endswith(".gguf") else "auto"
    return RunConfig(
        model=ModelConfig(id=args.model, adapter=adapter, device="cpu", dtype="float32"),
        dataset=dataset,
        guards=GuardsConfig(order=tuple(args.guards.split(","))),
        eval=EvalConfig(),
    )


def _sizes(args: argparse.Namespace) -> dict[str, Any]:
    windows = {"final_n": "auto", "max_n": args.final} if args.stepped else {"final_n": args.final}
    return {"seq_len": args.seq_len, "preview_n": args.preview, **windows}


def _text_dataset(args: argparse.Namespace, path: str | None, seed: int) -> DatasetConfig:
    if path is None:
        return DatasetConfig(provider="demo", **_sizes(args), seed=seed)
    if path.endswith(".jsonl"):
        return DatasetConfig(provider="local_jsonl", path=path, **_sizes(args), seed=seed)
    return DatasetConfig(provider="local_text", path=path, **_sizes(args), seed=seed)


def _label_dataset(args: argparse.Namespace) -> DatasetConfig:
    return _text_dataset(args, args.label_text, seed=7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo_folder() / "checkpoint"), help="the baseline, Llama-style")
    parser.add_argument("--text", help="text for the guards and the metric")
    parser.add_argument("--label-text", help="other text, for the labels")
    parser.add_argument("--guards", default="invariants,reconstruction,spectral,rmt,variance")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--preview", type=int, default=8)
    parser.add_argument("--final", type=int, default=24)
    parser.add_argument("--stepped", action="store_true", help="measure windows until the limits are certain")
    parser.add_argument("--every", type=int, default=1, help="take every so manieth edit of single matrices")
    parser.add_argument("--ablation", action="store_true", help="print what is lost without each guard, too")
    args = parser.parse_args()
    logging.getLogger("invarlock").setLevel(logging.ERROR)
    if args.text is None:
        args.text, args.label_text = _split_demo_text()
    left_out = [None, *(args.guards.split(",") if args.ablation else [])]
    scores = {mode: [Score(guard) for guard in left_out] for mode in MODES}
    ratios: dict[str, float] = {}
    try:
        for untied in (False, True):
            bench = Bench.of(args, untied=untied)
            _judge(bench, [*_chosen(bench.model, untied, args.every), bench.unread_rows()], scores, ratios)
    except KeyboardInterrupt:
        print(f"\nInterrupted: these are the first {len(ratios)} edits.")
    _print(args, scores, ratios)


def _judge(bench: Bench, chosen: list[Edit], scores: dict[str, list[Score]], ratios: dict[str, float]) -> None:
    """Add to the scores what guards and verdict say of each edit, and to the ratios the one that labels it."""
    baseline = bench.perplexity()
    for edit in chosen:
        edit(bench.model)
        ratio = bench.perplexity() / baseline
        harmful = not math.isfinite(ratio) or ratio >= HARMFUL
        if harmful or ratio <= HARMLESS:
            for mode, attempt in bench.attempts(edit):
                for score in scores[mode]:
                    score.add(edit, harmful, attempt)
        bench.snapshot.restore(bench.model)
        ratios[edit.name] = ratio
        print(f"{len(ratios)}: {edit.name}, {ratio:.4f}", file=sys.stderr, flush=True)


def _chosen(model: Any, untied: bool, every: int) -> list[Edit]:
    """All edits of the whole model, and every so manieth of a single matrix."""
    found = [edit for edit in edits(model) if edit.untied == untied]
    single = [edit for edit in found if edit.module]
    return [edit for edit in found if not edit.module] + single[::every]


def _split_demo_text() -> tuple[str, str]:
    """The demo's held-out chapters, every other one for the labels."""
    lines = (demo_folder() / "text.jsonl").read_text().splitlines(keepends=True)
    paths = []
    for start, name in enumerate(("judged", "label")):
        path = Path("/tmp") / f"invarlock-demo-{name}.jsonl"
        path.write_text("".join(lines[start::2]))
        paths.append(str(path))
    return paths[0], paths[1]


def _print(args: argparse.Namespace, scores: dict[str, list[Score]], ratios: dict[str, float]) -> None:
    whole = {mode: of_mode[0] for mode, of_mode in scores.items()}
    some = next(iter(whole.values()))
    print(f"\n{len(ratios)} edits of {Path(args.model).name}: {some.harmless} harmless, {some.harmful} harmful\n")
    print("| mode | voice | false alarms | misses |\n|---|---|---|---|")
    for mode, score in whole.items():
        for voice in score.voices:
            print(f"| {mode} | {voice} | {score.shares(voice)} |")
    print("\n| mode | damaged module first |\n|---|---|")
    for mode, score in whole.items():
        print(f"| {mode} | {score.blamed} |")
    if args.stepped:
        print("\n| mode | windows, median |\n|---|---|")
        for mode, score in whole.items():
            if score.windows:
                print(f"| {mode} | {median(score.windows):g} of {args.final} |")
    if args.ablation:
        _print_ablation(scores)
    for mode, score in whole.items():
        print(f"\n{mode}: verdict's false alarms: {score.voices['verdict'].false_alarms}")
        print(
            f"{mode}: verdict's misses: {[(name, round(ratios[name], 3)) for name in score.voices['verdict'].misses]}"
        )
        print(f"{mode}: wrongly blamed: {score.misplaced}")


def _print_ablation(scores: dict[str, list[Score]]) -> None:
    """Verdict and blame without each guard, and the edits for which one changes them."""
    print("\n| mode | without | verdict: false alarms | misses | --strict: false alarms | misses | module first |")
    print("|---|---|---|---|---|---|---|")
    for mode, of_mode in scores.items():
        for score in of_mode:
            shares = f"{score.shares('verdict')} | {score.shares(STRICT)}"
            print(f"| {mode} | {score.without or '-'} | {shares} | {score.blamed} |")
    for mode, (whole, *others) in scores.items():
        for score in others:
            misses = [set(one.voices[STRICT].misses) for one in (score, whole)]
            alarms = [set(one.voices[STRICT].false_alarms) for one in (whole, score)]
            print(f"\n{mode}, only {score.without} warns of: {sorted(misses[0] - misses[1])}")
            print(f"{mode}, only {score.without} warns, falsely, of: {sorted(alarms[0] - alarms[1])}")
            print(f"{mode}, wrongly blamed without {score.without}: {score.misplaced}")


def _share(names: list[str], total: int) -> str:
    return f"{len(names)} of {total} ({len(names) / max(total, 1):.1%})"


if __name__ == "__main__":
    main()
