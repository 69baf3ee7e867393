"""A search for bits against uniform rounding: ``python benchmarks/search.py MODEL SEARCHED.txt MEASURED.txt``.

The sensitivities are of windows of the first text, and the rise of the loss is measured on windows of the second, which
the search does not see. Bits per weight count scales of 16 bits. Uniform rounding is in groups of 64. ``error only``
allocates by the squared errors alone; ``free`` and ``fused`` by the Fisher information, without and with one scheme for
all that engines fuse; ``no gradients`` by relative errors, fused, as a search of a streamed model does. The columns are
the ratio of perplexities, its logarithm, that of the prediction, and the rise of the loss as a multiple of that of
uniform rounding. The last line tells the cost in passes over the measured windows.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.datasets.layout import Windows
from invarlock.evaluation.passes import measure
from invarlock.evaluation.taps import attached
from invarlock.pipeline.planning.sensitivities import weighed
from invarlock.quantization import Plan, Scheme, WeightTarget, select_targets
from invarlock.quantization.model import quantize_weights
from invarlock.quantization.selection import PlannedWeight
from invarlock.search.candidates import Decision, decisions, predicted_rise
from invarlock.search.fisher import Curvature, Fisher, fisher_of
from invarlock.search.frontier import best_within
from invarlock.search.linearity import fitted, input_taps

LENGTH = 256
UNIFORM = {4.25: 4, 5.25: 5, 6.25: 6}
"""Bits of uniform rounding in groups of 64, by the bits per weight that they come to."""
GROUP = 64
BATCH = 4


@dataclass
class Bench:
    """The model, its weights as they were, and the windows that rises are measured on."""

    model: Any
    targets: Sequence[WeightTarget]
    measured: torch.Tensor

    def __post_init__(self) -> None:
        self.originals = {each.parameter_name: each.parameter.detach().clone() for each in self.targets}
        started = time.process_time()
        self.baseline = self.loss()
        self.seconds = time.process_time() - started

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per token."""
        total = 0.0
        for batch in torch.split(self.measured, BATCH):
            logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1]
            total += float(functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        return total / self.measured[:, 1:].numel()

    def rise(self, weights: Sequence[PlannedWeight]) -> float:
        """Of the loss, from rounding."""
        with self.rounded(weights):
            return self.loss() - self.baseline

    @contextmanager
    def rounded(self, weights: Sequence[PlannedWeight]) -> Iterator[None]:
        """The model with some weights rounded; it is brought back."""
        quantize_weights(weights, measure=False)
        yield
        with torch.no_grad():
            for target in self.targets:
                target.parameter.copy_(self.originals[target.parameter_name])

    def by_relative_errors(self, windows: Windows) -> Fisher:
        """Sensitivities without gradients, fitted on some windows."""
        run = partial(measure, self.model, windows[:0], windows, task="causal")
        inputs = input_taps(self.targets)
        with attached(self.model, inputs):
            record = run().record

        def divergence(scheme: Scheme, names: Sequence[str]) -> float:
            with self.rounded([PlannedWeight(target, scheme) for target in self.targets if target.name in names]):
                changes = run(reference=record).changes
            assert changes is not None
            return float(changes.kl.mean())

        return fitted(self.targets, inputs, divergence)


def planned(
    found: Sequence[Decision], bits: float, targets: Mapping[str, WeightTarget], fisher: Fisher
) -> tuple[list[PlannedWeight], float]:
    """The best plan of so many bits per weight, and the rise that it predicts."""
    best = best_within(found, bits)
    assert best is not None
    chosen = zip(found, best.choices, strict=True)
    weights = [PlannedWeight(targets[name], choice.scheme) for decision, choice in chosen for name in decision.names]
    return weighed(weights, fisher), best.rise


def flat(fisher: Fisher) -> Fisher:
    """All weights as important as any other."""
    return {name: Curvature(torch.ones_like(each.rows), torch.ones_like(each.columns)) for name, each in fisher.items()}


def windows_of(tokenizer: Any, path: Path, count: int) -> torch.Tensor:
    ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def main() -> None:
    parser = argparse.ArgumentParser(description="A search for bits against uniform rounding.")
    parser.add_argument("model", help="folder of a causal model")
    parser.add_argument("searched", type=Path, help="text of the sensitivities")
    parser.add_argument("measured", type=Path, help="text that rises are measured on")
    parser.add_argument("--windows", type=int, default=8, help="of the sensitivities (8)")
    parser.add_argument("--final", type=int, default=16, help="windows that rises are measured on (16)")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    targets = select_targets(model, Plan(bitwidth=8, scope="all"))
    bench = Bench(model, targets, windows_of(tokenizer, options.measured, options.final))
    ids = windows_of(tokenizer, options.searched, options.windows)

    started = time.process_time()
    fisher = fisher_of(model, Windows(ids, torch.ones_like(ids), ids), targets, task="causal", seed=0)
    gradients = time.process_time() - started
    scheme = Scheme(bitwidth=8, scale="fisher")
    fused = decisions(targets, scheme, fisher)
    candidates = time.process_time() - started - gradients
    plain = Scheme(bitwidth=8, scale="inputs")
    windows = Windows(ids, torch.ones_like(ids), ids)
    started = time.process_time()
    relative = bench.by_relative_errors(windows)
    measured = time.process_time() - started
    searches = {
        "error only": decisions(targets, Scheme(bitwidth=8), flat(fisher)),
        "free": decisions(targets, scheme, fisher, fuse=False),
        "fused": fused,
        "no gradients": decisions(targets, plain, relative),
    }
    by_name = {target.name: target for target in targets}
    print(f"{'bits':>5} {'plan':12} {'ratio':>7} {'log':>7} {'predicted':>9} {'x uniform':>9}")
    for bits, width in UNIFORM.items():
        weights = [PlannedWeight(target, Scheme(bitwidth=width, group_size=GROUP)) for target in targets]
        predicted = sum(
            predicted_rise(each.target, each.scheme, fisher[each.target.parameter_name]) for each in weights
        )
        uniform = bench.rise(weights)
        show(bits, "uniform", uniform, predicted, uniform)
        for name, found in searches.items():
            weights, predicted = planned(found, bits, by_name, fisher)
            show(bits, name, bench.rise(weights), math.nan if name == "error only" else predicted, uniform)
    print(
        f"one pass over {options.final} windows: {bench.seconds:.1f} s of processor time; "
        f"sensitivities: {gradients / bench.seconds:.1f} passes, {measured / bench.seconds:.1f} without gradients; "
        f"candidates: {candidates / bench.seconds:.1f} passes"
    )


def show(bits: float, name: str, rise: float, predicted: float, uniform: float) -> None:
    times = rise / uniform if uniform else math.nan
    print(f"{bits:5} {name:12} {math.exp(rise):7.3f} {rise:7.4f} {predicted:9.4f} {times:9.2f}", flush=True)


if __name__ == "__main__":
    main()
